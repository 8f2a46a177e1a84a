"""Speculative decoding: a cheap draft proposes the next tokens, and the model verifies them in one forward pass.

The output has exactly the distribution of the model, for any draft (Leviathan et al. 2022, arXiv:2211.17192,
algorithm 1). The draft is a smaller model with the same tokenizer, or prompt look-up, which proposes the tokens that
followed the previous occurrence of the last few tokens. The embedding tables of model and draft may be padded to
different sizes.

Rows accept different numbers of draft tokens, so each row has its own write position in the cache. Rejected draft
tokens are overwritten by the next round before any query attends to them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import trees
from llm_jax.decoding import compiled, continuations, loop, steps
from llm_jax.decoding.continuations import Generated, StopFn
from llm_jax.decoding.samplers import History, Sampler, draw
from llm_jax.decoding.steps import DrawSettings
from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.model.attention import KVCache, TokenMetadata
from llm_jax.model.transformer import Transformer, check_length

# Letters of shapes: B batch, P padded prompt, S slots, K draft tokens of a round, N new tokens, V vocabulary.

_MATCH = 3  # maximum number of last tokens that prompt look-up searches for


@trees.register
@dataclasses.dataclass(frozen=True)
class SpeculativeState:
    """The carry of the loop, like `steps.DecodingState`, for rows of different lengths.

    Attributes:
      cache: keys and values of all tokens of the history except the last.
      draft_cache: the cache of the draft model; None for prompt look-up.
      rounds: int32 (), forward passes of the model so far.
    """

    cache: KVCache
    draft_cache: KVCache | None
    history: History
    rounds: jax.Array
    ids: jax.Array
    log_probabilities: jax.Array
    alternative_ids: jax.Array
    alternative_logs: jax.Array
    count: jax.Array
    done: jax.Array


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    draft: tuple[Transformer, Any] | None,
    draft_tokens: int,
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    eos: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    stop: StopFn | None = None,
    watch: Callable[[list[Generated]], None] | None = None,
) -> list[Generated]:
    """Continues every prompt, with the same distribution as `loop.generate`, but other samples for the same seed.

    For other arguments, see `loop.generate`.

    Args:
      draft: the draft model and its parameters, or None for prompt look-up.
      draft_tokens: tokens proposed in each round.

    Raises:
      UserError: see `loop.generate`; the texts exceed the positions of the draft, or are so long that the frequencies
        of the model's positions change with every token.
    """
    if draft_tokens < 1:
        raise UserError(f"--draft_tokens={draft_tokens}; expected at least 1")
    model, params = loop.unrolled(model, params)
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    loop.check(model, prompts, max_new_tokens, seeds)
    before = jnp.asarray([len(prompt) for prompt in prompts])
    longest = int(before.max()) + max_new_tokens + draft_tokens
    if positions.make(model.config).changes_keys(before, before + max_new_tokens + draft_tokens).any():
        position = model.config.position
        raise UserError(
            f"--draft cannot be used beyond model.position.original_length={position.original_length} tokens with "
            f"scaling={position.scaling}, which changes the frequencies at every length; prompt, new tokens and draft "
            f"tokens are {longest}"
        )
    if draft is not None:
        draft = loop.unrolled(*draft)
        check_length(draft[0].config, max(map(len, prompts)) + max_new_tokens)
    draft_model, draft_params = draft or (None, None)
    settings = loop.draw_settings(model, sampler, seeds, eos, vocab_size)
    prompts_BP, lengths = steps.padded(prompts, params)
    capacity = steps.bucket(max_new_tokens)
    state = _start(model, draft_model, capacity, draft_tokens, params, draft_params, prompts_BP, lengths)

    def step(state: SpeculativeState, until: int) -> SpeculativeState:
        rounds = jnp.int32(until if stop or watch else max_new_tokens)  # every round adds at least one token
        return _advance(model, draft_model, draft_tokens, params, draft_params, settings, state, rounds, max_new_tokens)

    return continuations.run(step, state, settings.eos, max_new_tokens, stop, watch)


@compiled.jit(static=(0, 1, 2))
def _start(
    model: Transformer,
    draft_model: Transformer | None,
    capacity: int,
    draft_tokens: int,
    params: Any,
    draft_params: Any,
    prompts_BP: jax.Array,
    lengths: jax.Array,
) -> SpeculativeState:
    b, p = prompts_BP.shape
    slots = p + capacity + draft_tokens + 1  # the last round may propose tokens past the end

    def prefilled(model: Transformer, params: Any) -> KVCache:
        _, cache = loop.prefill(model, params, _known(model, prompts_BP), lengths, slots)
        return dataclasses.replace(cache, index=lengths - 1)

    return SpeculativeState(
        prefilled(model, params),
        None if draft_model is None else prefilled(draft_model, draft_params),
        History(jnp.pad(prompts_BP, ((0, 0), (0, slots - p))), lengths, lengths),
        jnp.int32(0),
        jnp.zeros((b, capacity + draft_tokens + 1), jnp.int32),
        jnp.zeros((b, capacity + draft_tokens + 1), jnp.float32),
        jnp.zeros((b, capacity, 0), jnp.int32),
        jnp.zeros((b, capacity, 0), jnp.float32),
        jnp.zeros(b, jnp.int32),
        jnp.zeros(b, bool),
    )


@compiled.jit(static=(0, 1), donate=(5,))
def _advance(
    model: Transformer,
    draft_model: Transformer | None,
    draft_tokens: int,
    params: Any,
    draft_params: Any,
    settings: DrawSettings,
    state: SpeculativeState,
    rounds: jax.Array,
    limit: jax.Array,
) -> SpeculativeState:
    """Runs `rounds` rounds (counted from the start), or until all rows are done; rows end at `limit` tokens."""

    def unfinished(s: SpeculativeState) -> jax.Array:
        return (s.rounds < rounds) & ~jnp.all(s.done)

    def step(s: SpeculativeState) -> SpeculativeState:
        b, vocab_size = len(s.done), model.config.vocab_size
        keys = jax.vmap(jax.random.fold_in, (0, None))(settings.keys, s.rounds)
        keys = jax.vmap(lambda key: jax.random.split(key, draft_tokens + 2))(keys)  # (B, K + 2)
        last = jnp.take_along_axis(s.history.ids, s.history.length[:, None] - 1, 1)
        bound = s.history.prompt + limit
        if draft_model is None:
            proposed, q_logs, draft_cache = _look_up(s.history, draft_tokens), None, None
        else:
            proposed, q_logs, draft_cache = _propose(
                draft_model,
                draft_params,
                settings,
                s.history,
                last,
                s.draft_cache,
                keys,
                draft_tokens,
                bound,
                vocab_size,
            )
        positions = _positions(s.history.length - 1, draft_tokens + 1, s.done, bound)
        logits, cache = steps.apply(model, params, jnp.concatenate([last, proposed], 1), positions, s.cache)
        logs_BKV = jax.nn.log_softmax(logits.astype(jnp.float32))
        checked, history = [], s.history
        for i in range(draft_tokens + 1):  # filters depend on the tokens before each position
            checked.append(settings.sampler.log_probabilities(settings.mask_padded_vocab(logits[:, i]), history))
            if i < draft_tokens:
                history = steps.append(history, proposed[:, i], jnp.ones(b, bool))
        p_logs = jnp.stack(checked, 1)
        accepted = _accept(p_logs, q_logs, proposed, keys[:, draft_tokens])
        residual = _residual(p_logs, q_logs, proposed, accepted)
        extra = draw(residual, keys[:, draft_tokens + 1])
        places = jnp.arange(draft_tokens + 1)
        new = jnp.where(places == accepted[:, None], extra[:, None], jnp.pad(proposed, ((0, 0), (0, 1))))
        # A row is extended by the accepted tokens and one more token, up to EOS and the limit.
        ends = settings.is_eos(new) & (places <= accepted[:, None])
        accepted_count = jnp.where(jnp.any(ends, 1), jnp.argmax(ends, 1), accepted) + 1
        accepted_count = jnp.where(s.done, 0, jnp.minimum(accepted_count, limit - s.count))
        last_end = jnp.any(ends & (places < accepted_count[:, None]), 1)
        logs = jnp.take_along_axis(logs_BKV, new[..., None], -1)[..., 0]
        history = History(
            _write(s.history.ids, new, s.history.length), s.history.length + accepted_count, s.history.prompt
        )
        count = s.count + accepted_count
        return SpeculativeState(
            dataclasses.replace(cache, index=history.length - 1),
            draft_cache and dataclasses.replace(draft_cache, index=history.length - 1),
            history,
            s.rounds + 1,
            _write(s.ids, new, s.count),
            _write(s.log_probabilities, logs, s.count),
            s.alternative_ids,
            s.alternative_logs,
            count,
            s.done | last_end | (count >= limit),
        )

    return jax.lax.while_loop(unfinished, step, state)


def _propose(
    model: Transformer,
    params: Any,
    settings: DrawSettings,
    history: History,
    last: jax.Array,
    cache: Any,
    keys: jax.Array,
    draft_tokens: int,
    bound: jax.Array,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array, Any]:
    """Samples K tokens from the draft model, among the ids below `vocab_size`, V, of the verifying model.

    Returns:
      Ids int32 (B, K), log-probabilities (B, K, V), and the cache of the draft model including all K tokens.
    """

    def step(carry, key):
        cache, history, ids = carry
        positions = _positions(history.length - 1, 1, jnp.zeros(len(ids), bool), bound)
        logits, cache = steps.apply(model, params, _known(model, ids), positions, cache)
        logits = _resized(logits[:, 0], vocab_size)
        logs = settings.sampler.log_probabilities(settings.mask_padded_vocab(logits), history)
        drawn = draw(logs, key)
        return (cache, steps.append(history, drawn, jnp.ones(len(ids), bool)), drawn[:, None]), (drawn, logs)

    # One more pass than draft tokens, so that the cache also contains the last token.
    order = jnp.swapaxes(keys, 0, 1)[: draft_tokens + 1]
    (cache, _, _), (drawn, logs) = jax.lax.scan(step, (cache, history, last), order)
    return jnp.swapaxes(drawn, 0, 1)[:, :draft_tokens], jnp.swapaxes(logs, 0, 1)[:, :draft_tokens], cache


def _known(model: Transformer, ids: jax.Array) -> jax.Array:
    """Replaces ids outside the embedding table of a draft by its last id; any proposal keeps the output exact."""
    return jnp.minimum(ids, model.config.vocab_size - 1)


def _resized(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Converts logits (B, W) of a draft to logits (B, V): ids from V on are dropped, and ids from W on are -inf."""
    padding = max(0, vocab_size - logits.shape[-1])
    return jnp.pad(logits[:, :vocab_size], ((0, 0), (0, padding)), constant_values=-jnp.inf)


def _look_up(history: History, draft_tokens: int) -> jax.Array:
    """Proposes the tokens after the most recent match of the longest possible suffix of the history: int32 (B, K).

    Without a match, the tokens are arbitrary; wrong proposals are rejected.
    """
    slots = history.ids.shape[1]
    places, length = jnp.arange(slots), history.length[:, None]
    run, same = jnp.zeros(history.ids.shape, jnp.int32), places < length - 1
    for i in range(_MATCH):
        last = jnp.take_along_axis(history.ids, jnp.maximum(length - 1 - i, 0), 1)
        same &= (jnp.roll(history.ids, i, axis=1) == last) & (places >= i)
        run += same
    best = jnp.argmax(run * slots + places, 1)[:, None]
    return jnp.take_along_axis(history.ids, jnp.minimum(best + 1 + jnp.arange(draft_tokens), slots - 1), 1)


def _accept(p_logs: jax.Array, q_logs: jax.Array | None, proposed: jax.Array, keys: jax.Array) -> jax.Array:
    """Number of accepted tokens per row, each accepted with probability min(1, p / q): int32 (B,).

    Args:
      p_logs: (B, K + 1, V), log-probabilities under the model.
      q_logs: (B, K, V), under the draft model; None for a deterministic proposal (q = 1).
      proposed: int32 (B, K).
    """
    count = proposed.shape[1]
    p = jnp.take_along_axis(p_logs[:, :count], proposed[..., None], -1)[..., 0]
    q = 0.0 if q_logs is None else jnp.take_along_axis(q_logs, proposed[..., None], -1)[..., 0]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
    return jnp.sum(jnp.cumprod(uniform < jnp.exp(p - q), 1), 1).astype(jnp.int32)


def _residual(p_logs: jax.Array, q_logs: jax.Array | None, proposed: jax.Array, accepted: jax.Array) -> jax.Array:
    """Log of the unnormalized distribution of the token after the accepted tokens, (B, V).

    The distribution is max(0, p - q) after a rejection, and p if all tokens were accepted.
    """
    row = jnp.arange(len(accepted))
    p = jnp.exp(p_logs[row, accepted])
    place = jnp.minimum(accepted, proposed.shape[1] - 1)
    if q_logs is None:
        q = jax.nn.one_hot(proposed[row, place], p.shape[-1])
    else:
        q = jnp.exp(q_logs[row, place])
    residual = jnp.where((accepted < proposed.shape[1])[:, None], jnp.maximum(p - q, 0.0), p)
    # With equal distributions, a rejection is only possible by rounding, and then no probability mass is left.
    return jnp.log(jnp.where(jnp.sum(residual, -1, keepdims=True) > 0, residual, p))


def _positions(first: jax.Array, count: int, done: jax.Array, bound: jax.Array) -> TokenMetadata:
    """Returns `count` tokens from positions `first`, int32 (B,), on; tokens at or beyond `bound` are never used."""
    places = first[:, None] + jnp.arange(count)
    segments = jnp.broadcast_to((~done).astype(jnp.int32)[:, None], places.shape)
    return TokenMetadata(jnp.minimum(places, bound[:, None] - 1), segments)


def _write(rows: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes new (B, K) into rows (B, N) at start int32 (B,)."""
    return jax.vmap(lambda r, n, s: jax.lax.dynamic_update_slice(r, n, (s,)))(rows, new, start)
