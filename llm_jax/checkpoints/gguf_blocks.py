"""GGUF blocks <-> `QTensor`, without changing a code or a scale, for formats that a quantization scheme equals."""

import dataclasses
from typing import Any

import numpy as np

from llm_jax.kernels import blocks, number_formats
from llm_jax.weights import IN, OUT, QTensor

# Dimension letters: R rows of a stored tensor, G blocks per row, N bytes of a block's codes.

SCHEMES = {"Q8_0": "int8:32", "Q4_0": "int4", "Q4_1": "int4_affine"}  # block format -> quantization scheme
_HALF = 2  # bytes of a float16

# Block formats with other scales or other packing, which are only read: (quantization scheme, dtype of the scales).
_GROUPS = {
    "Q5_0": ("int8:32", "float16"),
    "Q5_1": ("int8_affine:32", "float16"),
    "Q2_K": ("q2_k", "float32"),
    "Q3_K": ("q3_k", "float32"),
    "Q4_K": ("q4_k", "float32"),
    "Q5_K": ("q5_k", "float32"),
    "Q6_K": ("q6_k", "float32"),
}
READABLE = (*SCHEMES, *_GROUPS)


def block_format(q: QTensor, transposed: bool) -> str | None:
    """The block format that holds a QTensor without a change, or None.

    Args:
      transposed: the stored tensor is (out, in), so that its blocks run along the input axis of the weight.
    """
    if q.smooth is not None or q.axis != (IN if transposed else OUT):
        return None
    # Blocks do not depend on how the products treat the activations.
    scheme = dataclasses.replace(number_formats.scheme(q.scheme), activations="")
    equal = (name for name, other in SCHEMES.items() if number_formats.scheme(other) == scheme)
    return next(equal, None)


def to_rows(q: QTensor) -> np.ndarray:
    """The blocks of a QTensor that has a `block_format`: uint8 (R, bytes per row)."""

    def stored(a) -> np.ndarray:
        a = np.asarray(a)
        return a.T if q.axis == IN else a

    scale_RG = stored(q.scale)
    halves_RG = [scale_RG] if q.offset is None else [scale_RG, stored(q.offset)]
    codes_RGN = np.ascontiguousarray(stored(q.codes)).view(np.uint8).reshape(*scale_RG.shape, -1)
    bytes_of_halves = [np.ascontiguousarray(half[..., None]).view(np.uint8) for half in halves_RG]
    return np.concatenate([*bytes_of_halves, codes_RGN], -1).reshape(scale_RG.shape[0], -1)


def from_rows(name: str, rows: np.ndarray, transposed: bool) -> QTensor:
    """A QTensor with numpy leaves, whose values are those of the blocks; for formats of `SCHEMES` the inverse of
    `to_rows`.

    Args:
      name: the block format, one of `READABLE`.
      rows: uint8 (R, bytes per row).
      transposed: see `block_format`.
    """
    cut_RGB = rows.reshape(rows.shape[0], -1, blocks.FORMATS[name].size)
    axis = IN if transposed else OUT

    def weight_order(a: np.ndarray) -> Any:
        a = a.reshape(rows.shape[0], -1)
        return np.ascontiguousarray(a.T if transposed else a)

    if name in _GROUPS:
        scheme_name, dtype = _GROUPS[name]
        groups = blocks.FORMATS[name].groups
        assert groups is not None
        numbers = groups(cut_RGB)
        codes = weight_order(_packed(numbers.codes, number_formats.FORMATS[number_formats.scheme(scheme_name).format]))
        scale, offset = (None if a is None else weight_order(a.astype(dtype)) for a in (numbers.scale, numbers.offset))
        return QTensor(codes, scale, offset, None, None, scheme_name, axis)
    scheme = number_formats.scheme(SCHEMES[name])
    head = 2 * _HALF if scheme.offset else _HALF
    halves = np.ascontiguousarray(cut_RGB[..., :head]).view(np.float16)
    codes = np.ascontiguousarray(cut_RGB[..., head:]).view(np.int8 if name == "Q8_0" else np.uint8)
    offset = weight_order(halves[..., 1]) if scheme.offset else None
    return QTensor(weight_order(codes), weight_order(halves[..., 0]), offset, None, None, SCHEMES[name], axis)


def _packed(codes: np.ndarray, f: number_formats.NumberFormat) -> np.ndarray:
    """Integers (..., N) as the codes of a format, as `number_formats.encode` packs them: (..., N bits / 8)."""
    if f.bits == 8:
        return codes
    unsigned = (codes.astype(np.int16) - int(f.low)).astype(np.uint8)
    parts = np.split(unsigned, 8 // f.bits, -1)
    return np.bitwise_or.reduce([part << np.uint8(i * f.bits) for i, part in enumerate(parts)])
