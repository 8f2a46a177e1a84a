"""The block formats of GGUF files: bytes <-> float32, in numpy.

A row of a tensor is a sequence of blocks; a block holds 32 (or 256) numbers as integers with float16 scales.
Layouts: ggml's block_q4_0 ... block_mxfp4 (ggml-common.h); d is the scale, m or dmin the offset that is added or
subtracted, and the scales of sub-blocks of the formats of 256 numbers are integers of 4, 6 or 8 bits. The codes of IQ4
and MXFP4 are positions in a table of values.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

# Letters of shapes: ... any leading axes, B bytes of a row, K blocks of a row, W numbers of a row.


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """A block format.

    Attributes:
      code: the number of the format in a GGUF file.
      numbers: how many numbers a block holds.
      size: bytes of a block.
      decode: uint8 (..., K, size) -> float32 (..., K, numbers).
      encode: the inverse, which rounds as ggml does; None for formats that are only read.
      groups: for formats that are groups of integers, their `Groups`; None for others. uint8 (..., K, size).
    """

    code: int
    numbers: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    groups: Callable[[np.ndarray], "Groups"] | None = None


class Groups(NamedTuple):
    """Blocks as groups of integers that share a scale: the numbers are codes * scale + offset, rounded after each.

    Attributes:
      codes: int8 or uint8 (..., K, G, N), for G groups of N numbers in a block.
      scale: float32 (..., K, G, 1).
      offset: float32 (..., K, G, 1), or None.
    """

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None = None

    def numbers(self) -> np.ndarray:
        """float32 (..., K, G N)."""
        values = self.codes.astype(np.float32) * self.scale
        values = values if self.offset is None else values + self.offset
        return values.reshape(*values.shape[:-2], -1)


def decode(name: str, rows: np.ndarray) -> np.ndarray:
    """Rows of blocks of the format `name` as numbers: uint8 (..., B) -> float32 (..., W)."""
    f = FORMATS[name]
    blocks = rows.reshape(*rows.shape[:-1], -1, f.size)
    return f.decode(blocks).reshape(*rows.shape[:-1], -1)


def encode(name: str, values: np.ndarray) -> np.ndarray:
    """Numbers as rows of blocks of the format `name`: float32 (..., W) -> uint8 (..., B).

    W must be a multiple of the numbers of a block, and the format must have an `encode`.
    """
    f = FORMATS[name]
    assert f.encode is not None
    blocks = values.astype(np.float32).reshape(*values.shape[:-1], -1, f.numbers)
    return f.encode(blocks).reshape(*values.shape[:-1], -1)


def _half(x: np.ndarray) -> np.ndarray:
    """uint8 (..., 2) -> float32 (..., 1)."""
    return np.ascontiguousarray(x).view(np.float16).astype(np.float32)


def _nibbles(x: np.ndarray) -> np.ndarray:
    """uint8 (..., n) -> uint8 (..., 2 n): all low ones, then all high ones."""
    return np.concatenate([x & 15, x >> 4], -1)


def _fifth_bits(x: np.ndarray) -> np.ndarray:
    """uint8 (..., 4) -> (..., 32): bit i, moved to the value 16."""
    return np.unpackbits(np.ascontiguousarray(x), axis=-1, bitorder="little") << 4


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _half(b[..., :2]) * (_nibbles(b[..., 2:]).astype(np.float32) - 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _half(b[..., :2]) * _nibbles(b[..., 4:]) + _half(b[..., 2:4])


def _q5_0(b: np.ndarray) -> Groups:
    codes = (_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6])).astype(np.int8) - np.int8(16)
    return Groups(codes[..., None, :], _half(b[..., :2])[..., None])


def _q5_1(b: np.ndarray) -> Groups:
    codes = _nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])
    return Groups(codes[..., None, :], _half(b[..., :2])[..., None], _half(b[..., 2:4])[..., None])


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _half(b[..., :2]) * np.ascontiguousarray(b[..., 2:]).view(np.int8)


def _six_bits(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (..., 12) -> eight scales and eight minima, (..., 8, 1) each."""
    low, high, mixed = s[..., :4], s[..., 4:8], s[..., 8:]
    scales = np.concatenate([low & 63, (mixed & 15) | ((low >> 6) << 4)], -1)
    minima = np.concatenate([high & 63, (mixed >> 4) | ((high >> 6) << 4)], -1)
    return scales[..., None].astype(np.float32), minima[..., None].astype(np.float32)


def _k_quants(b: np.ndarray, codes: np.ndarray) -> Groups:
    """d scale code - dmin minimum, for codes (..., 8, 32). The products of d and dmin are exact in float32."""
    scales, minima = _six_bits(b[..., 4:16])
    d, dmin = _half(b[..., :2])[..., None], _half(b[..., 2:4])[..., None]
    return Groups(codes, d * scales, -(dmin * minima))


def _pairs_of_32(q: np.ndarray) -> np.ndarray:
    """uint8 (..., 128) -> (..., 8, 32): each 32 bytes hold 32 low nibbles, then 32 high ones."""
    q = q.reshape(*q.shape[:-1], 4, 32)
    return np.stack([q & 15, q >> 4], -2).reshape(*q.shape[:-2], 8, 32)


def _q4_k(b: np.ndarray) -> Groups:
    return _k_quants(b, _pairs_of_32(b[..., 16:]))


def _q5_k(b: np.ndarray) -> Groups:
    fifth = (b[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _k_quants(b, _pairs_of_32(b[..., 48:]) | (fifth << 4))


def _q6_k(b: np.ndarray) -> Groups:
    low = b[..., :128].reshape(*b.shape[:-1], 2, 2, 32)  # half, part, place
    low = np.concatenate([low & 15, low >> 4], -2)  # half, 4, place
    high = b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32)
    high = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = (low | (high << 4)).astype(np.int8).reshape(*b.shape[:-1], 16, 16) - np.int8(32)
    scales = np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.float32)[..., None]
    return Groups(codes, _half(b[..., 208:])[..., None] * scales)


def _pairs_of_bits(x: np.ndarray) -> np.ndarray:
    """uint8 (..., n) -> uint8 (..., 4, n): the lowest two bits of every byte first."""
    return (x[..., None, :] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3


def _q2_k(b: np.ndarray) -> Groups:
    codes = _pairs_of_bits(b[..., 16:80].reshape(*b.shape[:-1], 2, 32)).reshape(*b.shape[:-1], 16, 16)
    scales = (b[..., :16] & 15).astype(np.float32)[..., None]
    minima = (b[..., :16] >> 4).astype(np.float32)[..., None]
    d, dmin = _half(b[..., 80:82])[..., None], _half(b[..., 82:84])[..., None]
    return Groups(codes, d * scales, -(dmin * minima))


def _q3_k(b: np.ndarray) -> Groups:
    low = _pairs_of_bits(b[..., 32:96].reshape(*b.shape[:-1], 2, 32)).reshape(*b.shape[:-1], 16, 16)
    third = (b[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # 0: 4 is subtracted
    codes = low.astype(np.int8) - np.int8(4) * (1 - third.reshape(*b.shape[:-1], 16, 16).astype(np.int8))
    s = b[..., 96:108]
    fifth_and_sixth = _pairs_of_bits(s[..., 8:]).reshape(*b.shape[:-1], 16)
    scales = (_nibbles(s[..., :8]) | (fifth_and_sixth << 4)).astype(np.float32)[..., None] - 32
    return Groups(codes, _half(b[..., 108:])[..., None] * scales)


_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # twice e2m1


def _iq4_nl(b: np.ndarray) -> np.ndarray:
    return _half(b[..., :2]) * _IQ4_VALUES[_nibbles(b[..., 2:])]


def _iq4_xs(b: np.ndarray) -> np.ndarray:
    high = np.ascontiguousarray(b[..., 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], -1).reshape(*b.shape[:-1], 8)
    scales = (low | (high.astype(np.uint8) & 3) << 4).astype(np.float32)[..., None] - 32
    values = _IQ4_VALUES[_nibbles(b[..., 8:].reshape(*b.shape[:-1], 8, 16))]
    return (_half(b[..., :2])[..., None] * scales * values).reshape(*b.shape[:-1], 256)


def _mxfp4(b: np.ndarray) -> np.ndarray:
    """The scale is 2^(e - 127) (Open Compute Project, MX formats, 2023); half of it because the table is doubled."""
    exponent = b[..., :1].astype(np.int32) - 128
    return np.ldexp(np.float32(1), exponent).astype(np.float32) * _MXFP4_VALUES[_nibbles(b[..., 1:])]


def _round_away(x: np.ndarray) -> np.ndarray:
    """Halves away from 0, as C's roundf."""
    return np.trunc(x + np.copysign(np.float32(0.5), x))


def _inverse(d: np.ndarray) -> np.ndarray:
    # Scales so small that their inverse overflows are 0 in float16 as well.
    return np.divide(1, d, out=np.zeros_like(d), where=np.abs(d) >= np.finfo(np.float32).tiny)


def _to_q8_0(x: np.ndarray) -> np.ndarray:
    d = np.max(np.abs(x), -1, keepdims=True) / np.float32(127)
    q = _round_away(x * _inverse(d)).astype(np.int8)
    return np.concatenate([d.astype(np.float16).view(np.uint8), q.view(np.uint8)], -1)


def _packed(codes: np.ndarray) -> np.ndarray:
    q = codes.astype(np.uint8)
    return q[..., :16] | (q[..., 16:] << 4)


def _to_q4_0(x: np.ndarray) -> np.ndarray:
    extreme = np.take_along_axis(x, np.argmax(np.abs(x), -1, keepdims=True), -1)
    d = extreme / np.float32(-8)
    q = np.clip(np.trunc(x * _inverse(d) + np.float32(8.5)), 0, 15)
    return np.concatenate([d.astype(np.float16).view(np.uint8), _packed(q)], -1)


def _to_q4_1(x: np.ndarray) -> np.ndarray:
    low = np.min(x, -1, keepdims=True)
    d = (np.max(x, -1, keepdims=True) - low) / np.float32(15)
    q = np.clip(np.trunc((x - low) * _inverse(d) + np.float32(0.5)), 0, 15)
    return np.concatenate([d.astype(np.float16).view(np.uint8), low.astype(np.float16).view(np.uint8), _packed(q)], -1)


def _plain(code: int, dtype: type | np.dtype) -> BlockFormat:
    def read(b: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(b).view(dtype).astype(np.float32)

    def write(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).view(np.uint8)

    return BlockFormat(code, 1, np.dtype(dtype).itemsize, read, write)


def _grouped(code: int, numbers: int, size: int, groups: Callable[[np.ndarray], Groups]) -> BlockFormat:
    return BlockFormat(code, numbers, size, lambda b: groups(b).numbers(), groups=groups)


FORMATS = {
    "F32": _plain(0, np.float32),
    "F16": _plain(1, np.float16),
    "BF16": _plain(30, ml_dtypes.bfloat16),
    "Q4_0": BlockFormat(2, 32, 18, _q4_0, _to_q4_0),
    "Q4_1": BlockFormat(3, 32, 20, _q4_1, _to_q4_1),
    "Q5_0": _grouped(6, 32, 22, _q5_0),
    "Q5_1": _grouped(7, 32, 24, _q5_1),
    "Q8_0": BlockFormat(8, 32, 34, _q8_0, _to_q8_0),
    "Q2_K": _grouped(10, 256, 84, _q2_k),
    "Q3_K": _grouped(11, 256, 110, _q3_k),
    "Q4_K": _grouped(12, 256, 144, _q4_k),
    "Q5_K": _grouped(13, 256, 176, _q5_k),
    "Q6_K": _grouped(14, 256, 210, _q6_k),
    "IQ4_NL": BlockFormat(20, 32, 18, _iq4_nl),
    "IQ4_XS": BlockFormat(23, 256, 136, _iq4_xs),
    "MXFP4": BlockFormat(39, 32, 17, _mxfp4),
}
