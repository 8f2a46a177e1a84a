"""Token-by-token generation: a compiled prefill that draws the first token, and a compiled loop that draws the others.

Prompts are padded on the right to a bucket, and the KV cache has a bucket of slots, so that other lengths reuse the
compiled code. Padding tokens have segment id 0, which attention masks out; generated tokens continue each row's own
positions.

    state = start(model, params, settings, prompts, ...)         prefills, and draws the first token
    state = advance(model, params, settings, state, until)       draws more tokens, up to `until` new tokens in total
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import trees
from llm_jax.decoding import compiled, continuations, steps
from llm_jax.decoding.continuations import Generated, StopFn
from llm_jax.decoding.prefix import PrefixCache
from llm_jax.decoding.samplers import History, Sampler
from llm_jax.decoding.steps import DecodingState, DrawSettings
from llm_jax.errors import UserError
from llm_jax.model.attention import KVCache, TokenMetadata
from llm_jax.model.transformer import Transformer, check_length, init_cache

# Letters of shapes: B batch, P padded prompt, S cache slots, N new tokens, A alternatives, D width, V vocabulary.


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    eos: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    alternatives: int = 0,
    stop: StopFn | None = None,
    watch: Callable[[list[Generated]], Any] | None = None,
    prefix: PrefixCache | None = None,
) -> list[Generated]:
    """Continues every prompt.

    Args:
      params: in the layout of `model.config`; scanned layers are unstacked first, which copies them. If they are
        sharded over a mesh, the cache is sharded by heads and rows, and the text equals the text of one device up to
        rounding.
      prompts: token ids, at least one per prompt; lengths may differ.
      seeds: one per row, below 2^32, so that a row's text does not depend on the others. Default: 0, 1, ...
      eos: the ids that end a row. None: a row ends at `max_new_tokens` only.
      vocab_size: ids at or above it are never drawn (for a model whose vocabulary is padded). Default: the model's.
      alternatives: number of most likely tokens to record at each step.
      stop: called with the generated ids of each row; see `StopFn`.
      watch: called after every token with the rows generated so far; if it returns a true value, all rows end.
      prefix: `prefix.PrefixCache`, for one prompt: the cache of the previous request, which this request updates.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, max_new_tokens below 1, or a length beyond the
        model's positions.
    """
    model, params = unrolled(model, params)
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    check(model, prompts, max_new_tokens, seeds)
    settings = draw_settings(model, sampler, seeds, eos, vocab_size)
    state = (prefix.start if prefix else start)(model, params, settings, prompts, max_new_tokens, alternatives)

    def step(current: DecodingState, until: int) -> DecodingState:
        nonlocal state
        if until > 1:  # `start` has drawn the first token; do not compile the loop if no other is needed
            state = advance(model, params, settings, current, jnp.int32(until))
        return state

    rows = continuations.run(step, state, settings.eos, max_new_tokens, stop, watch)
    if prefix:
        prefix.store(state)
    return rows


def unrolled(model: Transformer, params: Any) -> tuple[Transformer, Any]:
    """Converts scanned layers to one entry per layer. A scan would copy the weights of each layer at every token."""
    if not model.config.scan_layers:
        return model, params
    return model.clone(config=dataclasses.replace(model.config, scan_layers=False)), trees.unstack(params)


def draw_settings(
    model: Transformer,
    sampler: Sampler,
    seeds: Sequence[int],
    eos: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> DrawSettings:
    """Converts arguments of `generate` to arguments of the compiled loop."""
    eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    eos_ids += [-1] * (4 - len(eos_ids) if len(eos_ids) < 4 else -len(eos_ids) % 4)  # few shapes, few compilations
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return DrawSettings(
        sampler, keys, jnp.asarray(eos_ids, jnp.int32), jnp.int32(vocab_size or model.config.vocab_size)
    )


def start(
    model: Transformer,
    params: Any,
    settings: DrawSettings,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    alternatives: int = 0,
) -> DecodingState:
    """Prefills a cache for the prompts and `max_new_tokens` tokens, and samples the first token."""
    prompts_BP, lengths = steps.padded(prompts, params)
    capacity = steps.bucket(max_new_tokens)
    return prefill_and_draw(model, capacity, alternatives, params, settings, prompts_BP, lengths)


def prefill(
    model: Transformer, params: Any, prompts_BP: jax.Array, lengths: jax.Array, slots: int
) -> tuple[jax.Array, KVCache]:
    """Runs the model on padded prompts. For use under `jax.jit`.

    Args:
      prompts_BP: int32 (B, P).
      lengths: int32 (B,).
      slots: size of the cache.

    Returns:
      Features (B, P, D) in the compute dtype, and the cache.
    """
    b, p = prompts_BP.shape
    index_BP = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32), (b, p))
    segments = (index_BP < lengths[:, None]).astype(jnp.int32)
    tokens = TokenMetadata(jnp.minimum(index_BP, lengths[:, None] - 1), segments)
    return steps.apply(model, params, prompts_BP, tokens, init_cache(model.config, b, slots), method="features")


@compiled.jit(static=(0, 1))
def prefill_and_draw(
    model: Transformer,
    capacity: int,
    alternatives: int,
    params: Any,
    settings: DrawSettings,
    prompts_BP: jax.Array,
    lengths: jax.Array,
) -> DecodingState:
    """`start` for padded prompts: ids int32 (B, P) and lengths int32 (B,)."""
    return steps.draw_token(begin(model, capacity, alternatives, params, prompts_BP, lengths)[1], settings)


def begin(
    model: Transformer, capacity: int, alternatives: int, params: Any, prompts_BP: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, DecodingState]:
    """Prefills padded prompts; returns their features (B, P, D), and the state from which the first token is drawn.

    For use under `jax.jit`.
    """
    x_BPD, cache = prefill(model, params, prompts_BP, lengths, prompts_BP.shape[1] + capacity)
    history = History(jnp.pad(prompts_BP, ((0, 0), (0, capacity))), lengths, lengths)
    return x_BPD, steps.empty_state(
        cache, history, steps.last_logits(model, params, x_BPD, lengths), capacity, alternatives
    )


@compiled.jit(donate=(2,))
def advance(
    model: Transformer, params: Any, settings: DrawSettings, state: DecodingState, until: jax.Array
) -> DecodingState:
    """Draws tokens until `until` (int32 ()) tokens have been drawn or all rows are done. Donates `state`."""

    def unfinished(s: DecodingState) -> jax.Array:
        return (s.time < until) & ~jnp.all(s.done)

    def step(s: DecodingState) -> DecodingState:
        last_B1 = jax.lax.dynamic_slice_in_dim(s.ids, s.time - 1, 1, axis=1)
        tokens = TokenMetadata((s.history.prompt + s.time - 1)[:, None], (~s.done).astype(jnp.int32)[:, None])
        logits, cache = steps.apply(model, params, last_B1, tokens, s.cache)
        return steps.draw_token(dataclasses.replace(s, logits=logits[:, 0], cache=cache), settings)

    return jax.lax.while_loop(unfinished, step, state)


def check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int]) -> None:
    """Raises UserError for a request that the model does not support."""
    if not len(prompts):
        raise UserError("there is no prompt; expected at least one")
    if not all(len(prompt) for prompt in prompts):
        raise UserError("a prompt is empty; expected at least one token, such as BOS")
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={max_new_tokens}; expected at least 1")
    if len(seeds) != len(prompts) or any(not 0 <= seed < 2**32 for seed in seeds):
        raise UserError(
            f"seeds={list(seeds)[:4]}; expected a number from 0 to 2^32 - 1 for each of {len(prompts)} rows"
        )
    vocab_size = model.config.vocab_size
    if any(not 0 <= i < vocab_size for prompt in prompts for i in prompt):
        raise UserError(f"a prompt has an id outside the model's vocabulary of {vocab_size}")
    check_length(model.config, max(map(len, prompts)) + max_new_tokens)
