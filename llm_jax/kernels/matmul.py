"""Products with quantized weights: arrays in, arrays out.

`expanded_products`, `integer_product` and `blockwise_products` are the entry points. On a CPU, C++ kernels
(`cpu_product`) compute products with few rows of float32 activations and with int8 activations. On a TPU, Pallas
kernels (`pallas`) compute products with bfloat16 and int8 activations. XLA computes all others. `native` documents the
environment variable that overrides the choice.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llm_jax.kernels import cpu_product, native, number_formats, pallas, target, tiles
from llm_jax.kernels.number_formats import Scheme

# Letters of shapes: ... leading axes of x, C the contracted axis of the weight, F its free one.

_TILE = 2**16  # numbers of a tile that stays in a core's cache once it is expanded
_FEW = 16  # rows of x up to which a product is bound by reading the weight

Codes = tuple[jax.Array, Any, jax.Array | None]  # codes, scale (an array, or Codes where scales are quantized), offset


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Absmax quantization of every row (Dettmers et al. 2022, arXiv:2208.07339, section 2).

    Args:
      x: float (..., C).

    Returns:
      int8 codes (..., C), and float32 scales (..., 1): the largest magnitude of every row over 127.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    return round_to_int8(x, scale), scale


def round_to_int8(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale, rounded and clipped to [-127, 127]: float x (...) -> int8 (...); 0 where the scale is 0."""
    return jnp.clip(jnp.round(x.astype(jnp.float32) / jnp.where(scale > 0, scale, 1.0)), -127, 127).astype(jnp.int8)


def integer_product(
    x: jax.Array, x_scale: jax.Array, codes: jax.Array, scale: jax.Array, axis: int, out_dtype: Any = jnp.float32
) -> jax.Array:
    """The product of int8 activations and int8 weights, with exact int32 sums, the same by the kernel as by XLA.

    Args:
      x: int8 (..., C).
      x_scale: float32 (..., 1) or ().
      codes: int8 (C, F) for axis -2, (F, C) for axis -1.
      scale: float32 (1, F) or (F, 1), or (1, 1).
      out_dtype: dtype of the result.

    Returns:
      (..., F) in `out_dtype`.
    """

    def by_xla(x, x_scale, codes, scale):
        total = lax.dot_general(
            x, codes, (((x.ndim - 1,), (2 + axis,)), ((), ())), preferred_element_type=jnp.int32
        ).astype(jnp.float32)
        return (total * x_scale * scale.reshape(-1)).astype(out_dtype)

    if not pallas.unsupported_integer_reason(x, codes, axis):
        kernel = functools.partial(pallas.integer_product, axis=axis, out_dtype=out_dtype)
        return _on_device(kernel, by_xla, x, x_scale, codes, scale)
    if cpu_product.unsupported_integer_reason(x, codes):
        return by_xla(x, x_scale, codes, scale)

    def on_cpu(x, x_scale, codes, scale):
        return cpu_product.integer_product(x, x_scale, codes, scale, axis).astype(out_dtype)

    return lax.platform_dependent(x, x_scale, codes, scale, cpu=on_cpu, default=by_xla)


def round_blocks(x: jax.Array, group: int) -> jax.Array:
    """Rounds activations to 8 bits in blocks, as ggml's Q8_0: a block is at most 32 activations of a group.

    The scale of a block is its largest magnitude over 127; a block whose largest is below 1e-30 becomes 0.

    Args:
      x: float (..., C).
      group: the size of the groups of the weight; it divides C.

    Returns:
      The rounded activations, float32 (..., C); NaN in a block that has a NaN or an inf.
    """
    x = x.astype(jnp.float32)
    size = min(group, number_formats.ACTIVATION_BLOCK)
    missing = -group % size
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    blocks = jnp.pad(grouped, [(0, 0)] * (grouped.ndim - 1) + [(0, missing)])
    blocks = blocks.reshape(*grouped.shape[:-1], -(-group // size), size)
    largest = jnp.max(jnp.abs(blocks), -1, keepdims=True)
    inverse = jnp.where(largest >= 1e-30, 127 / largest, 0.0)
    rounded = jnp.round(blocks * inverse) * jnp.where(jnp.isfinite(largest), largest / 127, jnp.nan)
    return rounded.reshape(*grouped.shape[:-1], group + missing)[..., :group].reshape(x.shape)


def blockwise_products(
    x: jax.Array, weights: Sequence[Codes], s: Scheme, axis: int, contracted: int
) -> tuple[jax.Array, ...]:
    """The products of activations in 8 bits with weights whose groups lie along the contracted axis.

    The kernel sums the products of integers within a block exactly and scales the sums; XLA multiplies the rounded
    activations with the expanded weight in float32. They differ by the rounding of float32 sums.

    Args:
      x: float (..., C); see `round_blocks`.
      weights: codes of each weight, all of the scheme s; see `expanded_products` for them and the other arguments.

    Returns:
      float32 (..., F) for each weight. The values of NF4 are rounded to multiples of 1/127.

    Raises:
      UserError: see `native.library`.
    """
    by_xla = functools.partial(xla_blockwise_products, s=s, axis=axis, contracted=contracted)
    x = x.astype(jnp.float32)
    unsupported = any(cpu_product.unsupported_blockwise_reason(x, codes, s, axis, contracted) for codes in weights)
    if unsupported or native.library() is None:
        return by_xla(x, weights)
    kernel = functools.partial(cpu_product.blockwise_products, s=s, axis=axis)
    return lax.platform_dependent(x, tuple(weights), cpu=kernel, default=by_xla)


def xla_blockwise_products(
    x: jax.Array, weights: Sequence[Codes], s: Scheme, axis: int, contracted: int
) -> tuple[jax.Array, ...]:
    """As `blockwise_products`, by XLA: the reference of the kernel."""
    weights = [tiles.from_tiles(codes, axis) for codes in weights]
    values = dataclasses.replace(s, format="nf4_int8") if s.format == "nf4" else s
    rounded = round_blocks(x, s.group if s.group > 0 else x.shape[-1])
    return tuple(xla_product(rounded, codes, values, axis, contracted, jnp.float32) for codes in weights)


def expanded_products(
    x: jax.Array,
    weights: Sequence[Codes],
    s: Scheme,
    axis: int,
    contracted: int,
    accumulate: Any,
    out_dtype: Any,
) -> tuple[jax.Array, ...]:
    """The products of x and weights that are decoded for it.

    Args:
      x: float (..., C).
      weights: (codes, scale, offset) of each weight (I, O), see `number_formats.encode`; all of the scheme s, and in
        tiles (`tiles.to_tiles`) all or none. Where the scheme quantizes its scales, a scale is (codes, scale, offset)
        with the scheme `number_formats.nested`.
      axis: axis of the groups, -2 or -1.
      contracted: axis of the weight that the product sums over, 0 or 1.
      accumulate: dtype of the sums.
      out_dtype: dtype of the results.

    Returns:
      (..., F) in `out_dtype` for each weight. The weight is rounded to the dtype of x, for any number of rows.

    Raises:
      UserError: see `native.library`.
    """

    def by_xla(x, codes):
        return xla_product(x, tiles.from_tiles(codes, axis), s, axis, contracted, accumulate).astype(out_dtype)

    def by_expansion(x, weights):
        expanded = [cpu_product.expanded_weight(codes, s) for codes in weights]
        transposed = axis == -1
        return tuple(_product(x, w, contracted ^ transposed, accumulate).astype(out_dtype) for w in expanded)

    def by_cpu(x, weights):
        return tuple(y.astype(out_dtype) for y in cpu_product.products(x, weights, s, axis))

    def all_by_xla(x, weights):
        return tuple(by_xla(x, codes) for codes in weights)

    if not pallas.unusable_reason():  # a Pallas kernel takes one weight, and may not support all of them
        kernel = functools.partial(pallas.product, s=s, axis=axis, contracted=contracted, out_dtype=out_dtype)
        reasons = [pallas.unsupported_reason(x, codes, s, axis, contracted, accumulate) for codes in weights]
        pairs = zip(weights, reasons, strict=True)
        return tuple(by_xla(x, codes) if reason else _on_device(kernel, by_xla, x, codes) for codes, reason in pairs)
    unsupported = any(cpu_product.unsupported_reason(x, codes, s, axis, contracted, accumulate) for codes in weights)
    if native.library() is None or (unsupported and not _can_expand(weights)):
        return all_by_xla(x, weights)
    on_cpu = by_expansion if unsupported else by_cpu
    return lax.platform_dependent(x, tuple(weights), cpu=on_cpu, default=all_by_xla)


def _can_expand(weights: Sequence[Codes]) -> bool:
    return tiles.is_tiled(weights[0][0]) and not native.unusable_reason()


def _on_device(kernel: Any, by_xla: Any, *arguments: Any) -> jax.Array:
    """A product by a kernel where the program is compiled for the platform it was chosen for, otherwise by XLA."""
    branches = dict.fromkeys(pallas.PLATFORMS[target.platform()], kernel)
    return lax.platform_dependent(*arguments, **branches, default=by_xla)


def xla_product(x: jax.Array, codes: Codes, s: Scheme, axis: int, contracted: int, accumulate: Any) -> jax.Array:
    """The reference. For few rows of x the weight is decoded tile by tile, each of which stays in a core's cache."""
    codes = codes[0], dense_scale(codes, s, axis), codes[2]
    few = axis + 2 == contracted and x.size // x.shape[-1] <= _FEW and not _devices()
    if few and (tiles := _tiles(codes, s, contracted)):
        return _tiled(x, codes, s, axis, contracted, accumulate, tiles)
    return _product(x, number_formats.decode(*codes, s, axis), contracted, accumulate)


def dense_scale(codes: Codes, s: Scheme, axis: int) -> jax.Array:
    """The stored scales of a weight, decoded where they are quantized."""
    scale = codes[1]
    if not isinstance(scale, tuple):
        return scale
    other = -3 - axis
    codes_of_scale, inner, mean = scale
    inner_scheme = number_formats.scheme(number_formats.nested(s, codes_of_scale.shape[other]))
    return number_formats.decode(codes_of_scale, inner, mean, inner_scheme, other)


def _product(x, w, contracted, accumulate):
    return lax.dot_general(
        x, w.astype(x.dtype), (((x.ndim - 1,), (contracted,)), ((), ())), preferred_element_type=accumulate
    )


def _devices() -> bool:
    """Whether a mesh of several devices is in use: slicing a sharded axis would gather it."""
    return jax.sharding.get_abstract_mesh().size > 1


def _tiles(codes: Codes, s: Scheme, contracted: int) -> int:
    """The number of tiles of the first axis (of complete groups or rows); 0: too small, or not divisible."""
    rows, columns = number_formats.logical_shape(codes[0].shape, s, contracted - 2)
    units = codes[1].shape[0]
    if units == 1 and (contracted == 1 or number_formats.FORMATS[s.format].bits == 8):  # one scale for all rows
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
    if contracted == 1:  # a tile of rows computes a part of the result
        out = lax.map(lambda part: _product(x, numbers(part), contracted, accumulate), parts)  # (tiles, ..., F / tiles)
        return jnp.moveaxis(out, 0, -2).reshape(*x.shape[:-1], -1)

    def add(total, part):
        piece, part = part
        return total + _product(piece, numbers(part), contracted, accumulate), None

    pieces = jnp.moveaxis(x.reshape(*x.shape[:-1], tiles, -1), -2, 0)
    total = jnp.zeros((*x.shape[:-1], codes[0].shape[1]), accumulate)
    return lax.scan(add, total, (pieces, parts))[0]
