"""The layout in which the C++ kernels of a CPU read quantized weights from the first to the last byte (`cpu/tiles.h`).

A tile has all inputs of 16 outputs; in it, the bytes of four rows of codes of an output follow each other.
"""

from typing import Any

import jax

from llm_jax.kernels import native, number_formats
from llm_jax.kernels.number_formats import Scheme

# Letters of shapes: B rows of codes, G groups, O outputs.

OUTPUTS, ROWS = 16, 4
_PATHS = ("avx2", "avx512")  # of `native.PATHS`, whose kernels read tiles
_FORMATS = ("int8", "uint8", "int4", "uint4", "int2", "uint2", "nf4", "e2m1")

Codes = tuple[jax.Array, Any, jax.Array | None]  # codes, scale (an array, or Codes where scales are quantized), offset


def unsupported_reason(shape: tuple[int, ...], s: Scheme, axis: int) -> str:
    """The reason why a weight has no tiles, or "".

    Args:
      shape: of its codes.
    """
    if s.format not in _FORMATS:
        return f"the format {s.format} has no kernel"
    if axis != -2 or len(shape) != 2:
        return f"groups along the axis {axis} of codes of the shape {shape}"
    bytes_of_group = shape[0] if s.group <= 0 else s.group * number_formats.FORMATS[s.format].bits // 8
    if shape[1] % OUTPUTS or bytes_of_group % ROWS:
        return f"{shape[1]} outputs and groups of {bytes_of_group} bytes are no whole tiles"
    return ""


def unusable_reason() -> str:
    """The reason why no kernel of this process reads tiles, or "". Compiles the kernels if they are not yet.

    Raises:
      UserError: see `native.library`.
    """
    if reason := native.unusable_reason():
        return reason
    library = native.library()
    if library is None:
        return "XLA computes everything"
    fastest = native.PATHS[library.llm_jax_fastest_path()]
    return "" if fastest in _PATHS else f"the kernels of {fastest} read codes by rows"


def is_tiled(codes: jax.Array) -> bool:
    """Whether codes lie in tiles, (O / 16, B / 4, 16, 4)."""
    return codes.ndim == 4


def to_tiles(codes: Codes) -> Codes:
    """Codes (B, O) with scales (G, O) in tiles: (O / 16, B / 4, 16, 4) and (O / 16, G, 16).

    Scales and offsets that all outputs share, and the scales and the mean of quantized scales, keep their shape.
    """
    numbers, scale, offset = codes
    tiles = numbers.reshape(numbers.shape[0] // ROWS, ROWS, -1, OUTPUTS).transpose(2, 0, 3, 1)
    if isinstance(scale, tuple):
        return tiles, (_scale_to_tiles(scale[0]), *scale[1:]), offset
    return tiles, _scale_to_tiles(scale), None if offset is None else _scale_to_tiles(offset)


def from_tiles(codes: Codes) -> Codes:
    """The inverse of `to_tiles`; codes that are not in tiles are returned unchanged."""
    numbers, scale, offset = codes
    if not is_tiled(numbers):
        return codes
    rows = numbers.transpose(1, 3, 0, 2).reshape(numbers.shape[1] * ROWS, -1)
    if isinstance(scale, tuple):
        return rows, (_scale_from_tiles(scale[0]), *scale[1:]), offset
    return rows, _scale_from_tiles(scale), None if offset is None else _scale_from_tiles(offset)


def _scale_to_tiles(scale: jax.Array) -> jax.Array:
    return scale if scale.shape[1] == 1 else scale.reshape(scale.shape[0], -1, OUTPUTS).swapaxes(0, 1)


def _scale_from_tiles(scale: jax.Array) -> jax.Array:
    return scale if scale.ndim == 2 else scale.swapaxes(0, 1).reshape(scale.shape[1], -1)
