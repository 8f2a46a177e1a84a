"""Attention: who sees whom, the product itself, and the cache of keys and values.

Who sees whom is decided by positions and segments alone, so that padding on either side, packed
documents, sliding windows and a cache with empty slots are one rule: a query sees a key of its own
segment (0 is nothing: padding, or an empty slot) at its own position or before, within the window.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.model import positions
from llm_jax.model.layers import Module, Norm

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
class Cache:
    """Keys and values of the tokens so far, for `slots` tokens a row.

    Attributes:
      tokens: where the token of each slot stands, (B, slots); segment 0 marks an empty slot.
      index: int32 (), the next slot to be written, the same in every row.
      layers: {"key", "value"} of (B, slots, K, H) per layer, in the layout of the parameters.
    """

    tokens: Tokens
    index: jax.Array
    layers: dict[str, Any]


def visible(queries: Tokens, keys: Tokens, window: int | None) -> jax.Array:
    """bool (B, T, S): may query t see key s?"""
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    same = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (keys.segments[:, None, :] > 0)
    seen = same & (distance >= 0)
    return seen & (distance < window) if window is not None else seen


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, bias_BNTS: jax.Array | None
) -> jax.Array:
    """softmax(q k / sqrt(H) + bias) v under the mask -> (B, T, N, H); scores and softmax in float32.

    A query that sees nothing (padding) gets the mean of all values, which nobody reads.
    """
    b, t, n, h = q_BTNH.shape
    s, k = k_BSKH.shape[1:3]
    wide = jnp.promote_types(jnp.float32, q_BTNH.dtype)
    q_BTKGH = q_BTNH.reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=wide) * h**-0.5
    if bias_BNTS is not None:
        scores += bias_BNTS.reshape(-1, k, n // k, t, s)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(wide).min)
    shares = jax.nn.softmax(scores, -1).astype(v_BSKH.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", shares, v_BSKH, preferred_element_type=wide)
    return out.reshape(b, t, n, h).astype(q_BTNH.dtype)


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
          cache: {"key", "value"} of (B, S, K, H), or None.
          index: int32 (), the slot that the first token of x goes to.
        """
        c = self.config
        scheme, h = positions.make(c), positions.head_width(c)
        q = self.linear(x_BTD, "query", c.num_heads * h).reshape(*x_BTD.shape[:2], c.num_heads, h)
        k = self.linear(x_BTD, "key", c.num_kv_heads * h).reshape(*x_BTD.shape[:2], c.num_kv_heads, h)
        v = self.linear(x_BTD, "value", c.num_kv_heads * h).reshape(*x_BTD.shape[:2], c.num_kv_heads, h)
        if c.qk_norm:
            q, k = Norm(c, kind="rms", name="query_norm")(q), Norm(c, kind="rms", name="key_norm")(k)
        q, k = scheme.rotate(q, queries.positions), scheme.rotate(k, queries.positions)
        if cache is not None:
            start = (0, index, 0, 0)
            cache = {
                "key": jax.lax.dynamic_update_slice(cache["key"], k.astype(cache["key"].dtype), start),
                "value": jax.lax.dynamic_update_slice(cache["value"], v.astype(cache["value"].dtype), start),
            }
            k, v = cache["key"].astype(q.dtype), cache["value"].astype(q.dtype)
        out = attend(q, k, v, visible(queries, keys, self.window), bias_BNTS)
        return self.linear(out.reshape(*x_BTD.shape[:2], -1), "out", c.width, depth_scale=True), cache
