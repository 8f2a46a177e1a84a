"""Attention: who sees whom, the product itself, and the cache of keys and values.

Who sees whom is decided by positions and segments alone, so that padding on either side, packed
documents, sliding windows and a cache with empty slots are one rule: a query sees a key of its own
segment (0 is nothing: padding, or an empty slot) at its own position or before, within the window.
"""

import dataclasses
from collections.abc import Callable
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


@jax.custom_vjp
def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, bias_BNTS: jax.Array | None
) -> jax.Array:
    """softmax(q k / sqrt(H) + bias) v under the mask -> (B, T, N, H); scores and softmax in float32.

    The backward pass computes the scores again from the row sums (Dao et al. 2022, FlashAttention,
    arXiv:2205.14135, appendix B), so that nothing of size T x S is kept between the passes. The
    leading axis of the bias is B or 1. A query that sees nothing (padding) gets the mean of all
    values, which nobody reads.
    """
    return _attend_forward(q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS)[0]


def _attend_forward(q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS):
    length, groups = q_BTNH.shape[1], k_BSKH.shape[2]
    q, k, v = (_by_group(x, groups) for x in (q_BTNH, k_BSKH, v_BSKH))
    scores = _scores(q, k, mask_BTS, bias_BNTS)
    top = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, -1, keepdims=True)
    out = (_batched(weights.astype(v.dtype), v, 3, 2) / total).astype(q_BTNH.dtype)
    return _by_token(out, length), (q, k, v, mask_BTS, bias_BNTS, out, top + jnp.log(total))


def _attend_backward(saved, g_BTNH):
    q, k, v, mask_BTS, bias_BNTS, out, log_total = saved
    g = _by_group(g_BTNH, k.shape[1])
    shares = jnp.exp(_scores(q, k, mask_BTS, bias_BNTS) - log_total)
    wide = shares.dtype
    d_shares = _batched(g, v, 3, 3)
    d_scores = shares * (d_shares - jnp.sum(g.astype(wide) * out.astype(wide), -1, keepdims=True))
    d_bias = None
    if bias_BNTS is not None:
        per_row = d_scores.reshape(mask_BTS.shape[0], -1, *mask_BTS.shape[1:])
        d_bias = (per_row if bias_BNTS.shape[0] > 1 else jnp.sum(per_row, 0, keepdims=True)).astype(bias_BNTS.dtype)
    d_scores = (d_scores * q.shape[-1] ** -0.5).astype(g.dtype)
    dq, dk = _batched(d_scores, k, 3, 2), _batched(d_scores, q, 2, 2)
    dv = _batched(shares.astype(g.dtype), g, 2, 2)
    queries, keys = mask_BTS.shape[1:]
    return (
        _by_token(dq, queries).astype(q.dtype),
        _by_token(dk, keys).astype(k.dtype),
        _by_token(dv, keys).astype(v.dtype),
        None,
        d_bias,
    )


attend.defvjp(_attend_forward, _attend_backward)


def attend_adding(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    bias_BNTS: jax.Array | None,
    add: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """`attend` plus what `add` makes of the attention shares (B, N, T, S); it keeps the shares for the gradient."""
    b, t, n, _ = q_BTNH.shape
    q, k, v = (_by_group(x, k_BSKH.shape[2]) for x in (q_BTNH, k_BSKH, v_BSKH))
    shares = jax.nn.softmax(_scores(q, k, mask_BTS, bias_BNTS), -1).astype(v.dtype)
    out = _by_token(_batched(shares, v, 3, 2).astype(q_BTNH.dtype), t)
    return out + add(shares.reshape(b, n, t, -1)).astype(out.dtype)


def _scores(q, k, mask_BTS, bias_BNTS):
    """(B, K, G T, S) in float32 (or wider): what a query may not see is far below what it may."""
    b, t, s = mask_BTS.shape
    scores = (_batched(q, k, 3, 3) * q.shape[-1] ** -0.5).reshape(b, -1, t, s)
    if bias_BNTS is not None:
        scores += bias_BNTS
    return (scores + jnp.where(mask_BTS, 0.0, -1e30)[:, None]).reshape(b, k.shape[1], -1, s)


def _batched(a, b, a_axis, b_axis):
    """A product over one axis each, batched over the first two, with float32 (or wider) sums."""
    wide = jnp.promote_types(jnp.float32, a.dtype)
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0, 1), (0, 1))), preferred_element_type=wide)


def _by_group(x_BTNH, groups):
    """(B, T, N, H) -> (B, K, G T, H): plain batched matrices, three times as fast on CPU as an einsum."""
    b, t, n, h = x_BTNH.shape
    return x_BTNH.reshape(b, t, groups, n // groups, h).transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, h)


def _by_token(x, length):
    """The inverse of `_by_group`."""
    b, groups, rows, h = x.shape
    per_group = rows // length
    return x.reshape(b, groups, per_group, length, h).transpose(0, 3, 1, 2, 4).reshape(b, length, -1, h)


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
        lengths = lengths_so_far(queries, keys) if scheme.rotates_cache else None
        q = scheme.rotate(q, queries.positions, lengths)
        if not scheme.rotates_cache:
            k = scheme.rotate(k, queries.positions, None)
        if cache is not None:
            start = (0, jnp.asarray(index), 0, 0)
            cache = {
                "key": jax.lax.dynamic_update_slice(cache["key"], k.astype(cache["key"].dtype), start),
                "value": jax.lax.dynamic_update_slice(cache["value"], v.astype(cache["value"].dtype), start),
            }
            k, v = cache["key"].astype(q.dtype), cache["value"].astype(q.dtype)
        if scheme.rotates_cache:
            k = scheme.rotate(k, keys.positions, lengths_so_far(keys, keys))
        shapes = scheme.declare_layer().items()
        table = {name: self.weight(f"position_{name}", nn.initializers.normal(0.02), shape) for name, shape in shapes}
        own = scheme.keys(q, queries.positions, keys.positions, table)
        if own is not None:
            bias_BNTS = own if bias_BNTS is None else own + bias_BNTS
        mask = visible(queries, keys, self.window, c.causal)
        add_values = scheme.values(queries.positions, keys.positions, table)
        if add_values is None:
            out = attend(q, k, v, mask, bias_BNTS)
        else:
            out = attend_adding(q, k, v, mask, bias_BNTS, add_values)
        return self.linear(out.reshape(*x_BTD.shape[:2], -1), "out", c.width, depth_scale=True), cache
