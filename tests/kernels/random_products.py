"""Random products with quantized weights, their float64 results, and the C function of the kernels."""

import ctypes
import dataclasses
import functools
from typing import Any

import numpy as np

from llm_jax.kernels import native, number_formats

TABLES = {
    name: np.asarray(f.values or np.arange(2**f.bits) + f.low, np.float32)
    for name, f in number_formats.FORMATS.items()
    if f.bits < 8
}
# As products of rounded activations read them: the values of NF4 have 8 bits.
ROUNDED_TABLES = TABLES | {"nf4": np.rint(TABLES["nf4"] * 127) / np.float32(127)}
DYNAMIC = np.asarray(number_formats.FORMATS["dynamic8"].values, np.float32)
KINDS = {"int8": 0, "uint8": 1}
SCALES = ("none", "float32", "float16", "e8m0", "nested")


class CScales(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("inner_rows", ctypes.c_int64),
        ("inner_columns", ctypes.c_int64),
        ("mean", ctypes.c_float),
        ("tiled", ctypes.c_int64),
    ]


class CProduct(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in "rows inputs outputs kind bits group by_output tiled".split()),
        ("table", ctypes.c_void_p),
        ("scale", CScales),
        ("offset", CScales),
    ]


@dataclasses.dataclass
class Product:
    """A weight with random codes and scales, and activations; arrays as in product.h."""

    format: str
    group: int
    by_output: bool
    x: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    scale_kind: str
    inner: np.ndarray | None = None
    offset: np.ndarray | None = None

    @property
    def bits(self) -> int:
        return number_formats.FORMATS[self.format].bits

    def scales(self) -> np.ndarray:
        """The scales as float64, in their own shape."""
        if self.scale_kind == "e8m0":
            return np.exp2(self.scale.astype(np.float64) - 127)
        if self.scale_kind == "nested":
            repeats = [a // b for a, b in zip(self.scale.shape, self.inner.shape, strict=True)]
            inner = self.inner.repeat(repeats[0], 0).repeat(repeats[1], 1)
            return DYNAMIC.astype(np.float64)[self.scale] * inner + np.float64(np.float32(0.01))
        return self.scale.astype(np.float64)

    def weight(self, tables: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """The values of the codes, float64 (inputs, outputs), by `TABLES` or other tables of values."""
        tables = tables or TABLES
        codes, inputs = self.codes if self.by_output else self.codes.T, self.x.shape[1]
        outputs, groups = codes.shape[0], inputs // self.group
        if self.bits < 8:
            codes = codes.reshape(outputs, groups, 1, -1)
            shifts = np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]
            values = tables[self.format].astype(np.float64)[(codes >> shifts) & (2**self.bits - 1)]
        else:
            values = codes.astype(np.float64)
        values = values.reshape(outputs, groups, self.group)
        scale, offset = self.scales(), 0.0 if self.offset is None else self.offset.astype(np.float64)
        if not self.by_output:
            scale, offset = scale.T, np.transpose(offset)
        offset = np.broadcast_to(offset, (outputs, groups))
        values = values * np.broadcast_to(scale, (outputs, groups))[..., None] + offset[..., None]
        return values.reshape(outputs, inputs).T

    def run(
        self,
        path: str = "auto",
        threads: int = 1,
        *,
        codes_at: int = 0,
        x_at: int = 0,
        y_at: int = 0,
        scale_at: int = 0,
        blockwise: bool = False,
        tiled: bool = False,
        **fields: int,
    ) -> np.ndarray:
        """The result of the kernel, float32 (rows, outputs); addresses replace those of arrays, `fields` those of it.

        Args:
          blockwise: use the kernel that rounds activations to 8 bits.
          tiled: pass the codes and scales in tiles; see `tiles`.

        Raises:
          ValueError: the kernel refuses the sizes.
        """
        y = self.no_result()
        arrays = self.tiles() if tiled else {}
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        codes_at, scale_at = codes_at or addresses.get("codes", 0), scale_at or addresses.get("scale", 0)
        request = self.request(y_at or y.ctypes.data, codes_at, x_at, scale_at)
        if tiled:
            request.tiled, request.scale.tiled = True, self.scale.shape[1] > 1
            if self.offset is not None:
                request.offset.data, request.offset.tiled = addresses["offset"], self.offset.shape[1] > 1
        for name, value in fields.items():
            setattr(request, name, value)
        if reason := call([request], path, threads, blockwise):
            raise ValueError(reason)
        return y

    def tiles(self) -> dict[str, np.ndarray]:
        """Codes, scale and offset, each in tiles as in product.h."""
        codes = self.codes.reshape(self.codes.shape[0] // 4, 4, -1, 16).transpose(2, 0, 3, 1)
        arrays = {"codes": codes, "scale": self.scale} | ({} if self.offset is None else {"offset": self.offset})
        for name in ("scale", "offset"):
            if name in arrays and arrays[name].shape[1] > 1:
                arrays[name] = arrays[name].reshape(arrays[name].shape[0], -1, 16).transpose(1, 0, 2)
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def no_result(self) -> np.ndarray:
        """NaN in the shape of the result."""
        return np.full((self.x.shape[0], self.codes.shape[0 if self.by_output else 1]), np.nan, np.float32)

    def request(self, y_at: int, codes_at: int = 0, x_at: int = 0, scale_at: int = 0) -> CProduct:
        """The product as the kernels take it; addresses that are not 0 replace those of its arrays."""
        table = TABLES.get(self.format)
        request = CProduct(
            x_at or self.x.ctypes.data,
            codes_at or self.codes.ctypes.data,
            y_at,
            *self.x.shape,
            self.codes.shape[0 if self.by_output else 1],
            KINDS.get(self.format, 2),
            self.bits,
            self.group,
            int(self.by_output),
            0,  # tiled
            0 if table is None else table.ctypes.data,
            _scales(self.scale, self.scale_kind, self.inner),
            CScales() if self.offset is None else _scales(self.offset, str(self.offset.dtype), None),
        )
        request.scale.data = scale_at or request.scale.data
        return request

    def rounded(self) -> np.ndarray:
        """The activations rounded to 8 bits in blocks, float64 (rows, inputs), and NaN in a row that is not finite."""
        x = np.full_like(self.x, np.nan)
        for group in range(0, self.x.shape[1], self.group):
            for first in range(group, group + self.group, 32):
                last = min(first + 32, group + self.group)
                block = self.x[:, first:last]
                largest = np.abs(block).max(1, keepdims=True)
                with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                    inverse = np.where(largest >= 1e-30, np.float32(127) / largest, np.float32(0))
                    x[:, first:last] = np.rint(block * inverse) * (largest / np.float32(127))
        return x.astype(np.float64)


def _scales(scale: np.ndarray, kind: str, inner: np.ndarray | None) -> CScales:
    nested = (DYNAMIC.ctypes.data, inner.ctypes.data, *inner.shape, 0.01) if inner is not None else (0, 0, 0, 0, 0.0)
    return CScales(scale.ctypes.data, SCALES.index(kind), *scale.shape, *nested)


def call(requests: list[CProduct], path: str, threads: int, blockwise: bool) -> str:
    """Calls a kernel for several weights; returns what it says is wrong with their sizes, or ""."""
    library, reason = native.loaded()
    assert library is not None, reason
    function = library.llm_jax_blockwise_product if blockwise else library.llm_jax_quantized_product
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.POINTER(CProduct), ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    array = (CProduct * len(requests))(*requests)
    return (function(array, len(requests), native.PATHS.index(path), threads) or b"").decode()


def draw(
    format: str,
    inputs: int,
    outputs: int,
    rows: int,
    *,
    group: int = 0,
    by_output: bool = False,
    scale: str = "float32",
    offset: bool = False,
    one_scale: bool = False,
    inner_parts: int = 1,
    seed: int = 0,
) -> Product:
    """A random product.

    Args:
      group: inputs that share a scale; 0: all.
      one_scale: one scale for the weight.
      inner_parts: parts of an axis of nested scales that share an inner scale each.
    """
    r = np.random.default_rng(seed)
    group = group or inputs
    shape = (outputs, inputs // group) if by_output else (inputs // group, outputs)
    per_byte = 8 // number_formats.FORMATS[format].bits
    packed = (outputs, inputs // per_byte) if by_output else (inputs // per_byte, outputs)
    codes = r.integers(0, 256, packed, np.uint8)
    inner = None
    if one_scale:
        shape = (1, 1)
    if scale == "e8m0":
        scales = r.integers(120, 130, shape, np.uint8)
    elif scale == "nested":
        scales = r.integers(0, 256, shape, np.uint8)
        parts = (inner_parts, shape[1]) if by_output else (shape[0], inner_parts)
        inner = r.uniform(0.01, 0.1, parts).astype(np.float32)
    else:
        scales = r.uniform(0.01, 0.1, shape).astype(scale)
    offsets = r.normal(0, 0.1, shape).astype(scale) if offset else None
    x = r.normal(0, 3, (rows, inputs)).astype(np.float32)
    return Product(
        format, group, by_output, x, codes.view(np.int8) if format == "int8" else codes, scales, scale, inner, offsets
    )


@functools.lru_cache(maxsize=1)  # tests of one format and several instruction sets come one after the other
def references(
    format: str, shapes: tuple[tuple[int, int, int], ...], by_output: bool, rounded: bool, **options: Any
) -> list[tuple[Product, np.ndarray, np.ndarray]]:
    """Random products, each with its result in float64 and with the sums of magnitudes that bound its errors.

    Args:
      shapes: (inputs, outputs, rows) of each. Nested scales are drawn with one inner scale and with one per output.
      rounded: round the activations to 8 bits, and read codes by `ROUNDED_TABLES`.
      options: of `draw`.
    """
    products = []
    for inputs, outputs, rows in shapes:
        for inner_parts in (1, outputs) if options.get("scale") == "nested" else (1,):
            p = draw(format, inputs, outputs, rows, by_output=by_output, inner_parts=inner_parts, **options)
            w, x = p.weight(ROUNDED_TABLES if rounded else None), p.rounded() if rounded else p.x.astype(np.float64)
            products.append((p, x @ w, np.abs(x) @ np.abs(w)))
    return products
