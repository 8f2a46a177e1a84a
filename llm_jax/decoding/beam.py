"""Beam search, plain and diverse, for prompts of any lengths.

All beams (G groups of K beams for each of B prompts) are rows of one cache. Each group has a pool of up to K ended
hypotheses, ranked by log-probability / length^penalty, where the length includes EOS. As in transformers, only the K
best candidates of a step may end; the next best candidates replace them, so that K hypotheses continue.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import trees, weights
from llm_jax.decoding import compiled, loop, steps
from llm_jax.decoding.continuations import Generated, StopFn
from llm_jax.decoding.options import EARLY_STOP, DecodingOptions
from llm_jax.decoding.samplers import History
from llm_jax.decoding.steps import DrawSettings
from llm_jax.model.attention import KVCache, TokenMetadata
from llm_jax.model.transformer import Transformer

# Letters of shapes: B batch, G groups, K beams per group, C candidates, R rows = B G K, N new tokens, V vocabulary.


@dataclasses.dataclass(frozen=True)
class Beam:
    """An ended hypothesis.

    Attributes:
      generated: its tokens.
      score: log-probability / length^penalty, under the filtered distribution.
    """

    generated: Generated
    score: float


@trees.register
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """Token sequences and their log-probabilities.

    Attributes:
      total: float32 (B, G, K), log-probability of a sequence under the filtered distribution; -inf for an empty slot.
      rank: float32 (B, G, K), total / length^penalty; -inf for an empty slot.
      ids: int32 (B, G, K, N).
      logs: float32 (B, G, K, N), log-probability of each token under the model itself.
      length: int32 (B, G, K).
    """

    total: jax.Array
    rank: jax.Array
    ids: jax.Array
    logs: jax.Array
    length: jax.Array


@trees.register
@dataclasses.dataclass(frozen=True)
class BeamState:
    """The carry of the loop.

    Attributes:
      cache, history: cache and tokens of R rows.
      logits: (R, V), logits of the next token.
      time: int32 (), number of tokens of every running hypothesis.
      running, ended: the running hypotheses, and the pools of ended hypotheses.
      closed: bool (B,), prompts whose pools were final before the last step.
    """

    cache: KVCache
    history: History
    logits: jax.Array
    time: jax.Array
    running: Hypotheses
    ended: Hypotheses
    closed: jax.Array


@trees.register
@dataclasses.dataclass(frozen=True)
class BeamSettings:
    """Numeric settings of the search; changing them does not recompile.

    Attributes:
      early_stop: index into `options.EARLY_STOP` (False, True, "never").
      limit: max_new_tokens.
    """

    length_penalty: float | jax.Array
    diversity: float | jax.Array
    early_stop: int | jax.Array
    limit: int | jax.Array


def search(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    options: DecodingOptions,
    *,
    eos: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    stop: StopFn | None = None,
) -> list[list[Beam]]:
    """The `options.n` best hypotheses of a beam search for every prompt, best first.

    For arguments and errors, see `loop.generate`. Only the options for beam search and penalties are used.
    """
    groups, limit = options.beam_groups, options.max_new_tokens
    model, params = loop.unrolled(model, params)
    loop.check(model, prompts, limit, [0] * len(prompts))
    settings = loop.draw_settings(model, options.sampler(), [0], eos, vocab_size)
    beams = BeamSettings(options.length_penalty, options.diversity, EARLY_STOP.index(options.early_stop), limit)
    prompts_BP, lengths = steps.padded(prompts, params)
    state = _start(model, groups, options.beams // groups, steps.bucket(limit), params, prompts_BP, lengths)
    for until in range(1, limit + 1) if stop else (limit,):
        state = _advance(model, params, settings, beams, state, jnp.int32(until))
        if stop:
            ids = np.asarray(state.running.ids)
            stopped = np.zeros(ids.shape[:3], bool)
            for row, group, beam in np.argwhere(np.isfinite(np.asarray(state.running.total))).tolist():
                stopped[row, group, beam] = stop(row, ids[row, group, beam, :until].tolist(), until - 1) is not None
            state = _end(state, beams, jnp.asarray(stopped))
        if int(state.time) < limit and bool(jnp.all(_closed(state, beams))):
            break
    else:
        state = _end(state, beams, jnp.isfinite(state.running.total))  # running hypotheses end at the maximum length
    return _results(jax.device_get(state.ended), np.asarray(settings.eos), options, stop)


@compiled.jit(static=(0, 1, 2))
def _start(
    model: Transformer,
    groups: int,
    beams: int,
    capacity: int,
    params: Any,
    prompts_BP: jax.Array,
    lengths: jax.Array,
) -> BeamState:
    b, p = prompts_BP.shape
    x_BPD, cache = loop.prefill(model, params, prompts_BP, lengths, p + capacity)
    shape = (b, groups, beams)
    empty = Hypotheses(
        jnp.full(shape, -jnp.inf),
        jnp.full(shape, -jnp.inf),
        jnp.zeros((*shape, capacity), jnp.int32),
        jnp.zeros((*shape, capacity), jnp.float32),
        jnp.zeros(shape, jnp.int32),
    )
    first = dataclasses.replace(empty, total=empty.total.at[..., 0].set(0.0))  # a single, empty hypothesis
    history = History(jnp.pad(prompts_BP, ((0, 0), (0, capacity))), lengths, lengths)
    source_rows = jnp.repeat(jnp.arange(b), groups * beams)  # the row of the prompt that each beam copies
    per_row = (cache.tokens, cache.layers, history, steps.last_logits(model, params, x_BPD, lengths))
    tokens, layers, history, logits = jax.tree.map(lambda x: x[source_rows], per_row)
    cache = KVCache(tokens, cache.index, layers)
    return BeamState(cache, history, logits, jnp.int32(0), first, empty, jnp.zeros(b, bool))


@compiled.jit(donate=(3,))
def _advance(
    model: Transformer, params: Any, settings: DrawSettings, beams: BeamSettings, state: BeamState, until: jax.Array
) -> BeamState:
    """Advances until the hypotheses have `until` tokens or all pools are final."""
    b, groups, width = state.running.total.shape
    params = weights.repeat_rows(params, groups * width)

    def unfinished(s: BeamState) -> jax.Array:
        return (s.time < until) & ~jnp.all(_closed(s, beams))

    def step(s: BeamState) -> BeamState:
        closed = _closed(s, beams)
        logs_RV = jax.nn.log_softmax(s.logits.astype(jnp.float32))
        scores = settings.sampler.log_probabilities(settings.mask_padded_vocab(s.logits), s.history)
        scores = scores.reshape(b, groups, width, -1)
        vocab = scores.shape[-1]
        count = min(width * (1 + settings.eos.shape[0]), width * vocab)  # at least `width` of them are not EOS
        chosen = jnp.zeros((b, vocab))  # how many beams of earlier groups chose each token in this step
        totals, parents, tokens = [], [], []
        for group in range(groups):
            ranked = s.running.total[:, group, :, None] + scores[:, group]
            # Vijayakumar et al. 2016, arXiv:1610.02424, equation 5, with the Hamming diversity of section 5.1.
            _, indices = jax.lax.top_k((ranked - beams.diversity * chosen[:, None]).reshape(b, -1), count)
            totals.append(jnp.take_along_axis(ranked.reshape(b, -1), indices, 1))
            parents.append(indices // vocab)
            tokens.append((indices % vocab).astype(jnp.int32))
            continued = jnp.take_along_axis(tokens[-1], _first(~settings.is_eos(tokens[-1]), width), 1)
            chosen = chosen.at[jnp.arange(b)[:, None], continued].add(1.0)
        total, parent, token = (jnp.stack(x, 1) for x in (totals, parents, tokens))  # (B, G, C)
        is_eos = settings.is_eos(token)
        logs = jnp.take_along_axis(logs_RV.reshape(b, groups, -1), parent * vocab + token, -1)
        candidates = Hypotheses(
            total,
            total / (s.time + 1.0) ** beams.length_penalty,
            _gather(s.running.ids, parent).at[..., s.time].set(token),
            _gather(s.running.logs, parent).at[..., s.time].set(logs),
            jnp.broadcast_to(s.time + 1, token.shape),
        )
        # Only the best `width` candidates may end.
        ends = is_eos & (jnp.arange(token.shape[-1]) < width) & ~closed[:, None, None]
        ended = _merge(s.ended, dataclasses.replace(candidates, rank=jnp.where(ends, candidates.rank, -jnp.inf)))
        taken = jnp.stack([_first(~is_eos[:, g], width) for g in range(groups)], 1)
        running = jax.tree.map(lambda x: _gather(x, taken), candidates)
        # If fewer than K candidates continue, ended candidates fill the slots and are treated as empty.
        running = dataclasses.replace(running, total=jnp.where(_gather(is_eos, taken), -jnp.inf, running.total))
        first_row = jnp.arange(b * groups).reshape(b, groups, 1) * width
        rows = (first_row + jnp.take_along_axis(parent, taken, -1)).reshape(-1)
        ids = jnp.take_along_axis(token, taken, -1).reshape(-1)
        tokens_R, layers, history = jax.tree.map(lambda x: x[rows], (s.cache.tokens, s.cache.layers, s.history))
        position = TokenMetadata(history.length[:, None], jnp.ones_like(ids)[:, None])
        cache = KVCache(tokens_R, s.cache.index, layers)
        logits, cache = steps.apply(model, params, ids[:, None], position, cache)
        history = steps.append(history, ids, jnp.ones_like(ids, bool))
        return BeamState(cache, history, logits[:, 0], s.time + 1, running, ended, closed)

    return jax.lax.while_loop(unfinished, step, state)


@jax.jit
def _closed(s: BeamState, beams: BeamSettings) -> jax.Array:
    """Whether the pools of a prompt are final, bool (B,).

    A pool is final if it is full and early_stop is True, or if it is full and the best running hypothesis does not rank
    above the worst ended one. The rank of a running hypothesis assumes its current length if early_stop is False (a
    heuristic: the log-probability can only fall, but a positive length penalty raises the rank of longer texts), and
    the maximum length if early_stop is "never" and the penalty is positive, which is exact.
    """
    longest = (jnp.asarray(beams.early_stop) == 2) & (jnp.asarray(beams.length_penalty) > 0)
    length = jnp.where(longest, beams.limit, jnp.maximum(s.time, 1)).astype(jnp.float32)
    best_running = jnp.max(s.running.total, -1) / length**beams.length_penalty
    worst_ended = jnp.min(s.ended.rank, -1)
    final = jnp.isfinite(worst_ended) & ((jnp.asarray(beams.early_stop) == 1) | (best_running <= worst_ended))
    final |= jnp.all(jnp.isneginf(s.running.total), -1)  # no running hypothesis is left
    return s.closed | jnp.all(final, -1)


@jax.jit
def _end(s: BeamState, beams: BeamSettings, mask: jax.Array) -> BeamState:
    """Moves the running hypotheses selected by `mask`, bool (B, G, K), to the pools that are not final."""
    mask = mask & ~s.closed[:, None, None]
    rank = s.running.total / jnp.maximum(s.time, 1).astype(jnp.float32) ** beams.length_penalty
    ended = _merge(s.ended, dataclasses.replace(s.running, rank=jnp.where(mask, rank, -jnp.inf)))
    running = dataclasses.replace(s.running, total=jnp.where(mask, -jnp.inf, s.running.total))
    return dataclasses.replace(s, ended=ended, running=running)


def _merge(ended: Hypotheses, others: Hypotheses) -> Hypotheses:
    """The K best hypotheses of both in each group."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 2), ended, others)
    _, best = jax.lax.top_k(both.rank, ended.rank.shape[-1])
    return jax.tree.map(lambda x: _gather(x, best), both)


def _gather(array: jax.Array, index: jax.Array) -> jax.Array:
    """Selects the entries of (B, G, K, ...) at the indices int32 (B, G, M): (B, G, M, ...)."""
    return jax.vmap(jax.vmap(lambda x, i: x[i]))(array, index)


def _first(mask: jax.Array, count: int) -> jax.Array:
    """Indices of the first `count` true entries of each row of bool (B, C), followed by false entries if needed."""
    return jnp.argsort(~mask, -1, stable=True)[:, :count]


def _results(ended: Hypotheses, eos: np.ndarray, options: DecodingOptions, stop: StopFn | None) -> list[list[Beam]]:
    rows = []
    for row in range(len(ended.rank)):
        rank = ended.rank[row].reshape(-1)
        ids, logs = (x[row].reshape(len(rank), -1) for x in (ended.ids, ended.logs))
        lengths = ended.length[row].reshape(-1)
        beams = []
        for i in np.argsort(-rank, kind="stable")[: options.n]:
            if not np.isfinite(rank[i]):
                continue  # fewer hypotheses exist than requested
            tokens, n = ids[i, : lengths[i]].tolist(), int(lengths[i])
            at_eos = bool(tokens[-1] in eos)
            reason = "eos" if at_eos else "stop" if stop and stop(row, tokens, n - 1) is not None else "length"
            generated = Generated(tokens[: n - at_eos], logs[i, :n].tolist(), reason)
            beams.append(Beam(generated, float(rank[i])))
        rows.append(beams)
    return rows
