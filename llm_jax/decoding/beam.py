"""Beam search, plain and diverse, for prompts of any lengths.

The K beams of each of G groups go on together as B G K rows of one cache. Ended texts stand apart in a pool
of K a group, ranked by log-probability / length^penalty, EOS counted.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import weights
from llm_jax.decoding import loop
from llm_jax.decoding.loop import Generated, Rules, Stop
from llm_jax.decoding.options import Options
from llm_jax.decoding.samplers import History
from llm_jax.model.attention import KVCache, Tokens
from llm_jax.model.transformer import Transformer

# Letters of shapes: B batch, G groups, K beams a group, C candidates, R rows = B G K, N new tokens, V vocabulary.


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A beam and its rank: log-probability / length^penalty, of what the filters leave."""

    made: Generated
    score: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts and their log-probabilities.

    Attributes:
      total: (B, G, K), the sum over a text of what the filters leave; -inf for no text.
      rank: (B, G, K), what ended texts are ordered by.
      ids, logs: (B, G, K, N), its tokens and their log-probabilities under the model itself.
      length: int32 (B, G, K).
    """

    total: jax.Array
    rank: jax.Array
    ids: jax.Array
    logs: jax.Array
    length: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """`running` texts have `time` tokens each, `logits` (R, V) are those of their next."""

    cache: KVCache
    history: History
    logits: jax.Array
    time: jax.Array
    running: Texts
    ended: Texts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Goal:
    """What a search is for; all numbers, so that none compiles again."""

    length_penalty: float | jax.Array
    diversity: float | jax.Array
    early_stop: bool | jax.Array
    n: int | jax.Array
    limit: int | jax.Array


def search(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    eos: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    stop: Stop | None = None,
) -> list[list[Ranked]]:
    """The `options.n` best texts of a beam search for every prompt, best first.

    The arguments are those of `loop.generate`; of the options, those about beams and the penalties count.
    """
    groups, limit = options.beam_groups, options.max_new_tokens
    model, params = loop.unrolled(model, params)
    loop.check(model, prompts, limit, [0] * len(prompts))
    rules = loop.make_rules(model, options.sampler(), [0], eos, vocab_size)
    goal = Goal(options.length_penalty, options.diversity, options.early_stop, options.n, limit)
    prompts_BP, lengths = loop.padded(prompts)
    state = _start(model, groups, options.beams // groups, loop.bucket(limit), params, prompts_BP, lengths)
    for until in range(1, limit + 1) if stop else (limit,):
        state = _advance(model, params, rules, goal, state, jnp.int32(until))
        if stop:
            ids = np.asarray(state.running.ids)
            stopped = np.zeros(ids.shape[:3], bool)
            for place in np.argwhere(np.isfinite(np.asarray(state.running.total))):
                stopped[tuple(place)] = stop(0, ids[tuple(place)][:until].tolist()) is not None
            state = _retire(state, goal, jnp.asarray(stopped))
        if bool(jnp.all(_finished(state, goal))):
            break
    state = _retire(state, goal, jnp.isfinite(state.running.total) & ~_finished(state, goal)[:, None, None])
    return _results(jax.device_get(state.ended), np.asarray(rules.eos), options, stop)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(
    model: Transformer, groups: int, beams: int, room: int, params: Any, prompts_BP: jax.Array, lengths: jax.Array
) -> State:
    b, p = prompts_BP.shape
    x_BPD, cache = loop.prefill(model, params, prompts_BP, lengths, p + room)
    every = jnp.repeat(jnp.arange(b), groups * beams)
    history = History(jnp.pad(prompts_BP, ((0, 0), (0, room))), lengths, lengths)
    shape = (b, groups, beams)
    nothing = Texts(
        jnp.full(shape, -jnp.inf),
        jnp.full(shape, -jnp.inf),
        jnp.zeros((*shape, room), jnp.int32),
        jnp.zeros((*shape, room), jnp.float32),
        jnp.zeros(shape, jnp.int32),
    )
    first = dataclasses.replace(nothing, total=nothing.total.at[:, :, 0].set(0.0))  # the others would be its copies
    logits = loop.last_logits(model, params, x_BPD, lengths)
    rows = jax.tree.map(lambda x: x[every], (cache.tokens, cache.layers, history, logits))
    return State(KVCache(rows[0], cache.index, rows[1]), rows[2], rows[3], jnp.int32(0), first, nothing)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _advance(model: Transformer, params: Any, rules: Rules, goal: Goal, state: State, until: jax.Array) -> State:
    """Goes on until the texts have `until` tokens or no better can come."""
    b, groups, beams = state.running.total.shape
    params = weights.repeat_rows(params, groups * beams)

    def going(s: State) -> jax.Array:
        return (s.time < until) & ~jnp.all(_finished(s, goal))

    def step(s: State) -> State:
        logs_RV = jax.nn.log_softmax(s.logits.astype(jnp.float32))
        scores = rules.sampler.log_probabilities(rules.allow(s.logits), s.history)
        scores = scores.reshape(b, groups, beams, -1)
        vocab = scores.shape[-1]
        count = min(beams * (1 + rules.eos.shape[0]), beams * vocab)  # so that enough do not end
        chosen = jnp.zeros((b, vocab))  # how many earlier groups chose each token in this step
        totals, parents, tokens = [], [], []
        for group in range(groups):
            ranked = s.running.total[:, group, :, None] + scores[:, group]
            # Vijayakumar et al. 2016, arXiv:1610.02424, equation 5, with the Hamming diversity of 5.1.
            _, places = jax.lax.top_k((ranked - goal.diversity * chosen[:, None]).reshape(b, -1), count)
            totals.append(jnp.take_along_axis(ranked.reshape(b, -1), places, 1))
            parents.append(places // vocab)
            tokens.append((places % vocab).astype(jnp.int32))
            taken = _first(~rules.ends(tokens[-1]), beams)
            picked = jnp.take_along_axis(tokens[-1], taken, 1)
            chosen = chosen.at[jnp.arange(b)[:, None], picked].add(1.0)
        total, parent, token = (jnp.stack(x, 1) for x in (totals, parents, tokens))  # (B, G, C)
        ends = rules.ends(token)
        own = jnp.take_along_axis(logs_RV.reshape(b, groups, -1), parent * vocab + token, -1)
        grown = Texts(
            total,
            total / (s.time + 1.0) ** goal.length_penalty,
            _choose(s.running.ids, parent).at[..., s.time].set(token),
            _choose(s.running.logs, parent).at[..., s.time].set(own),
            jnp.broadcast_to(s.time + 1, token.shape),
        )
        taken = jnp.stack([_first(~ends[:, g], beams) for g in range(groups)], 1)
        running = jax.tree.map(lambda x: _choose(x, taken), grown)
        # Where fewer than K candidates go on, ended ones fill the places: they count as no text.
        running = dataclasses.replace(running, total=jnp.where(_choose(ends, taken), -jnp.inf, running.total))
        over = _finished(s, goal)[:, None, None]  # what comes after does not count, whatever the other rows do
        ended = _merge(s.ended, dataclasses.replace(grown, rank=jnp.where(ends & ~over, grown.rank, -jnp.inf)))
        starts = jnp.arange(b * groups).reshape(b, groups, 1) * beams
        rows = (starts + jnp.take_along_axis(parent, taken, -1)).reshape(-1)
        ids = jnp.take_along_axis(token, taken, -1).reshape(-1)
        tokens_R, layers, history = jax.tree.map(lambda x: x[rows], (s.cache.tokens, s.cache.layers, s.history))
        where = Tokens(history.length[:, None], jnp.ones_like(ids)[:, None])
        cache = KVCache(tokens_R, s.cache.index, layers)
        logits, cache = loop.apply(model, params, ids[:, None], where, cache)
        history = loop.append(history, ids, jnp.ones_like(ids, bool))
        return State(cache, history, logits[:, 0], s.time + 1, running, ended)

    return jax.lax.while_loop(going, step, state)


def _finished(s: State, goal: Goal) -> jax.Array:
    """bool (B,): no running text can still come before an ended one (or there are n, with early_stop)."""
    # A total can only fall. Divided by length^penalty it is largest at the longest length, or, for a
    # negative penalty, at the next.
    length = jnp.where(jnp.asarray(goal.length_penalty) > 0, goal.limit, s.time + 1).astype(jnp.float32)
    hope = jnp.max(s.running.total, -1) / length**goal.length_penalty
    enough = jnp.sum(jnp.isfinite(s.ended.rank), (1, 2)) >= goal.n
    exact = jnp.all(jnp.min(s.ended.rank, -1) >= hope, -1)
    return exact | (jnp.asarray(goal.early_stop) & enough)


@jax.jit
def _retire(s: State, goal: Goal, which: jax.Array) -> State:
    """Moves the running texts that `which` (B, G, K) names to the ended ones."""
    rank = s.running.total / jnp.maximum(s.time, 1).astype(jnp.float32) ** goal.length_penalty
    ended = _merge(s.ended, dataclasses.replace(s.running, rank=jnp.where(which, rank, -jnp.inf)))
    running = dataclasses.replace(s.running, total=jnp.where(which, -jnp.inf, s.running.total))
    return dataclasses.replace(s, ended=ended, running=running)


def _merge(ended: Texts, others: Texts) -> Texts:
    """The best K of both, in each group."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 2), ended, others)
    _, best = jax.lax.top_k(both.rank, ended.rank.shape[-1])
    return jax.tree.map(lambda x: _choose(x, best), both)


def _choose(array: jax.Array, index: jax.Array) -> jax.Array:
    """(B, G, K, ...) and places int32 (B, G, M) -> (B, G, M, ...)."""
    return jax.vmap(jax.vmap(lambda x, i: x[i]))(array, index)


def _first(which: jax.Array, count: int) -> jax.Array:
    """Places of the first `count` true entries of each row of bool (B, C), then of others."""
    return jnp.argsort(~which, -1, stable=True)[:, :count]


def _results(ended: Texts, eos: np.ndarray, options: Options, stop: Stop | None) -> list[list[Ranked]]:
    found = []
    for row in range(len(ended.rank)):
        rank = ended.rank[row].reshape(-1)
        ids, logs = (x[row].reshape(len(rank), -1) for x in (ended.ids, ended.logs))
        lengths = ended.length[row].reshape(-1)
        beams = []
        for i in np.argsort(-rank, kind="stable")[: options.n]:
            if not np.isfinite(rank[i]):
                continue  # fewer texts than asked for exist
            text, n = ids[i, : lengths[i]].tolist(), int(lengths[i])
            at_eos = bool(text[-1] in eos)
            why = "eos" if at_eos else "stop" if stop and stop(0, text) is not None else "length"
            beams.append(Ranked(Generated(text[: n - at_eos], logs[i, :n].tolist(), why), float(rank[i])))
        found.append(beams)
    return found
