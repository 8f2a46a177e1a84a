"""Products of a few rows and a quantized weight by a kernel in Pallas (Triton) for GPUs.

A program decodes tiles of the weight, each of which lies in one row of groups, and multiplies them on the matrix unit.
The codes of a byte belong to different parts of a group (`number_formats.encode`), so every part is a product of its
own: with its part of x if the product sums over the axis of the groups, or into its part of the result.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from llm_jax.kernels import number_formats, target
from llm_jax.kernels.number_formats import Scheme

# Letters of shapes: M rows of activations, C the contracted axis of the weight, F its free one; P parts of a group, the
# number of codes of a byte.

MAX_ROWS = 64  # with more, the product of the expanded weight is bound by the matrix unit, not by memory
_TILE = 64  # most rows or columns of a tile of codes
_LEAST = 16  # fewest, for the matrix unit
_PROGRAMS = 1024  # a GPU is busy with as many; long sums are divided to have them


def unsupported_reason(
    x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, contracted: int, accumulate: Any
) -> str:
    """The reason why the kernel does not compute a product, or ""; see `matmul.expanded_products` for the arguments."""
    if x.dtype not in (jnp.bfloat16, jnp.float16) or jnp.dtype(accumulate) != jnp.float32:
        return f"{x.dtype} activations with {jnp.dtype(accumulate)} sums; the kernel has 16-bit floats with float32"
    f = number_formats.FORMATS[s.format]
    if "float" in f.dtype:
        return f"the format {s.format} has no kernel"
    packed = codes[0]
    if packed.ndim != 2 or not x.size or not packed.size:
        return f"activations of the shape {x.shape} and codes of the shape {packed.shape}"
    if (rows := x.size // x.shape[-1]) > MAX_ROWS:
        return f"{rows} rows of activations; the kernel takes 1 to {MAX_ROWS}"
    if min(_tiles(packed, s, axis)) < _LEAST:
        return f"groups of {s.group} in codes of the shape {packed.shape} have no tiles of {_LEAST}"
    return ""


def _tiles(packed: jax.Array, s: Scheme, axis: int) -> tuple[int, int]:
    """Sizes of a tile of codes: of bytes along the axis of the groups, and along the other."""
    along = packed.shape[axis]
    group = s.group * number_formats.FORMATS[s.format].bits // 8 if s.group > 0 else along
    return _power(group), _power(packed.shape[-3 - axis])


def _power(size: int) -> int:
    """The largest power of two that divides `size`, at most `_TILE`."""
    return min(size & -size, _TILE)


def product(
    x: jax.Array,
    codes: tuple[Any, ...],
    s: Scheme,
    axis: int,
    contracted: int,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """The product of a few rows and a quantized weight that is rounded to the dtype of x, with float32 sums.

    Args:
      x: bfloat16 or float16 (..., C).
      codes, s, axis, contracted: see `matmul.expanded_products`.
      out_dtype: dtype of the result.
      interpret: whether to interpret the kernel on another device.

    Returns:
      (..., F) in `out_dtype`.
    """
    f = number_formats.FORMATS[s.format]
    packed, scale, offset = codes
    grouped = contracted == axis + 2
    parts, along = 8 // f.bits, packed.shape[axis]
    part = along if s.group <= 0 else s.group // parts  # bytes of a group
    lead, count = x.shape[:-1], x.size // x.shape[-1]
    rows = max(_LEAST, 1 << (count - 1).bit_length())
    x = jnp.pad(x.reshape(count, -1), ((0, rows - count), (0, 0)))
    x = _to_parts(x, part, parts) if grouped else x[None]

    tile, other = _tiles(packed, s, axis)
    free = packed.shape[1 - contracted]
    width, depth = (other, tile) if grouped else (tile, other)
    steps, programs = x.shape[-1] // depth, free // width
    splits = 1
    while programs * splits < _PROGRAMS and steps % (2 * splits) == 0 and steps // splits > 8:
        splits *= 2

    operands = {"x": x, "codes": packed, "scale": scale}
    if isinstance(scale, tuple):
        operands |= dict(zip(("scale", "inner", "mean"), scale, strict=True))
        operands["scale_table"] = jnp.asarray(number_formats.FORMATS["dynamic8"].values, jnp.float32)
    if offset is not None:
        operands["offset"] = offset
    if f.values:
        operands["table"] = jnp.asarray(f.values, jnp.float32)
    outputs = 1 if grouped else parts
    y = pl.pallas_call(
        functools.partial(_kernel, s, axis, contracted, tuple(operands), part, tile, other, steps // splits),
        grid=(programs, splits),
        out_specs=pl.BlockSpec((None, outputs, rows, width), lambda i, k: (k, 0, 0, i)),
        out_shape=target.varying_like((splits, outputs, rows, free), jnp.float32, *operands.values()),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name=f"llm_jax_{s.format}_product",
    )(*operands.values())
    y = y.sum(0)
    y = y[0] if grouped else _from_parts(y, part)
    return y[:count].astype(out_dtype).reshape(*lead, -1)


def _to_parts(x: jax.Array, part: int, parts: int) -> jax.Array:
    """(M, C) -> (P, M, C / P): of every group, its P parts."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, parts, part), 2, 0).reshape(parts, x.shape[0], -1)


def _from_parts(y: jax.Array, part: int) -> jax.Array:
    """The inverse of `_to_parts`."""
    return jnp.moveaxis(y.reshape(*y.shape[:2], -1, part), 0, 2).reshape(y.shape[1], -1)


def _kernel(s, axis, contracted, operands, part, tile, other, steps, *references):
    """The rows of x times a strip of the weight, of `steps` tiles."""
    ref = dict(zip((*operands, "y"), references, strict=True))
    f = number_formats.FORMATS[s.format]
    strip, split = pl.program_id(0), pl.program_id(1)
    grouped = contracted == axis + 2
    parts, depth = 8 // f.bits, tile if grouped else other

    def step(k, sums):
        k = split * steps + k
        i, j = (k, strip) if grouped else (strip, k)  # the tile along the axis of the groups, and along the other
        here, across = pl.ds(i * tile, tile), pl.ds(j * other, other)
        codes = ref["codes"][(here, across) if axis == -2 else (across, here)].astype(jnp.int32)
        scale = _number(ref, "scale", axis, i * tile // part, j * other, other)
        offset = _number(ref, "offset", axis, i * tile // part, j * other, other) if "offset" in ref else None
        result = []
        for p in range(parts):
            values = codes if f.bits == 8 else (codes >> (p * f.bits)) & (2**f.bits - 1)
            values = ref["table"][values] if f.values else values.astype(jnp.float32) + (f.low if f.bits < 8 else 0)
            w = values * scale
            w = (w if offset is None else w + offset).astype(ref["x"].dtype)
            x = ref["x"][p if grouped else 0, :, pl.ds(k * depth, depth)]
            total = lax.dot_general(x, w, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)
            result.append(total)
        if grouped:
            return (functools.reduce(jnp.add, result, sums[0]),)
        return tuple(a + b for a, b in zip(sums, result, strict=True))

    shape = ref["y"].shape
    sums = lax.fori_loop(0, steps, step, tuple(jnp.zeros(shape[1:], jnp.float32) for _ in range(shape[0])))
    for p, total in enumerate(sums):
        ref["y"][p] = total


def _number(ref: dict[str, Any], name: str, axis: int, group: Any, start: Any, size: int) -> jax.Array:
    """The scales or offsets of a tile: float32 (1, size) for axis -2, (size, 1) for -1, or () for one number."""

    def read(name: str, group: Any, columns: Any) -> jax.Array:
        a = ref[name]
        group = 0 if a.shape[axis] == 1 else group
        columns = 0 if a.shape[-3 - axis] == 1 else columns
        return a[group, columns] if axis == -2 else a[columns, group]

    values = read(name, group, pl.ds(start, size))
    if name == "scale" and "inner" in ref:
        repeats = ref["scale"].shape[-3 - axis] // ref["inner"].shape[-3 - axis]
        inner = read("inner", group, (start + jnp.arange(size)) // repeats)
        values = ref["scale_table"][values.astype(jnp.int32)] * inner + ref["mean"][0, 0]
    elif values.dtype == jnp.uint8:
        values = lax.bitcast_convert_type(values.astype(jnp.uint32) << 23, jnp.float32)
    values = values.astype(jnp.float32)
    return values if values.ndim == 0 else values[None, :] if axis == -2 else values[:, None]
