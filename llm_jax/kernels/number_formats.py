"""Number formats: arrays of codes with a scale for every group of numbers.

A weight (..., I, O) is divided into groups along `axis` (-2 or -1, the axis that its product contracts), and each
code represents

    value(code) * scale + offset

A *format* defines the values of the codes; a *scheme* is a format with a group size, the dtype of its scales,
its offset, and the quantization of activations. Schemes have names (`SCHEMES`), to which a group size may be
added: "int4:64", "int8:channel", "int8:tensor"; and "+a8" for activations in 8 bits: "int4+a8", "int4:64+a8".
A scheme of the form FILE:NAME(OPTIONS) is a class of the user (`custom_format`) instead of a format.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import extensions
from llm_jax.errors import UserError
from llm_jax.kernels import custom_format, target
from llm_jax.schema.value_names import suggestion

# Letters of shapes: I in, O out, G groups, N numbers of a group.

CHANNEL, TENSOR = 0, -1  # group sizes: the whole axis, and the whole weight
ACTIVATIONS_INT8 = "+a8"  # the end of the name of a scheme whose products round activations in blocks
ACTIVATION_BLOCK = 32  # the most activations that share a scale, as in ggml's Q8_0
_GROUPS = {"channel": CHANNEL, "tensor": TENSOR}


def _normal_float() -> tuple[float, ...]:
    """NF4 as published (Dettmers et al. 2023, arXiv:2305.14314, appendix E): quantiles of a normal, 0 included."""
    return (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )


def _dynamic_tree() -> tuple[float, ...]:
    """Dynamic tree quantization in 8 bits (Dettmers et al. 2022, arXiv:2110.02861, section 1.3 and appendix).

    Seven decades of magnitudes, the k-th of which (from the smallest) has 2^k of them, the middles of
    equal parts of [0.1, 1], of either sign; 0 and 1.
    """
    magnitudes = []
    for k in range(7):
        ends = np.linspace(0.1, 1.0, 2**k + 1, dtype=np.float64)
        magnitudes += list((ends[:-1] + ends[1:]) / 2 * 10.0 ** (k - 6))
    return tuple(sorted([*magnitudes, *(-m for m in magnitudes), 0.0, 1.0]))


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclasses.dataclass(frozen=True)
class NumberFormat:
    """The values of the codes of a format.

    Attributes:
      bits: number of bits of a code; below 8, codes are packed into bytes.
      low, high: range of the values. A scale is the largest magnitude of its group over `high`.
      values: the value of every code; () for integers from low to high, and for floats.
      dtype: dtype of 8-bit codes.
    """

    bits: int
    low: float
    high: float
    values: tuple[float, ...] = ()
    dtype: str = "uint8"

    @property
    def integers(self) -> bool:
        return not self.values and "float" not in self.dtype


FORMATS = {
    "int8": NumberFormat(8, -128, 127, dtype="int8"),
    "int4": NumberFormat(4, -8, 7),
    "int2": NumberFormat(2, -2, 1),
    "uint8": NumberFormat(8, 0, 255),
    "uint4": NumberFormat(4, 0, 15),
    "uint2": NumberFormat(2, 0, 3),
    "nf4": NumberFormat(4, -1, 1, _normal_float()),
    "nf4_int8": NumberFormat(4, -1, 1, tuple(round(v * 127) / 127 for v in _normal_float())),  # times int8 activations
    "dynamic8": NumberFormat(8, -1, 1, _dynamic_tree()),
    "e2m1": NumberFormat(4, -6, 6, (*_E2M1, *(-v for v in _E2M1))),
    "e4m3": NumberFormat(8, -448, 448, dtype="float8_e4m3fn"),
    "e5m2": NumberFormat(8, -57344, 57344, dtype="float8_e5m2"),
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a weight is stored and multiplied.

    Attributes:
      format: a name in `FORMATS`.
      group: how many numbers share a scale, or `CHANNEL` or `TENSOR`.
      scale: "float32", "float16", "e8m0" (a power of two in one byte), or the scheme that quantizes the scales.
      offset: "" (none), "minimum" of the group, or "mean" of the weight.
      activations: "" (not quantized), or int8: "dynamic" (a scale per token), "static" (one calibrated scale), or
        "blocks" (a scale per token and block of at most `ACTIVATION_BLOCK` inputs of a group).
      custom: the custom number format, to which no other attribute applies; its format is "". Otherwise None.
    """

    format: str
    group: int
    scale: str = "float32"
    offset: str = ""
    activations: str = ""
    custom: custom_format.CustomFormat | None = None


SCHEMES = {
    "int8": Scheme("int8", CHANNEL),
    "int8_affine": Scheme("uint8", CHANNEL, offset="minimum"),
    "w8a8": Scheme("int8", CHANNEL, activations="dynamic"),
    "w8a8_static": Scheme("int8", CHANNEL, activations="static"),
    "int4": Scheme("int4", 32, "float16"),
    "int4_affine": Scheme("uint4", 32, "float16", "minimum"),
    "int2": Scheme("int2", 32, "float16"),
    "int2_affine": Scheme("uint2", 32, "float16", "minimum"),
    "nf4": Scheme("nf4", 64, "double"),
    "fp8_e4m3": Scheme("e4m3", CHANNEL),
    "fp8_e5m2": Scheme("e5m2", CHANNEL),
    "mxfp4": Scheme("e2m1", 32, "e8m0"),  # OCP Microscaling Formats 1.0, section 5
    "double": Scheme("dynamic8", 256, offset="mean"),  # of scales (QLoRA, section 3)
    # Blocks of GGUF files, whose scales are exact in float32 only (`blocks.Groups`).
    "q2_k": Scheme("uint2", 16, offset="minimum"),
    "q3_k": Scheme("int4", 16),
    "q4_k": Scheme("uint4", 32, offset="minimum"),
    "q5_k": Scheme("uint8", 32, offset="minimum"),
    "q6_k": Scheme("int8", 16),
}


def accepts_int8_activations(s: Scheme) -> bool:
    """Whether `s` has a product with activations that are rounded in blocks: a scheme of integers or 4-bit floats."""
    return not (s.activations or s.custom) and (FORMATS[s.format].integers or s.format in ("nf4", "e2m1"))


WEIGHT_SCHEMES = tuple(name for name in SCHEMES if name not in ("double", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"))


def scheme(name: str) -> Scheme:
    """The scheme named "NAME" or "NAME:GROUP", either perhaps with "+a8", or of the form FILE:NAME(OPTIONS).

    Raises:
      UserError: the scheme does not exist, or the group is not a number of at least 2, "channel" or "tensor", or
        the products of "+a8" are not defined for it. See also `custom_format.load`.
    """
    if name.partition(":")[0] not in SCHEMES and extensions.is_specification(name):  # "int4:-32" is a wrong group
        return Scheme("", CHANNEL, custom=custom_format.load(name))
    return _built_in(name)


@functools.cache
def _built_in(name: str) -> Scheme:
    if name.endswith(ACTIVATIONS_INT8):
        base = _built_in(name.removesuffix(ACTIVATIONS_INT8))
        if not accepts_int8_activations(base):
            raise UserError(f"the scheme '{name}': {ACTIVATIONS_INT8} expects integers, NF4 or MXFP4 as weights")
        return dataclasses.replace(base, activations="blocks")
    stem, colon, suffix = name.partition(":")
    if stem not in SCHEMES:
        near = suggestion(stem, WEIGHT_SCHEMES)
        raise UserError(
            f"the scheme '{name}' is unknown; expected one of {', '.join(WEIGHT_SCHEMES)}, NAME:GROUP or "
            f"FILE:NAME{near}"
        )
    base = SCHEMES[stem]
    if not colon:
        return base
    if suffix not in _GROUPS and not (suffix.isascii() and suffix.isdigit() and int(suffix) > 1):
        raise UserError(f"the scheme '{name}' has the group '{suffix}'; expected a number, channel or tensor")
    group = _GROUPS[suffix] if suffix in _GROUPS else int(suffix)
    if base.activations and group > 0:
        raise UserError(f"the scheme '{name}': integer products want one scale per channel or tensor, not groups")
    # Scales of small groups are a large part of the size, and scales of integers fit a float16.
    half = group > 0 and base.scale == "float32" and FORMATS[base.format].integers
    return dataclasses.replace(base, group=group, scale="float16" if half else base.scale)


def unsupported_reason(s: Scheme, size: int) -> str:
    """The reason why an axis of `size` numbers cannot be divided into the groups of the scheme, or ""."""
    if s.custom:
        return ""  # `custom_format.CustomFormat.check` traces it
    group, per_byte = s.group if s.group > 0 else size, 8 // FORMATS[s.format].bits
    if size % group:
        fitting = next((g for g in (128, 64, 32, 16, 8) if g < group and size % g == 0), 0)
        cure = f"; give the group after a colon, such as {s.format}:{fitting}" if fitting else ""
        return f"the group {group} does not divide its {size} inputs{cure}"
    return f"groups of {group} do not pack {per_byte} to a byte" if group % per_byte else ""


def scales(w: jax.Array, s: Scheme, axis: int, shrink: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array | None]:
    """The absmax (or minimum-maximum) scales and offsets of every group, times `shrink`.

    Args:
      w: float (..., I, O).
      axis: axis of the groups, -2 or -1.
      shrink: float, () or in the shape of the scales; values below 1 clip the largest numbers.

    Returns:
      (scale, offset), float32 (..., G, O) for axis -2 and (..., I, G) for axis -1, with 1 in place of an axis that
      shares a scale; a "mean" offset is (..., 1, 1); no offset is None.
    """
    f, w = FORMATS[s.format], w.astype(jnp.float32)
    if s.offset == "minimum":
        low, high = reduce_groups(jnp.min, w, s, axis), reduce_groups(jnp.max, w, s, axis)
        middle = (low + high) / 2
        return (high - low) / (f.high - f.low) * shrink, middle + (low - middle) * shrink
    mean = jnp.mean(w, (-2, -1), keepdims=True) if s.offset == "mean" else None
    largest = reduce_groups(jnp.max, jnp.abs(w if mean is None else w - mean), s, axis)
    return largest / f.high * shrink, mean


def reduce_groups(function: Callable[..., jax.Array], w: jax.Array, s: Scheme, axis: int) -> jax.Array:
    """A reduction over the numbers that share a scale.

    Args:
      function: called as function(numbers, axis=..., keepdims=True), such as jnp.max.
      w: (..., I, O).

    Returns:
      An array in the shape of the scales, see `scales`.
    """
    over = (axis, {-2: -1, -1: -3}[axis]) if s.group == TENSOR else axis
    return jnp.squeeze(function(split_groups(w, s.group, axis), axis=over, keepdims=True), axis)


def store_scales(scale: jax.Array, s: Scheme) -> jax.Array:
    """Scales in their storage dtype: float, or the exponent byte of e8m0; scales that are quantized stay float32."""
    if s.scale == "e8m0":
        _, exponent = jnp.frexp(scale * FORMATS[s.format].high)  # of a fraction in [0.5, 1)
        return jnp.clip(exponent - 3 + 127, 1, 254).astype(jnp.uint8)  # the largest e2m1 has the exponent 2
    return scale.astype("float32" if s.scale in SCHEMES else s.scale)


def scale_values(scale: jax.Array) -> jax.Array:
    """Stored scales or offsets of any shape as float32 of the same shape."""
    if scale.dtype == jnp.uint8:
        return jax.lax.bitcast_convert_type(scale.astype(jnp.uint32) << 23, jnp.float32)
    return scale.astype(jnp.float32)


def encode(w: jax.Array, scale: jax.Array, offset: jax.Array | None, s: Scheme, axis: int) -> jax.Array:
    """The codes nearest to w; ties go to even codes.

    Args:
      w: float (..., I, O).
      scale, offset: stored scales and offsets, in the shapes of `scales`.

    Returns:
      Codes in the dtype of the format and the shape of w. Codes below 8 bits are packed along the axis: a byte
      holds the codes at the same index of each half (quarter) of its group, lowest bits first.
    """
    f = FORMATS[s.format]
    scaled = divide_by_scales(w, scale, offset, s, axis)
    if f.values:
        codes = _nearest(scaled, f.values)
    elif f.integers:
        codes = jnp.clip(jnp.round(scaled), f.low, f.high) - (f.low if f.bits < 8 else 0)
    else:
        codes = jnp.clip(scaled, f.low, f.high)
    codes = codes.astype(f.dtype)
    if f.bits < 8:
        parts = jnp.split(codes, 8 // f.bits, axis)
        codes = functools.reduce(jnp.bitwise_or, (part << (i * f.bits) for i, part in enumerate(parts)))
    return join_groups(codes, axis)


def decode(
    codes: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None,
    s: Scheme,
    axis: int,
    lookup: Callable[[jax.Array, tuple[float, ...]], jax.Array] | None = None,
) -> jax.Array:
    """The values of codes, float32 (..., I, O): the inverse of `encode`, whose arguments and result it takes.

    Args:
      lookup: called as lookup(codes, values) in place of values[codes]; by default `select_values` on a TPU.
    """
    values = _values(_unpacked(codes, s, axis), FORMATS[s.format], lookup) * jnp.expand_dims(scale_values(scale), axis)
    if offset is not None:
        values = values + jnp.expand_dims(scale_values(offset), axis)
    return join_groups(values, axis)


def divide_by_scales(w: jax.Array, scale: jax.Array, offset: jax.Array | None, s: Scheme, axis: int) -> jax.Array:
    """w (..., I, O) over its scales, in groups: float32 (..., G, N, O) or (..., I, G, N). Scales of 0 count as 1."""
    grouped = split_groups(w.astype(jnp.float32), s.group, axis)
    if offset is not None:
        grouped = grouped - jnp.expand_dims(scale_values(offset), axis)
    unit = jnp.expand_dims(scale_values(scale), axis)
    return grouped / jnp.where(jnp.abs(unit) < np.finfo(np.float32).tiny, 1.0, unit)


def join_groups(grouped: jax.Array, axis: int) -> jax.Array:
    """Groups (..., G, N, O) or (..., I, G, N) -> (..., I, O)."""
    index = grouped.ndim + axis
    shape = grouped.shape
    return grouped.reshape(*shape[: index - 1], shape[index - 1] * shape[index], *shape[index + 1 :])


def round_to_format(x: jax.Array, name: str) -> jax.Array:
    """x (...), in units of its scale, rounded to the nearest values of the format `name`: float32 (...)."""
    f = FORMATS[name]
    if f.values:
        return jnp.asarray(f.values, jnp.float32)[_nearest(x, f.values)]
    if f.integers:
        return jnp.clip(jnp.round(x), f.low, f.high)
    return jnp.clip(x, f.low, f.high).astype(f.dtype).astype(jnp.float32)


def logical_shape(shape: tuple[int, ...], s: Scheme, axis: int) -> tuple[int, ...]:
    """The shape of the weight whose codes have `shape`."""
    unpacked = list(shape)
    unpacked[axis] *= 8 // FORMATS[s.format].bits
    return tuple(unpacked)


def nested(s: Scheme, size: int) -> str:
    """The name of the scheme that quantizes the scales of `s`, for an axis of `size` scales.

    Where the group of that scheme does not divide the axis, the group is their greatest common divisor if that is at
    least 32, and the whole axis otherwise.
    """
    group = math.gcd(size, SCHEMES[s.scale].group)
    return f"{s.scale}:{group if group >= 32 else 'channel'}"


def split_groups(w: jax.Array, group: int, axis: int) -> jax.Array:
    """Divides an axis into groups: (..., I, O) -> (..., G, N, O) for axis -2, (..., I, G, N) for axis -1."""
    index, size = w.ndim + axis, w.shape[axis]
    group = group if group > 0 else size
    return w.reshape(*w.shape[:index], size // group, group, *w.shape[index + 1 :])


def _unpacked(codes: jax.Array, s: Scheme, axis: int) -> jax.Array:
    """Codes in groups, one to an element."""
    bits = FORMATS[s.format].bits
    if bits == 8:
        return split_groups(codes, s.group, axis)
    per_byte = 8 // bits
    grouped = split_groups(codes, s.group // per_byte if s.group > 0 else s.group, axis)
    return jnp.concatenate([(grouped >> (i * bits)) & (2**bits - 1) for i in range(per_byte)], axis)


def select_values(codes: jax.Array, values: tuple[float, ...]) -> jax.Array:
    """values[codes] by a tree of selections, float32 (...): fast on TPUs, which read tables number by number.

    Args:
      codes: integer (...), below the number of values, which is a power of two.
    """
    level: list[Any] = [jnp.float32(value) for value in values]
    for i in range((len(values) - 1).bit_length()):
        bit = (codes & 2**i) != 0
        level = [jnp.where(bit, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return jnp.asarray(level[0])


def _values(codes: jax.Array, f: NumberFormat, lookup: Any) -> jax.Array:
    if f.values and (lookup or target.platform() == "tpu"):
        return jnp.asarray((lookup or select_values)(codes, f.values))
    if f.values:
        return jnp.asarray(f.values, jnp.float32)[codes]
    return codes.astype(jnp.float32) + (f.low if f.bits < 8 else 0.0)


def _nearest(x: jax.Array, values: tuple[float, ...]) -> jax.Array:
    """The codes of the values nearest to x, the even one of two as near; uint8 of x's shape."""
    codes = sorted(set(range(len(values))), key=lambda code: values[code])
    codes = [c for c in codes if not (values[c] == 0 and math.copysign(1, values[c]) < 0)]  # no -0
    ordered = np.asarray([values[c] for c in codes], np.float32)
    middles = jnp.asarray((ordered[:-1] + ordered[1:]) / 2)
    method = "compare_all" if len(codes) <= 16 else "scan_unrolled"
    below = jnp.searchsorted(middles, x, side="left", method=method)
    above = jnp.searchsorted(middles, x, side="right", method=method)
    table = jnp.asarray(codes, jnp.uint8)
    return jnp.where(table[below] % 2 == 0, table[below], table[above])
