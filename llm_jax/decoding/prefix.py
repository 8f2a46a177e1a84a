"""Reuses the cache of keys and values from request to request: only the tokens after the common prefix are prefilled.

    prefix = PrefixCache()
    loop.generate(model, params, [first], sampler, max_new_tokens=8, prefix=prefix)
    loop.generate(model, params, [second], sampler, max_new_tokens=8, prefix=prefix)

In this cache, the slot of a token is its position. A request that shares its first tokens with the previous request
overwrites the slots after the common prefix; later slots are masked.
"""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.decoding import compiled, steps
from llm_jax.decoding.samplers import History
from llm_jax.decoding.steps import DecodingState, DrawSettings
from llm_jax.model import positions
from llm_jax.model.attention import KVCache, TokenMetadata
from llm_jax.model.transformer import Transformer, init_cache

# Letters of shapes: B batch, here 1; P padded new tokens, S cache slots.


class PrefixCache:
    """The cached keys and values of one row, for requests to the same model with a common prefix.

    A request reuses nothing if its model differs, or if its weights are not the same arrays (for example other
    adapters, or layers that were unstacked again).

    Attributes:
      reused: number of tokens of the last prompt that were in the cache.
      prefilled: number of tokens of the last prompt that were computed.
    """

    def __init__(self) -> None:
        self.reused = self.prefilled = 0
        self._state: DecodingState | None = None
        self._model: Transformer | None = None
        self._weights: list[weakref.ref[jax.Array]] = []  # weak references, so that the weights can be freed

    def start(
        self,
        model: Transformer,
        params: Any,
        settings: DrawSettings,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        alternatives: int = 0,
    ) -> DecodingState:
        """Like `loop.start`, for one prompt. The last token of the prompt is always computed, for its logits."""
        (prompt,) = prompts
        state, self._state = self._state, None  # `_extend` donates its cache
        leaves = jax.tree.leaves(params)
        if model != self._model or not self._has(leaves):
            state, self._model, self._weights = None, model, [weakref.ref(leaf) for leaf in leaves]
        cached = cached_ids(state) if state else []
        common = common_length(cached, prompt[:-1])
        if positions.make(model.config).changes_keys(jnp.asarray(len(cached)), jnp.asarray(common)):
            common = 0  # the keys were computed with the frequencies of a longer text
        new_BP, _ = steps.padded([prompt[common:]], params)
        end, capacity = common + new_BP.shape[1], steps.bucket(max_new_tokens)
        if state is None:
            # Copies, because the same array must not be donated twice.
            cache = jax.tree.map(jnp.copy, init_cache(model.config, 1, steps.bucket(end) + capacity))
        elif state.cache.tokens.positions.shape[1] < end + capacity:
            cache = resized(state.cache, steps.bucket(end) + capacity)
        else:
            cache = state.cache
        history = np.zeros(cache.tokens.positions.shape, np.int32)
        history[0, : len(prompt)] = prompt
        self.reused, self.prefilled = common, len(prompt) - common
        count = np.int32(self.prefilled)
        return _extend(model, capacity, alternatives, params, settings, cache, history, np.int32(common), new_BP, count)

    def _has(self, leaves: Sequence[jax.Array]) -> bool:
        """Whether the keys and values were computed with these weights."""
        pairs = zip(self._weights, leaves, strict=False)
        return len(self._weights) == len(leaves) and all(weight() is leaf for weight, leaf in pairs)

    def store(self, state: DecodingState) -> None:
        """Stores the state after the last token; the next request reuses the memory of its cache."""
        self._state = state


def cached_ids(state: DecodingState) -> list[int]:
    """The token ids whose keys and values are in the cache of a state of `PrefixCache.start`."""
    return np.asarray(state.history.ids)[0, : int(state.cache.index)].tolist()


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def resized(cache: KVCache, slots: int) -> KVCache:
    """Extends the cache to `slots` slots; the new ones are empty."""

    def pad(array: jax.Array) -> jax.Array:
        return jnp.pad(array, [(0, 0), (0, slots - array.shape[1]), *[(0, 0)] * (array.ndim - 2)])

    return KVCache(jax.tree.map(pad, cache.tokens), cache.index, jax.tree.map(pad, cache.layers))


@compiled.jit(static=(0, 1), donate=(4,))
def _extend(
    model: Transformer,
    capacity: int,
    alternatives: int,
    params: Any,
    settings: DrawSettings,
    cache: KVCache,
    history_BS: jax.Array,
    common: jax.Array,
    new_BP: jax.Array,
    count: jax.Array,
) -> DecodingState:
    """Prefills tokens after the first `common` ones of the cache, and draws a token.

    Args:
      capacity: number of tokens that can be drawn.
      cache: the cache of one row, in which the slot of a token is its position.
      history_BS: int32 (1, S), the whole prompt, padded.
      common: int32 (), length of the common prefix of the cached tokens and the prompt.
      new_BP: int32 (1, P), the other tokens of the prompt, padded.
      count: int32 (), number of tokens in `new_BP`.
    """
    length = common + count
    is_common = jnp.arange(cache.tokens.positions.shape[1]) < common
    slots = dataclasses.replace(cache.tokens, segments=jnp.where(is_common, cache.tokens.segments, 0))
    index_BP = common + jnp.arange(new_BP.shape[1], dtype=jnp.int32)[None]
    tokens = TokenMetadata(jnp.minimum(index_BP, length - 1), (index_BP < length).astype(jnp.int32))
    x_BPD, cache = steps.apply(model, params, new_BP, tokens, KVCache(slots, common, cache.layers), method="features")
    logits = steps.last_logits(model, params, x_BPD, count[None])
    cache = dataclasses.replace(cache, index=length)  # the next token is written over the padding
    history = History(history_BS, length[None], length[None])
    return steps.draw_token(steps.empty_state(cache, history, logits, capacity, alternatives), settings)
