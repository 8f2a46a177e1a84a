"""Functions of the distance between a query and a key, from which position schemes build biases of the scores."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Letters of shapes: B batch, T queries, S keys, N heads, R distances.


def gather_by_offset(table_NR: jax.Array, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
    """table_NR[n, offset + limit] for every query and key, (B, N, T, S).

    R is 2 limit + 1, and offset is the key position minus the query position, clipped to [-limit, limit]. Where the
    tokens are both queries and keys, and positions increase by one or restart at 0 with a new segment, offsets between
    tokens of one segment depend on their indices alone. The result is then built from diagonals, which is much faster
    than a gather.
    """
    limit = table_NR.shape[1] // 2

    def gathered() -> jax.Array:
        indices_BTS = jnp.clip(k_positions[:, None, :] - q_positions[:, :, None], -limit, limit) + limit
        indices_BTS = jax.lax.optimization_barrier(indices_BTS)
        # Heads are the last axis of the gather, so that it copies all heads of an offset at once.
        return jnp.moveaxis(table_NR.T.at[indices_BTS].get(mode="promise_in_bounds"), -1, 1)

    if q_positions is not k_positions:
        return gathered()
    batch, length = q_positions.shape
    offsets = jnp.clip(jnp.arange(1 - length, length), -limit, limit) + limit

    def diagonals() -> jax.Array:
        return jnp.broadcast_to(_diagonals(table_NR[:, offsets]), (batch, table_NR.shape[0], length, length))

    previous, following = k_positions[:, :-1], k_positions[:, 1:]
    return jax.lax.cond(jnp.all((following == previous + 1) | (following == 0)), diagonals, gathered)


@jax.custom_vjp
def _diagonals(values_NR: jax.Array) -> jax.Array:
    """(N, 2 T - 1) -> (N, T, T), whose entry (t, s) is values[s - t + T - 1]."""
    length = (values_NR.shape[1] + 1) // 2
    row = functools.partial(jax.lax.dynamic_slice_in_dim, values_NR, slice_size=length, axis=1)
    return jax.vmap(lambda t: row(length - 1 - t), out_axes=1)(jnp.arange(length))


def _sum_diagonals(residuals: None, g_NTT: jax.Array) -> tuple[jax.Array]:
    """The gradient of `_diagonals`: the sums of the diagonals, (N, 2 T - 1)."""
    heads, length, _ = g_NTT.shape

    def add(t: jax.Array, total: jax.Array) -> jax.Array:  # row by row: a scatter is slower
        current = jax.lax.dynamic_slice_in_dim(total, length - 1 - t, length, 1)
        row = jax.lax.dynamic_index_in_dim(g_NTT, t, 1, keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(total, current + row, length - 1 - t, 1)

    return (jax.lax.fori_loop(0, length, add, jnp.zeros((heads, 2 * length - 1), g_NTT.dtype)),)


_diagonals.defvjp(lambda values_NR: (_diagonals(values_NR), None), _sum_diagonals)


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes of ALiBi, float64 (heads,).

    For a power of two n they are 2^(-8i/n), i = 1 .. n. For another number of heads they are the slopes of the next
    lower power of two, followed by every other slope of the next higher one (code of the paper,
    attention_with_linear_biases).
    """
    power = 2 ** int(np.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power), 2) / power)
    return np.concatenate([slopes, extra])


def t5_buckets(offset: jax.Array, buckets: int, max_distance: int, causal: bool) -> jax.Array:
    """The bucket of an offset, key position minus query position, as in relative_position_bucket of the T5 code.

    Small distances have a bucket each; buckets of larger distances grow logarithmically up to `max_distance`. A
    bidirectional model has half of the buckets for each sign of the offset.

    Args:
      offset: int32 (...).

    Returns:
      int32 (...), from 0 to buckets - 1.
    """
    start = jnp.int32(0)
    if not causal:
        buckets //= 2
        start = jnp.where(offset > 0, buckets, 0)
    distance = jnp.maximum(-offset, 0) if causal else jnp.abs(offset)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    logarithmic = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return start + jnp.where(distance < exact, distance, logarithmic)
