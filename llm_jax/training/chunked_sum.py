"""Sums over the positions of a batch, some of them at a time, so that what each is made of is never there whole."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Chunk = Mapping[str, jax.Array]  # of the positions of some rows

# Letters of shapes: B batch, T time.


def sum_of_rows(
    part: Callable[[Chunk], jax.Array], chunk: int, tokens: Mapping[str, jax.Array], sparse: bool = False
) -> jax.Array:
    """The sum of part(tokens), float32 (B,), over chunks of their second axis, `chunk` long; 0: at once.

    A chunk is computed again in the backward pass: what `part` makes of it is not kept.

    Args:
      tokens: arrays (B, T, ...), "mask" among them.
      sparse: few positions count. They go to the front of their rows, and chunks in which none does are not computed.
    """
    rows, length = tokens["mask"].shape
    if chunk in (0, length):
        return part(tokens)
    if sparse:
        order = jnp.argsort(1 - tokens["mask"], 1)
        tokens = {k: jnp.take_along_axis(a, jnp.expand_dims(order, range(2, a.ndim)), 1) for k, a in tokens.items()}

    def chunked(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(rows, length // chunk, chunk, *array.shape[2:]), 1, 0)

    chunks = jax.tree.map(chunked, dict(tokens))
    if sparse:
        function, captured = jax.closure_convert(part, jax.tree.map(lambda a: a[0], chunks))
        return _sum_of_first(function, chunks, dict(enumerate(captured)))

    def body(total: jax.Array, tokens: Chunk) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(part)(tokens), None

    return jax.lax.scan(body, jnp.zeros(rows, jnp.float32), chunks)[0]


# Why a custom gradient: what a conditional keeps for the backward pass it also keeps, as zeros of every weight's
# size, for the chunks that it skips; and a loop of as many turns as there are chunks that count has none.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_first(part: Callable[..., jax.Array], chunks: Chunk, captured: Mapping[int, jax.Array]) -> jax.Array:
    """The sum of part(chunk, *captured) over the chunks up to the last that counts."""

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + part(_at(chunks, i), *captured.values())

    return jax.lax.fori_loop(0, _counting(chunks), body, jnp.zeros(chunks["mask"].shape[1], jnp.float32))


def _sum_of_first_forward(part, chunks, captured):
    moving, fixed = (
        [{k: a.value for k, a in d.items() if a.perturbed == of} for d in (chunks, captured)] for of in (True, False)
    )
    return _sum_of_first(part, *map(_joined, moving, fixed)), (moving, fixed)


def _sum_of_first_backward(part, saved, g):
    moving, fixed = saved
    chunks = _joined(moving[0], fixed[0])

    def body(i, sums):
        def one(chunk, captured):
            return part(chunk | _at(fixed[0], i), *_joined(captured, fixed[1]).values())

        d_chunk, d_captured = jax.vjp(one, _at(moving[0], i), moving[1])[1](g)
        return (
            {k: jax.lax.dynamic_update_index_in_dim(sums[0][k], d, i, 0) for k, d in d_chunk.items()},
            jax.tree.map(jnp.add, sums[1], d_captured),
        )

    d_chunks, d_captured = jax.lax.fori_loop(0, _counting(chunks), body, jax.tree.map(jnp.zeros_like, tuple(moving)))
    return ({k: d_chunks.get(k) for k in chunks}, {k: d_captured.get(k) for k in _joined(moving[1], fixed[1])})


_sum_of_first.defvjp(_sum_of_first_forward, _sum_of_first_backward, symbolic_zeros=True)


def _joined(some: dict[Any, jax.Array], others: dict[Any, jax.Array]) -> dict[Any, jax.Array]:
    return dict(sorted((some | others).items()))


def _at(chunks: Chunk, i: jax.Array) -> dict[str, jax.Array]:
    return {name: jax.lax.dynamic_index_in_dim(array, i, 0, keepdims=False) for name, array in chunks.items()}


def _counting(chunks: Chunk) -> jax.Array:
    """How many chunks there are up to the last in which a position counts."""
    some = jnp.any(chunks["mask"] > 0, (1, 2))
    return jnp.max(jnp.where(some, jnp.arange(1, len(some) + 1), 0))
