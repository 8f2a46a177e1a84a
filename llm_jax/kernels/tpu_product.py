"""Products with quantized weights by a kernel in Pallas for TPUs.

The grid has two axes: strips of the weight that span the contracted axis, and blocks of rows of x. At the first block
of rows, a strip is decoded chunk by chunk in VMEM, rounded to bfloat16 and kept for the other blocks of rows, so a code
is read from memory once and decoded once, however many rows x has. Int8 activations multiply int8 codes as they are.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels import number_formats, target
from llm_jax.kernels.number_formats import Scheme

# Letters of shapes: M rows of activations, C the contracted axis of the weight, F its free one, G groups.

_SMALL = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")  # kinds with 16 MiB of VMEM; others have 64 MiB or more
_ROWS = 256  # rows of x of a block
_CHUNK = 512  # numbers of the contracted axis that are decoded at once
_STRIPS = (1024, 512, 256, 128)  # widths of a strip of the free axis
_LANES, _SUBLANES = 128, 8
_NO_BLOCKS = "no blocks of it fit registers and VMEM"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is divided.

    Attributes:
      rows: rows of x of a block.
      width: numbers of the free axis of a strip.
      chunks: number of parts of the contracted axis, one of which is decoded at a time.
      steps: number of blocks of rows.
      memory: bytes of VMEM.
    """

    rows: int
    width: int
    chunks: int
    steps: int
    memory: int


def unsupported_reason(
    x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, contracted: int, accumulate: Any
) -> str:
    """The reason why the kernel does not compute a product, or ""; see `matmul.expanded_products` for the arguments."""
    if x.dtype != jnp.bfloat16 or jnp.dtype(accumulate) != jnp.float32:
        return f"{x.dtype} activations with {jnp.dtype(accumulate)} sums; the kernel has bfloat16 with float32"
    f = number_formats.FORMATS[s.format]
    if len(f.values) > 16 or "float" in f.dtype:
        return f"the format {s.format} has no kernel"
    if s.group > 0 or f.bits < 8:
        if axis == -1:
            return "the groups lie along the last axis of the weight"
        if s.group <= 0 or s.group * f.bits // 8 % _SUBLANES:
            return f"groups of {s.group or 'a channel'} do not fill the rows of a register"
    reason = _unsupported(x, codes[0])
    return reason or ("" if blocks(x, codes, s, axis, contracted) else _NO_BLOCKS)


def unsupported_integer_reason(x: jax.Array, codes: jax.Array, axis: int) -> str:
    """The reason why the kernel does not compute a product of integers, or ""; see `matmul.integer_product`."""
    if "v4" in target.device_kind():
        return "a TPU v4 has no products of integers"
    s, contracted = number_formats.SCHEMES["w8a8"], axis + 2
    reason = _unsupported(x, codes)
    scale = jax.ShapeDtypeStruct((1, codes.shape[1 - contracted]), jnp.float32)
    return reason or ("" if blocks(x, (codes, scale, None), s, axis, contracted) else _NO_BLOCKS)


def _unsupported(x: jax.Array, codes: jax.Array) -> str:
    if codes.ndim != 2 or not x.size or not codes.size:
        return f"activations of the shape {x.shape} and codes of the shape {codes.shape}"
    return ""


def blocks(x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, contracted: int) -> Blocks | None:
    """The blocks of a product, for the arguments of `product`; None if no blocks fit registers and VMEM."""
    bits, group = number_formats.FORMATS[s.format].bits, max(s.group, 1)
    shape = number_formats.logical_shape(codes[0].shape, s, axis)
    inputs, outputs = shape[contracted], shape[1 - contracted]
    unit = math.lcm(_LANES, 4 * _SUBLANES * 8 // bits, group)
    chunk = max((n for n in range(unit, _CHUNK + 1, unit) if inputs % n == 0), default=0)
    if not chunk and inputs > 2 * _CHUNK:
        return None
    total = x.size // x.shape[-1]
    rows = min(_ROWS, -(-total // 16) * 16)
    steps = -(-total // rows)
    for width in _STRIPS:
        if width > outputs and width > _LANES:
            continue
        if contracted == 1 and (width % (unit) or (s.group > 0 and width // group % _SUBLANES and width != outputs)):
            continue
        if steps == 1 and width > 256 and outputs // width < 8:
            continue  # few strips: the first is read from memory while nothing is computed
        memory = 2 * (rows * inputs * 2 + inputs * width * bits // 8 + rows * width * 4)
        memory += rows * width * 4 + (inputs * width * 2 if steps > 1 else 0)
        memory += 6 * inputs * width // group * 4 if s.group > 0 else 0
        if memory <= _vmem() * 5 // 8:  # the rest is for values of the chunk that is decoded
            return Blocks(rows, width, inputs // chunk if chunk else 1, steps, memory)
    return None


def _vmem() -> int:
    """Bytes of VMEM that a kernel may use."""
    return (16 if target.device_kind() in _SMALL else 64) * 2**20


def product(
    x: jax.Array,
    codes: tuple[Any, ...],
    s: Scheme,
    axis: int,
    contracted: int,
    out_dtype: Any = jnp.float32,
    interpret: Any = False,
) -> jax.Array:
    """The product of bfloat16 rows and a quantized weight that is rounded to bfloat16, with float32 sums.

    Args:
      x: bfloat16 (..., C).
      codes, s, axis, contracted: see `matmul.expanded_products`.
      out_dtype: dtype of the result.
      interpret: whether to interpret the kernel on another device, or `pltpu.InterpretParams`.

    Returns:
      (..., F) in `out_dtype`.
    """
    return _call(x, None, codes, s, axis, contracted, out_dtype, interpret)


def integer_product(
    x: jax.Array,
    x_scale: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    axis: int,
    out_dtype: Any = jnp.float32,
    interpret: Any = False,
) -> jax.Array:
    """The product of int8 activations and int8 weights, with int32 sums; see `matmul.integer_product`."""
    x_scale = jnp.broadcast_to(x_scale.astype(jnp.float32), (*x.shape[:-1], 1))
    scale = jnp.broadcast_to(scale.astype(jnp.float32).reshape(1, -1), (1, codes.shape[-1 - (axis + 2)]))
    s = number_formats.SCHEMES["w8a8"]
    return _call(x, x_scale, (codes, scale, None), s, axis, axis + 2, out_dtype, interpret)


def _call(x, x_scale, codes, s, axis, contracted, out_dtype, interpret):
    b = blocks(x, codes, s, axis, contracted)
    assert b is not None
    packed, scale, offset = codes
    shape = number_formats.logical_shape(packed.shape, s, axis)
    outputs, lead = shape[1 - contracted], x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    count = x.shape[0]
    if padding := b.rows * b.steps - count:
        x = jnp.pad(x, ((0, padding), (0, 0)))

    def strip(a: Any, free: int) -> pl.BlockSpec:
        """A block of an array whose axis `free` is that of the strips, unless it has the size 1."""
        if a.shape[free] == 1:
            return pl.BlockSpec(a.shape, lambda i, j: (0, 0))
        size = a.shape[free] * b.width // outputs
        if free:
            return pl.BlockSpec((a.shape[0], size), lambda i, j: (0, i))
        return pl.BlockSpec((size, a.shape[1]), lambda i, j: (i, 0))

    operands: dict[str, Any] = {"x": x}
    specs: dict[str, Any] = {"x": pl.BlockSpec((b.rows, x.shape[1]), lambda i, j: (j, 0))}

    def add(name: str, array: Any, spec: pl.BlockSpec) -> None:
        if array.dtype == jnp.float16:  # which Mosaic does not have
            array = lax.bitcast_convert_type(array, jnp.int16)
        height: Any = spec.block_shape[0] if spec.block_shape else 0
        if name in ("scale", "offset") and height != array.shape[0] and height % (32 // array.dtype.itemsize):
            array = array.astype(jnp.int32)  # a block of narrower numbers would begin within a register
        operands[name], specs[name] = array, spec

    add("codes", packed, strip(packed, 1 - contracted))
    if x_scale is not None:
        x_scale = jnp.pad(x_scale.reshape(-1, 1), ((0, padding), (0, 0)))
        add("x_scale", x_scale, pl.BlockSpec((b.rows, 1), lambda i, j: (j, 0)))
        add("scale", scale, strip(scale, 1))
    elif isinstance(scale, tuple):
        scale, inner, mean = scale
        add("scale", scale, strip(scale, 1 - contracted))
        add("inner", inner, strip(inner, 0) if contracted else pl.BlockSpec(inner.shape, lambda i, j: (0, 0)))
        add("mean", mean, pl.BlockSpec((1, 1), lambda i, j: (0, 0), memory_space=pltpu.SMEM))
    else:
        add("scale", scale, strip(scale, 1 - contracted))
    if offset is not None:
        add("offset", offset, strip(offset, 1 - contracted))

    integers = x_scale is not None
    scratch = {"sums": pltpu.VMEM((b.rows, b.width), jnp.int32 if integers else jnp.float32)}
    if not integers:
        for name in ("scale", "offset"):
            if name in specs:
                scratch[name + "32"] = pltpu.VMEM(specs[name].block_shape, jnp.float32)
        if b.steps > 1:
            scratch["weight"] = pltpu.VMEM(
                (x.shape[1], b.width) if contracted == 0 else (b.width, x.shape[1]), jnp.bfloat16
            )
    repeats = packed.shape[1] // operands["inner"].shape[1] if "inner" in operands else 1
    dtypes = {"scale": scale.dtype, "offset": None if offset is None else offset.dtype}
    body = functools.partial(_kernel, s, axis, contracted, b, repeats, dtypes, tuple(operands), tuple(scratch))
    y = pl.pallas_call(
        body,
        grid=(-(-outputs // b.width), b.steps),
        in_specs=list(specs.values()),
        out_specs=pl.BlockSpec((b.rows, b.width), lambda i, j: (j, i)),
        out_shape=target.varying_like((x.shape[0], outputs), out_dtype, *operands.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_vmem() * 7 // 8
        ),
        interpret=interpret,
        name=f"llm_jax_{s.format}_product",
    )(*operands.values())
    return y[:count].reshape(*lead, outputs)


def _kernel(s, axis, contracted, b, repeats, dtypes, operands, scratch, *references):
    """One block of rows times one strip of the weight."""
    ref = dict(zip((*operands, "y", *scratch), references, strict=True))
    integers = "x_scale" in ref
    strip, rows = pl.program_id(0), pl.program_id(1)
    sums = ref["sums"]
    sums[...] = jnp.zeros_like(sums)

    def part(name: str, i: Any, along: int) -> jax.Array:
        """Chunk i of the contracted axis, which is the axis `along` of the array."""
        a = ref[name]
        if b.chunks == 1 or a.shape[along] == 1:
            return a[...]
        size = a.shape[along] // b.chunks
        piece = pl.ds(pl.multiple_of(i * size, size), size)
        return a[piece, :] if along == 0 else a[:, piece]

    def multiply(i: Any, w: jax.Array) -> None:
        sums[...] += lax.dot_general(
            part("x", i, 1), w, (((1,), (contracted,)), ((), ())), preferred_element_type=sums.dtype
        )

    def decoded(i: Any) -> jax.Array:
        offset = part("offset32", i, contracted) if "offset32" in ref else None
        w = _expand(part("codes", i, contracted), part("scale32", i, contracted), offset, s, axis)
        return w.astype(jnp.bfloat16)

    def first(i: Any, _: None) -> None:
        w = decoded(i)
        if "weight" in ref:
            size = w.shape[contracted]
            piece = pl.ds(pl.multiple_of(i * size, size), size)
            if contracted == 0:
                ref["weight"][piece, :] = w
            else:
                ref["weight"][:, piece] = w
        multiply(i, w)

    def loop(step) -> None:
        lax.fori_loop(0, b.chunks, step, None)

    if integers:
        loop(lambda i, _: multiply(i, part("codes", i, contracted)))
        y = sums[...].astype(jnp.float32) * ref["x_scale"][...] * ref["scale"][...]
        ref["y"][...] = y.astype(ref["y"].dtype)
        return

    @pl.when(rows == 0)
    def _():
        ref["scale32"][...] = _scales(ref, dtypes["scale"], 0 if contracted else strip * b.width, repeats)
        if "offset" in ref:
            ref["offset32"][...] = _float(ref["offset"][...], dtypes["offset"])
        loop(first)

    if "weight" in ref:

        @pl.when(rows > 0)
        def _():
            loop(lambda i, _: multiply(i, part("weight", i, contracted)))

    ref["y"][...] = sums[...].astype(ref["y"].dtype)


def _expand(codes: jax.Array, scale: jax.Array, offset: jax.Array | None, s: Scheme, axis: int) -> jax.Array:
    """The numbers of a chunk: codes and float32 scales and offsets -> float32."""
    codes = codes.astype(jnp.int32)
    if s.group <= 0:
        values = codes.astype(jnp.float32) * scale
        return values if offset is None else values + offset
    return number_formats.decode(codes, scale, offset, s, axis, _lookup)


def _lookup(codes: jax.Array, values: tuple[float, ...]) -> jax.Array:
    """values[codes] of 16 values, which lie in the rows of two registers: int32 (groups, rows, columns) -> float32."""
    registers = codes.reshape(-1, _SUBLANES, codes.shape[-1])
    row = lax.broadcasted_iota(jnp.int32, registers.shape, 1)
    low, high = (
        jnp.take_along_axis(number_formats.select_values(row, half), registers & 7, 1, mode="promise_in_bounds")
        for half in (values[:8], values[8:])
    )
    return jnp.where(registers < 8, low, high).reshape(codes.shape)


def _scales(ref: dict[str, Any], dtype: Any, first: Any, repeats: int) -> jax.Array:
    """The scales of a strip, float32.

    Args:
      dtype: that of the stored scales.
      first: number of the first column of the strip.
      repeats: how many scales share a scale, where the scales are quantized.
    """
    if "inner" not in ref:
        return _float(ref["scale"][...], dtype)
    codes, inner = ref["scale"][...], ref["inner"][...]
    shape = inner.shape[1], codes.shape[1]
    own = lax.broadcasted_iota(jnp.int32, shape, 0) == (lax.broadcasted_iota(jnp.int32, shape, 1) + first) // repeats
    inner = jnp.dot(inner, own.astype(jnp.float32), precision=lax.Precision.HIGHEST)  # exact: one term is not 0
    return _dynamic(codes.astype(jnp.int32)) * inner + ref["mean"][0, 0]


def _float(scale: jax.Array, dtype: Any) -> jax.Array:
    """Scales or offsets that are stored in `dtype` as float32. Those of float16 and e8m0 are given by their bits."""
    if dtype == jnp.float32:
        return scale
    bits = scale.astype(jnp.int32)
    if dtype == jnp.uint8:
        return lax.bitcast_convert_type(bits << 23, jnp.float32)
    magnitude = bits & 0x7FFF
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    value = jnp.where(magnitude < 1024, magnitude.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits < 0, -value, value)


def _dynamic(codes: jax.Array) -> jax.Array:
    """The values of int32 codes of the format "dynamic8", computed as in `number_formats`: float32."""
    index = jnp.abs(codes - 127)  # of the magnitude; 2**k of them are in decade k
    bits = lax.bitcast_convert_type(index.astype(jnp.float32), jnp.int32)
    decade = (bits >> 23) - 127
    part = lax.bitcast_convert_type((bits & 0x7FFFFF) | (127 << 23), jnp.float32) - 1
    middle = part + lax.bitcast_convert_type((126 - decade) << 23, jnp.float32)
    power = number_formats.select_values(jnp.maximum(decade, 0), tuple(10.0 ** (k - 6) for k in range(8)))
    value = jnp.where(index == 0, 0.0, jnp.where(index == 128, 1.0, (0.1 + 0.9 * middle) * power))
    return jnp.where(codes < 127, -value, value)
