"""Products with quantized weights, by plain XLA: arrays in, arrays out."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llm_jax.kernels import number_formats
from llm_jax.kernels.number_formats import Scheme

# Letters of shapes: ... leading axes of x, C the contracted axis of the weight, F its free one.

_TILE = 2**16  # numbers of a tile that stays in a core's cache once it is expanded
_FEW = 16  # rows of x up to which a product is bound by reading the weight

Codes = tuple[jax.Array, jax.Array, jax.Array | None]  # codes, scale, offset


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(..., C) -> int8 codes (..., C) and float32 scales (..., 1): absmax of every row over 127."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    return round_to_int8(x, scale), scale


def round_to_int8(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale, rounded and clipped to +-127; 0 where the scale is."""
    return jnp.clip(jnp.round(x.astype(jnp.float32) / jnp.where(scale > 0, scale, 1.0)), -127, 127).astype(jnp.int8)


def integer_product(x: jax.Array, x_scale: jax.Array, codes: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """int8 (..., C) with a scale per row, times int8 codes with a scale per free axis -> float32 (..., F).

    Args:
      codes: (C, F) for axis -2, (F, C) for axis -1; sums are exact, in int32.
      scale: (1, F) or (F, 1), or (1, 1).
    """
    total = lax.dot_general(
        x, codes, (((x.ndim - 1,), (2 + axis,)), ((), ())), preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    return total * x_scale * scale.reshape(-1)


def expanded_product(x: jax.Array, codes: Codes, s: Scheme, axis: int, contracted: int, accumulate: str) -> jax.Array:
    """x (..., C) times the numbers that codes stand for -> (..., F), in x's dtype with sums in `accumulate`.

    A weight is expanded for the product and not kept. For few rows of x it is expanded tile by tile,
    so that it is written to and read from cache and not memory.

    Args:
      axis: that of the groups.
      contracted: that of the product, 0 or 1 of (I, O).
    """
    few = axis + 2 == contracted and x.size // x.shape[-1] <= _FEW and not _devices()
    if few and (tiles := _tiles(codes, s, contracted)):
        return _tiled(x, codes, s, axis, contracted, accumulate, tiles)
    return _product(x, number_formats.decode(*codes, s, axis), contracted, accumulate)


def _product(x, w, contracted, accumulate):
    return lax.dot_general(
        x, w.astype(x.dtype), (((x.ndim - 1,), (contracted,)), ((), ())), preferred_element_type=accumulate
    )


def _devices() -> bool:
    """Whether a mesh of several devices is in use: slices of an axis that is split would gather it."""
    return jax.sharding.get_abstract_mesh().size > 1


def _tiles(codes: Codes, s: Scheme, contracted: int) -> int:
    """Into how many tiles the first axis is cut (whole groups or rows each); 0: it is small, or cannot be."""
    rows, columns = number_formats.logical_shape(codes[0].shape, s, contracted - 2)
    units = codes[1].shape[0]
    if units == 1 and (contracted == 1 or number_formats.FORMATS[s.format].bits == 8):  # one scale serves any rows
        units = rows
    if rows * columns < 2 * _TILE or units == 1:
        return 0
    wanted = rows * columns // _TILE
    return next((n for n in range(wanted, units) if units % n == 0), units)


def _tiled(x, codes, s, axis, contracted, accumulate, tiles):
    def cut(a: jax.Array | None) -> jax.Array | None:
        if a is None or a.shape[0] == 1:
            return None
        return a.reshape(tiles, a.shape[0] // tiles, *a.shape[1:])

    def numbers(part: Any) -> jax.Array:
        tile, scale, offset = (a if p is None else p for p, a in zip(part, codes, strict=True))
        return number_formats.decode(tile, scale, offset, s, axis)

    parts = tuple(cut(a) for a in codes)
    if contracted == 1:  # a tile of rows gives a part of the result
        out = lax.map(lambda part: _product(x, numbers(part), contracted, accumulate), parts)  # (tiles, ..., F / tiles)
        return jnp.moveaxis(out, 0, -2).reshape(*x.shape[:-1], -1)

    def add(total, part):
        piece, part = part
        return total + _product(piece, numbers(part), contracted, accumulate), None

    pieces = jnp.moveaxis(x.reshape(*x.shape[:-1], tiles, -1), -2, 0)
    total = jnp.zeros((*x.shape[:-1], codes[0].shape[1]), accumulate)
    return lax.scan(add, total, (pieces, parts))[0]
