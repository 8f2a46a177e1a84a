"""Attention: who sees whom, and the cache of keys and values.

Who sees whom is decided by positions and segments alone, so that padding on either side, packed
documents, sliding windows and a cache with empty slots are one rule: a query sees a key of its own
segment (0 is nothing: padding, or an empty slot) at its own position or before, within the window.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.kernels import matmul
from llm_jax.model import attention_kernels, positions
from llm_jax.model.layers import CAPTURE, Module, Norm
from llm_jax.parallel import mesh as mesh_lib

# Letters of shapes: B batch, T queries, S keys, D width, N heads, K key/value heads, G heads per
# key/value head (N = K G), H head width.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where tokens stand: both int32 (B, T). Segment 0 is padding, seen by nobody."""

    positions: jax.Array
    segments: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, for `slots` tokens a row.

    Attributes:
      tokens: where the token of each slot stands, (B, slots); segment 0 marks an empty slot.
      index: int32 (), the next slot to be written, the same in every row; or (B,), one for each.
      layers: {"key", "value"} of (B, slots, K, H) per layer, in the layout of the parameters: in the compute
        dtype; or (`model.kv_cache=int8`) int8 codes, and {"key_scale", "value_scale"}, float16 (B, slots, K, 1).
    """

    tokens: Tokens
    index: jax.Array
    layers: dict[str, Any]


def visible(queries: Tokens, keys: Tokens, window: int | None, causal: bool = True) -> jax.Array:
    """bool (B, T, S): may query t see key s?"""
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (keys.segments[:, None, :] > 0)
    if causal:
        seen &= distance >= 0
    return seen & (jnp.abs(distance) < window) if window is not None else seen


def lengths_so_far(tokens: Tokens, keys: Tokens) -> jax.Array:
    """int32 (B, T): one past the last position among the keys of each token's segment."""
    same = tokens.segments[:, :, None] == keys.segments[:, None, :]
    return jnp.max(jnp.where(same, keys.positions[:, None, :], 0), -1) + 1


def write(slots: jax.Array, new: jax.Array, index: jax.Array | None) -> jax.Array:
    """Puts new (B, T, ...) into slots (B, S, ...) from `index` on: int32 () or (B,)."""
    start, rest, new = jnp.asarray(index), (0,) * (slots.ndim - 2), new.astype(slots.dtype)
    if start.ndim == 0:
        return jax.lax.dynamic_update_slice(slots, new, (0, start, *rest))
    return jax.vmap(lambda s, n, i: jax.lax.dynamic_update_slice(s, n, (i, *rest)))(slots, new, start)


def remember(cache: dict[str, jax.Array], new: dict[str, jax.Array], index: jax.Array | None) -> dict[str, jax.Array]:
    """One layer's cache with `new` arrays (B, T, K, H) by name in the slots from `index` on."""
    parts = {}
    for name, values in new.items():
        if f"{name}_scale" in cache:
            scale = (jnp.max(jnp.abs(values.astype(jnp.float32)), -1, keepdims=True) / 127).astype(jnp.float16)
            parts[name] = matmul.round_to_int8(values, scale.astype(jnp.float32))
            parts[f"{name}_scale"] = scale
        else:
            parts[name] = values.astype(cache[name].dtype)
    return {name: write(cache[name], part, index) for name, part in parts.items()}


def recall(cache: dict[str, jax.Array], name: str, dtype: Any) -> jax.Array:
    """(B, S, K, H) of a layer's cache, in `dtype`."""
    values = cache[name]
    if f"{name}_scale" in cache:
        values = values.astype(jnp.float32) * cache[f"{name}_scale"].astype(jnp.float32)
    return values.astype(dtype)


class Attention(Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    window: int | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        queries: Tokens,
        keys: Tokens,
        bias_BNTS: jax.Array | None,
        cache: dict[str, jax.Array] | None,
        index: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """x -> (what it adds, the updated cache).

        Args:
          queries: where the tokens of x stand.
          keys: where all keys stand: `queries` itself without a cache, else the cache's slots.
          cache: keys and values of (B, S, K, H), see `KVCache`, or None.
          index: int32 () or (B,), the slot that the first token of x goes to.
        """
        c = self.config
        scheme, h = positions.make(c, local=self.window is not None), positions.head_dim(c)
        q = self.linear(x_BTD, "query", c.num_heads * h, bias=c.qkv_bias).reshape(*x_BTD.shape[:2], c.num_heads, h)
        k = self.linear(x_BTD, "key", c.num_kv_heads * h, bias=c.qkv_bias).reshape(*x_BTD.shape[:2], c.num_kv_heads, h)
        v = self.linear(x_BTD, "value", c.num_kv_heads * h, bias=c.qkv_bias).reshape(
            *x_BTD.shape[:2], c.num_kv_heads, h
        )
        if c.qk_norm:
            q, k = Norm(c, kind="rms", name="query_norm")(q), Norm(c, kind="rms", name="key_norm")(k)
        if c.attention_scale:  # the product divides by sqrt(h)
            q = (q * (c.attention_scale * h**0.5)).astype(q.dtype)
        lengths = lengths_so_far(queries, keys) if scheme.rotates_cache else None
        q = scheme.rotate(q, queries.positions, lengths)
        if not scheme.rotates_cache:
            k = scheme.rotate(k, queries.positions, None)
        if cache is not None:
            cache = remember(cache, {"key": k, "value": v}, index)
            k, v = recall(cache, "key", q.dtype), recall(cache, "value", q.dtype)
        if scheme.rotates_cache:
            k = scheme.rotate(k, keys.positions, lengths_so_far(keys, keys))
        shapes = scheme.declare_layer().items()
        table = {name: self.weight(f"position_{name}", nn.initializers.normal(0.02), shape) for name, shape in shapes}
        own = scheme.keys(q, queries.positions, keys.positions, table)
        if own is not None:
            bias_BNTS = own if bias_BNTS is None else own + bias_BNTS
        if self.is_mutable_collection(CAPTURE) and not self.is_initializing():
            mask = visible(queries, keys, self.window, c.causal)
            found = attention_kernels.probabilities(q, k, mask, bias_BNTS, c.attention_softcap)
            self.sow(CAPTURE, "probabilities", found)
        add_values = scheme.values(queries.positions, keys.positions, table)
        name = "plain"
        if not self.is_initializing():  # which is on one token
            name, _ = attention_kernels.choose(c, jax.default_backend(), q, k, cache is not None, mesh_lib.in_use())
        if name == "splash":
            out = attention_kernels.splash(q, k, v, queries.segments, self.window, c.causal, c.attention_softcap)
        else:
            mask = visible(queries, keys, self.window, c.causal)
            if add_values is not None:
                out = attention_kernels.attend_adding(q, k, v, mask, bias_BNTS, add_values, c.attention_softcap)
            elif name in ("xla", "cudnn"):
                out = attention_kernels.fused(name, q, k, v, mask, bias_BNTS)
            else:
                out = attention_kernels.attend(q, k, v, mask, bias_BNTS, c.attention_softcap)
        return self.linear(out.reshape(*x_BTD.shape[:2], -1), "out", c.width, depth_scale=True), cache
