"""Attention, its mask, and the cache of keys and values.

The mask depends on positions and segments alone: a query attends to keys of its own segment, at its own position or
before it (at any position in an encoder), within the window. Segment 0 marks padding and empty slots of the cache,
to which no query attends. This rule covers padding on either side, packed documents, sliding windows and partly filled
caches.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax import trees
from llm_jax.kernels import matmul, target
from llm_jax.kernels.cpu_attention import Cached
from llm_jax.model import attention_kernels, positions
from llm_jax.model.layers import ACTIVATION_STATS, CAPTURE, Module, Norm
from llm_jax.parallel import mesh as mesh_lib

# Letters of shapes: B batch, T queries, S keys, D width, N heads, K key/value heads, G heads per
# key/value head (N = K G), H head width.


@trees.register
@dataclasses.dataclass(frozen=True)
class TokenMetadata:
    """Positions and segments of tokens.

    Attributes:
      positions: int32 (B, T).
      segments: int32 (B, T); tokens attend within their segment, and 0 is padding.
      ids: int32 (B, T), the token ids, in the cache of a position scheme that `depends_on_length`; otherwise None.
    """

    positions: jax.Array
    segments: jax.Array
    ids: jax.Array | None = None


@trees.register
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of earlier tokens, with a fixed number of slots per row.

    Attributes:
      tokens: positions, segments and (for some schemes) ids of the cached tokens, int32 (B, slots); segment 0 marks an
        empty slot.
      index: the next slot to write: int32 () for all rows, or (B,).
      layers: for each layer, in the layout of the parameters, {"key", "value"} of (B, slots, K, H) in the compute
        dtype. With `model.kv_cache=int8` they are int8 codes, with {"key_scale", "value_scale"}, float16
        (B, slots, K, 1).
    """

    tokens: TokenMetadata
    index: jax.Array
    layers: dict[str, Any]


def attention_mask(queries: TokenMetadata, keys: TokenMetadata, window: int | None, causal: bool = True) -> jax.Array:
    """The attention mask, bool (B, T, S): whether query t attends to key s.

    Args:
      queries: positions and segments (B, T).
      keys: positions and segments (B, S).
      window: keys at this distance from the query or farther are masked; None for no window.
      causal: whether keys after the query are masked.
    """
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    mask = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (keys.segments[:, None, :] > 0)
    if causal:
        mask &= distance >= 0
    return mask & (jnp.abs(distance) < window) if window is not None else mask


def lengths_so_far(tokens: TokenMetadata, keys: TokenMetadata) -> jax.Array:
    """The current length of the segment of each token, int32 (B, T): the largest position among its keys, plus 1."""
    same_segment = tokens.segments[:, :, None] == keys.segments[:, None, :]
    return jnp.max(jnp.where(same_segment, keys.positions[:, None, :], 0), -1) + 1


def write(slots: jax.Array, new: jax.Array, index: jax.Array | None) -> jax.Array:
    """Writes new (B, T, ...) to slots (B, S, ...) from slot `index` on, int32 () or (B,), in the dtype of `slots`."""
    start, zeros, new = jnp.asarray(index), (0,) * (slots.ndim - 2), new.astype(slots.dtype)
    if start.ndim == 0:
        return jax.lax.dynamic_update_slice(slots, new, (0, start, *zeros))
    return jax.vmap(lambda s, n, i: jax.lax.dynamic_update_slice(s, n, (i, *zeros)))(slots, new, start)


def write_tokens(cache: KVCache, new: TokenMetadata) -> TokenMetadata:
    """Returns the tokens of the cache after `new`, int32 (B, T) each, has been written to its next slots."""
    return jax.tree.map(lambda slots, values: write(slots, values, cache.index), cache.tokens, new)


def write_layer(
    cache: dict[str, jax.Array], new: dict[str, jax.Array], index: jax.Array | None
) -> dict[str, jax.Array]:
    """Writes `new`, {name: (B, T, K, H)}, to the cache of a layer from slot `index` on; as codes if it is int8."""
    arrays = {}
    for name, values in new.items():
        if f"{name}_scale" in cache:
            scale = (jnp.max(jnp.abs(values.astype(jnp.float32)), -1, keepdims=True) / 127).astype(jnp.float16)
            arrays[name] = matmul.round_to_int8(values, scale.astype(jnp.float32))
            arrays[f"{name}_scale"] = scale
        else:
            arrays[name] = values.astype(cache[name].dtype)
    return {name: write(cache[name], array, index) for name, array in arrays.items()}


def stored_layer(cache: dict[str, jax.Array], name: str) -> Cached:
    """The keys or values of the cache of a layer as they are stored; `name` is "key" or "value"."""
    return (cache[name], cache[f"{name}_scale"]) if f"{name}_scale" in cache else cache[name]


def expand(stored: Cached, dtype: Any) -> jax.Array:
    """The keys or values (B, S, K, H) of `stored_layer` in `dtype`."""
    if isinstance(stored, tuple):
        codes, scale = stored
        return (codes.astype(jnp.float32) * scale.astype(jnp.float32)).astype(dtype)
    return stored.astype(dtype)


def read_layer(cache: dict[str, jax.Array], name: str, dtype: Any) -> jax.Array:
    """The keys or values (B, S, K, H) of the cache of a layer, in `dtype`; `name` is "key" or "value"."""
    return expand(stored_layer(cache, name), dtype)


class Attention(Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245).

    Attributes:
      kind: kind of the layer, see `model.layer_pattern`.
    """

    kind: str = "global"

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        queries: TokenMetadata,
        keys: TokenMetadata,
        bias_BNTS: jax.Array | None,
        cache: dict[str, jax.Array] | None,
        index: jax.Array | None,
        depth: jax.Array | int | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Applies attention to x.

        Args:
          x_BTD: float, the input, normalized or not depending on `model.norm_placement`.
          queries: positions and segments of the tokens of x.
          keys: positions and segments of all keys: `queries` itself without a cache, otherwise of the slots.
          bias_BNTS: float32 bias of the scores, whose leading axis may be 1, or None.
          cache: the cache of this layer, see `KVCache.layers`, or None.
          index: int32 () or (B,), the slot of the first token of x.
          depth: int32 (), the index of the layer, which only `model.scale_attention_by_depth` needs.

        Returns:
          (the output (B, T, D) in the dtype of x, the updated cache or None).

        Raises:
          UserError: `model.attention_kernel` names an implementation that cannot be used.
        """
        c = self.config
        scheme, h = positions.make(c, self.kind), positions.head_dim(c)
        window = c.window if self.kind == "local" else None
        bias = c.bias or c.attention_bias
        heads = {"query": c.num_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
        q, k, v = self.linears(x_BTD, {name: n * h for name, n in heads.items()}, bias=bias or c.qkv_bias)
        if c.qk_norm and c.qk_norm_axis == "width":
            q, k = self._norm(q, "query_norm"), self._norm(k, "key_norm")
        q, k, v = (x.reshape(*x.shape[:2], -1, h) for x in (q, k, v))
        if c.qk_norm and c.qk_norm_axis == "head":
            q, k = self._norm(q, "query_norm"), self._norm(k, "key_norm")
        if c.attention_scale:  # the kernels divide by sqrt(h)
            q = (q * (c.attention_scale * h**0.5)).astype(q.dtype)
        if c.scale_attention_by_depth:
            assert depth is not None
            q = (q / (depth + 1)).astype(q.dtype)
        lengths = lengths_so_far(queries, keys) if scheme.depends_on_length else None
        q, k = scheme.rotate(q, queries.positions, lengths), scheme.rotate(k, queries.positions, lengths)
        if cache is None and mesh_lib.current_axis_sizes().get(mesh_lib.CONTEXT, 1) > 1:
            # Queries stay on their device; keys and values of all shards are gathered.
            q = mesh_lib.constrain(q, mesh_lib.BATCH, mesh_lib.CONTEXT, mesh_lib.HEADS, None)
            k, v = (mesh_lib.constrain(x, mesh_lib.BATCH, None, mesh_lib.HEADS, None) for x in (k, v))
        if cache is not None:
            cache = write_layer(cache, {"key": k, "value": v}, index)
            k, v = read_layer(cache, "key", q.dtype), read_layer(cache, "value", q.dtype)
        if self.kind == "nope":
            bias_BNTS = None
        shapes = scheme.declare_layer().items()
        table = {name: self.weight(f"position_{name}", nn.initializers.normal(0.02), shape) for name, shape in shapes}
        layer_bias = scheme.keys(q, queries.positions, keys.positions, table)
        if layer_bias is not None:
            bias_BNTS = layer_bias if bias_BNTS is None else layer_bias + bias_BNTS
        if bias_BNTS is not None:  # a scheme may return axes of size 1, which the backward pass does not support
            size = (q.shape[2], q.shape[1], keys.positions.shape[1])
            bias_BNTS = jnp.broadcast_to(bias_BNTS, (bias_BNTS.shape[0], *size))
        if self.is_mutable_collection(CAPTURE) and not self.is_initializing():
            mask = attention_mask(queries, keys, window, c.causal)
            probabilities = attention_kernels.probabilities(q, k, mask, bias_BNTS, c.attention_softcap)
            self.sow(CAPTURE, "probabilities", probabilities)
        if self.is_mutable_collection(ACTIVATION_STATS) and not self.is_initializing():
            mask = attention_mask(queries, keys, window, c.causal)
            self.sow(ACTIVATION_STATS, "entropy", attention_kernels.entropy(q, k, mask, bias_BNTS, c.attention_softcap))
        add_values = scheme.values(queries.positions, keys.positions, table)
        name = "plain"
        if not self.is_initializing():  # initialization runs on a single token
            name, _ = attention_kernels.choose(
                c, target.platform(), q, k, cache is not None, mesh_lib.current_axis_sizes()
            )
        if name == "splash":
            out = attention_kernels.splash(q, k, v, queries.segments, window, c.causal, c.attention_softcap)
        else:
            mask = attention_mask(queries, keys, window, c.causal)
            if add_values is not None:
                out = attention_kernels.attend_adding(q, k, v, mask, bias_BNTS, add_values, c.attention_softcap)
            elif name in ("xla", "cudnn"):
                out = attention_kernels.fused(name, q, k, v, mask, bias_BNTS)
            elif cache is not None:
                keys_BSKH, values_BSKH = stored_layer(cache, "key"), stored_layer(cache, "value")
                read = functools.partial(expand, dtype=q.dtype)
                out = attention_kernels.attend_cached(
                    q, keys_BSKH, values_BSKH, mask, bias_BNTS, c.attention_softcap, read
                )
            else:
                out = attention_kernels.attend(q, k, v, mask, bias_BNTS, c.attention_softcap)
        return self.linear(out.reshape(*x_BTD.shape[:2], -1), "out", c.width, depth_scale=True, bias=bias), cache

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        return Norm(self.config, kind=self.config.qk_norm_kind, name=name)(x)
