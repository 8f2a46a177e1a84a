"""Blocks of GGUF files as `QTensor`s and back, number for number, where the formats correspond."""

from typing import Any

import numpy as np

from llm_jax.kernels import blocks, number_formats
from llm_jax.weights import IN, OUT, QTensor

# Letters of shapes: R rows of a tensor of theirs, G blocks of a row, N bytes of a block's codes.

SCHEMES = {"Q8_0": "int8:32", "Q4_0": "int4", "Q4_1": "int4_affine"}
_HALF = 2  # bytes of a float16


def corresponding(q: QTensor, turned: bool) -> str | None:
    """The block format that holds a QTensor as it is, or None.

    Args:
      turned: theirs is (out, in), so that blocks run along the input axis of ours.
    """
    if q.smooth is not None or q.axis != (IN if turned else OUT):
        return None
    meant = number_formats.scheme(q.scheme)
    same = (name for name, scheme in SCHEMES.items() if number_formats.scheme(scheme) == meant)
    return next(same, None)


def to_rows(q: QTensor) -> np.ndarray:
    """uint8 (R, bytes of a row): a QTensor that has a corresponding format, as that format's blocks."""

    def theirs(a) -> np.ndarray:
        a = np.asarray(a)
        return a.T if q.axis == IN else a

    scale = theirs(q.scale)
    parts = [scale] if q.offset is None else [scale, theirs(q.offset)]
    codes = np.ascontiguousarray(theirs(q.codes)).view(np.uint8).reshape(*scale.shape, -1)
    halves = [np.ascontiguousarray(p[..., None]).view(np.uint8) for p in parts]
    return np.concatenate([*halves, codes], -1).reshape(scale.shape[0], -1)


def from_rows(name: str, rows: np.ndarray, turned: bool) -> QTensor:
    """The inverse of `to_rows` for the block format `name`, with numpy leaves."""
    cut = rows.reshape(rows.shape[0], -1, blocks.FORMATS[name].size)
    scheme = number_formats.scheme(SCHEMES[name])
    head = 2 * _HALF if scheme.offset else _HALF

    def ours(a: np.ndarray) -> np.ndarray:
        a = a.reshape(rows.shape[0], -1)
        return np.ascontiguousarray(a.T if turned else a)

    halves = np.ascontiguousarray(cut[..., :head]).view(np.float16)
    codes = np.ascontiguousarray(cut[..., head:]).view(np.int8 if name == "Q8_0" else np.uint8)
    offset: Any = ours(halves[..., 1]) if scheme.offset else None
    scale: Any = ours(halves[..., 0])
    held: Any = ours(codes)
    return QTensor(held, scale, offset, None, None, SCHEMES[name], IN if turned else OUT)
