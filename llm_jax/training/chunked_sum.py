"""Sums over the positions of a batch in chunks of positions, which bounds the memory of the terms."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.parallel import mesh as mesh_lib

Chunk = Mapping[str, jax.Array]  # arrays (B, C, ...)

# Letters of shapes: B batch, T time.


def sum_of_rows(
    part: Callable[[Chunk], jax.Array], chunk: int, tokens: Mapping[str, jax.Array], sparse: bool = False
) -> jax.Array:
    """Returns the sum of part(tokens) over chunks of the second axis, float32 (B,).

    The backward pass recomputes every chunk, so the intermediate values of `part` are not stored.

    Args:
      part: function of the arrays (B, C, ...) of one chunk that returns the sum of every row, float32 (B,).
      chunk: C, a divisor of T; 0: one chunk of all positions.
      tokens: arrays (B, T, ...), including "mask".
      sparse: whether few positions have mask 1; these are moved to the front of the row and empty chunks are skipped.
    """
    rows, length = tokens["mask"].shape
    if chunk in (0, length):
        return part(tokens)
    if sparse:
        order = jnp.argsort(1 - tokens["mask"], 1)
        tokens = {k: jnp.take_along_axis(a, jnp.expand_dims(order, range(2, a.ndim)), 1) for k, a in tokens.items()}

    if mesh_lib.current_axis_sizes().get(mesh_lib.CONTEXT, 1) > 1:  # so that every chunk has positions on every device

        def chunked(array: jax.Array) -> jax.Array:
            return jnp.moveaxis(array.reshape(rows, chunk, length // chunk, *array.shape[2:]), 2, 0)
    else:

        def chunked(array: jax.Array) -> jax.Array:
            return jnp.moveaxis(array.reshape(rows, length // chunk, chunk, *array.shape[2:]), 1, 0)

    chunks = jax.tree.map(chunked, dict(tokens))
    if sparse:
        function, captured = jax.closure_convert(part, jax.tree.map(lambda a: a[0], chunks))
        return _sum_of_first(function, chunks, dict(enumerate(captured)))

    def body(total: jax.Array, tokens: Chunk) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(part)(tokens), None

    return jax.lax.scan(body, jnp.zeros(rows, jnp.float32), chunks)[0]


# Why a custom gradient: `lax.cond` allocates residuals of every weight's size even for the chunks that it skips, and
# JAX cannot differentiate a loop with a dynamic number of iterations.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_first(part: Callable[..., jax.Array], chunks: Chunk, captured: Mapping[int, jax.Array]) -> jax.Array:
    """The sum of part(chunk, *captured) over the chunks up to the last one with a counted position."""

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + part(_at(chunks, i), *captured.values())

    return jax.lax.fori_loop(0, _num_counted(chunks), body, jnp.zeros(chunks["mask"].shape[1], jnp.float32))


def _sum_of_first_forward(part, chunks, captured):
    varying, constant = (
        [{k: a.value for k, a in d.items() if a.perturbed == flag} for d in (chunks, captured)]
        for flag in (True, False)
    )
    return _sum_of_first(part, *map(_merge, varying, constant)), (varying, constant)


def _sum_of_first_backward(part, saved, g):
    varying, constant = saved
    chunks = _merge(varying[0], constant[0])

    def body(i, sums):
        def chunk_sum(chunk, captured):
            return part(chunk | _at(constant[0], i), *_merge(captured, constant[1]).values())

        d_chunk, d_captured = jax.vjp(chunk_sum, _at(varying[0], i), varying[1])[1](g)
        return (
            {k: jax.lax.dynamic_update_index_in_dim(sums[0][k], d, i, 0) for k, d in d_chunk.items()},
            jax.tree.map(jnp.add, sums[1], d_captured),
        )

    zeros = jax.tree.map(jnp.zeros_like, tuple(varying))
    d_chunks, d_captured = jax.lax.fori_loop(0, _num_counted(chunks), body, zeros)
    return ({k: d_chunks.get(k) for k in chunks}, {k: d_captured.get(k) for k in _merge(varying[1], constant[1])})


_sum_of_first.defvjp(_sum_of_first_forward, _sum_of_first_backward, symbolic_zeros=True)


def _merge(first: dict[Any, jax.Array], second: dict[Any, jax.Array]) -> dict[Any, jax.Array]:
    return dict(sorted((first | second).items()))


def _at(chunks: Chunk, i: jax.Array) -> dict[str, jax.Array]:
    return {name: jax.lax.dynamic_index_in_dim(array, i, 0, keepdims=False) for name, array in chunks.items()}


def _num_counted(chunks: Chunk) -> jax.Array:
    """The number of chunks up to the last one with a counted position, int32 ()."""
    counted = jnp.any(chunks["mask"] > 0, (1, 2))
    return jnp.max(jnp.where(counted, jnp.arange(1, len(counted) + 1), 0))
