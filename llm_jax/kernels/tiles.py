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
FORMATS = ("int8", "uint8", "int4", "uint4", "int2", "uint2", "nf4", "e2m1")

Codes = tuple[jax.Array, Any, jax.Array | None]  # codes, scale (an array, or Codes where scales are quantized), offset


def unsupported_reason(shape: tuple[int, ...], s: Scheme, axis: int) -> str:
    """The reason why a weight has no tiles, or "".

    Args:
      shape: of its codes.
      axis: of the groups, which lie along the inputs of a product.
    """
    if s.format not in FORMATS:
        return f"the format {s.format} has no kernel"
    if len(shape) != 2:
        return f"codes of the shape {shape}"
    if axis == -1 and s.scale in number_formats.SCHEMES:
        return "quantized scales along the axis -1"
    num_bytes, outputs = shape if axis == -2 else shape[::-1]
    bytes_of_group = num_bytes if s.group <= 0 else s.group * number_formats.FORMATS[s.format].bits // 8
    if outputs % OUTPUTS or bytes_of_group % ROWS:
        return f"{outputs} outputs and groups of {bytes_of_group} bytes are no whole tiles"
    return ""


def unusable_reason() -> str:
    """The reason why no kernel of this process reads tiles, or "". Compiles the kernels if they are not yet.

    Raises:
      UserError: see `native.library`.
    """
    if reason := native.unusable_reason():
        return reason
    library = native.library(silent=True)  # the products themselves say why XLA computes them
    if library is None:
        return "XLA computes everything"
    fastest = native.PATHS[library.llm_jax_fastest_path()]
    return "" if fastest in _PATHS else f"the kernels of {fastest} read codes by rows"


def is_tiled(codes: jax.Array) -> bool:
    """Whether codes lie in tiles, (O / 16, B / 4, 16, 4)."""
    return codes.ndim == 4


def to_tiles(codes: Codes, axis: int) -> Codes:
    """Codes (B, O) with scales (G, O) in tiles: (O / 16, B / 4, 16, 4) and (O / 16, G, 16).

    For axis -1, codes (O, B) with scales (O, G), which become the same tiles.

    Scales and offsets that all outputs share, and the scales and the mean of quantized scales, keep their shape.
    """
    numbers, scale, offset = codes
    if axis == -2:
        tiles = numbers.reshape(numbers.shape[0] // ROWS, ROWS, -1, OUTPUTS).transpose(2, 0, 3, 1)
    else:
        tiles = numbers.reshape(-1, OUTPUTS, numbers.shape[1] // ROWS, ROWS).swapaxes(1, 2)
    if isinstance(scale, tuple):
        return tiles, (_scale_to_tiles(scale[0], axis), *scale[1:]), offset
    return tiles, _scale_to_tiles(scale, axis), None if offset is None else _scale_to_tiles(offset, axis)


def from_tiles(codes: Codes, axis: int) -> Codes:
    """The inverse of `to_tiles`; codes that are not in tiles are returned unchanged."""
    numbers, scale, offset = codes
    if not is_tiled(numbers):
        return codes
    if axis == -2:
        rows = numbers.transpose(1, 3, 0, 2).reshape(numbers.shape[1] * ROWS, -1)
    else:
        rows = numbers.swapaxes(1, 2).reshape(-1, numbers.shape[1] * ROWS)
    if isinstance(scale, tuple):
        return rows, (_scale_from_tiles(scale[0], axis), *scale[1:]), offset
    return rows, _scale_from_tiles(scale, axis), None if offset is None else _scale_from_tiles(offset, axis)


def take(codes: Codes, outputs: jax.Array) -> Codes:
    """The codes of some outputs, as those of axis -1: (n, B), with scales (n, G).

    Args:
      codes: in tiles, with scales that are arrays.
      outputs: int32 (n,), in the range of the outputs.
    """
    numbers, scale, offset = codes
    tile, place = outputs // OUTPUTS, outputs % OUTPUTS

    def of_outputs(scale: jax.Array) -> jax.Array:
        return scale[tile, :, place] if scale.ndim == 3 else scale

    rows = numbers[tile, :, place].reshape(outputs.size, -1)
    return rows, of_outputs(scale), None if offset is None else of_outputs(offset)


def _scale_to_tiles(scale: jax.Array, axis: int) -> jax.Array:
    if scale.shape[1 if axis == -2 else 0] == 1:  # shared by all outputs
        return scale
    if axis == -2:
        return scale.reshape(scale.shape[0], -1, OUTPUTS).swapaxes(0, 1)
    return scale.reshape(-1, OUTPUTS, scale.shape[1]).swapaxes(1, 2)


def _scale_from_tiles(scale: jax.Array, axis: int) -> jax.Array:
    if scale.ndim == 2:
        return scale
    if axis == -2:
        return scale.swapaxes(0, 1).reshape(scale.shape[1], -1)
    return scale.swapaxes(1, 2).reshape(-1, scale.shape[1])
