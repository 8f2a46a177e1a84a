"""Weights in tiles: the products are those of weights in rows, bit for bit, and nothing beyond them is read."""

import ctypes
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import cpu_product, native, number_formats, tiles
from llm_jax.weights import IN, OUT, QTensor, to_qtensor
from tests.kernels import random_products
from tests.kernels.random_products import CProduct, draw
from tests.kernels.test_cpu_product import PATHS, available, guarded

pytestmark = pytest.mark.usefixtures("compiled_kernels")
FORMATS = ("int8", "uint8", "int4", "uint4", "int2", "uint2", "nf4", "e2m1")
SHAPES = ((192, 16, 1), (192, 112, 3), (384, 144, 17))
SCHEMES = ("int8", "int8:64", "int8:tensor", "int8_affine", "int4", "int4_affine", "int4:192", "int2", "nf4", "mxfp4")


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("scale", ["float32", "float16", "e8m0", "nested"])
@pytest.mark.parametrize("format", FORMATS)
def test_products_equal_those_of_rows(format, scale, blockwise):
    """Groups of 96 have no whole blocks of 32 bytes; they and other instruction sets go through a copy in rows."""
    options = itertools.product((0, 32, 64, 96), SHAPES, (False, True), (False, True))
    for group, (inputs, outputs, rows), offset, shared in options:
        if group * number_formats.FORMATS[format].bits % 32 or (scale == "nested" and (offset or shared)):
            continue
        offset &= scale.startswith("float")
        p = draw(format, inputs, outputs, rows, group=group, scale=scale, offset=offset, one_scale=shared)
        for path in filter(available, PATHS):
            expected = p.run(path, 2, blockwise=blockwise)
            np.testing.assert_array_equal(p.run(path, 2, blockwise=blockwise, tiled=True), expected)


@pytest.mark.parametrize("blockwise", [False, True])
def test_a_row_that_is_not_finite_gives_what_it_gives_with_rows(blockwise):
    p = draw("int4", 192, 80, 3, group=32, scale="float16")
    p.x[1, 7], p.x[2, 100] = np.nan, np.inf
    expected = p.run("avx2" if available("avx2") else "auto", blockwise=blockwise)
    assert np.isfinite(expected[0]).all()
    assert not np.isfinite(expected[1:]).any()
    np.testing.assert_array_equal(p.run(blockwise=blockwise, tiled=True), p.run(blockwise=blockwise))


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_beyond_an_operand_is_read(format, blockwise):
    p = draw(format, 384, 144, 2, group=64, scale="float16")
    expected = p.run(blockwise=blockwise, tiled=True)
    arrays = p.tiles()
    with guarded(arrays["codes"]) as codes, guarded(arrays["scale"]) as scale:
        run = p.run(blockwise=blockwise, tiled=True, codes_at=codes, scale_at=scale)
        np.testing.assert_array_equal(run, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"by_output": 1}, "the layout of the codes"),
        ({"outputs": 72}, "the layout of the codes"),
        ({"group": 4}, "the layout of the codes"),
    ],
)
def test_layouts_that_have_no_tiles_are_refused(change, reason):
    p = draw("int4", 192, 80, 1, group=64, one_scale=True)
    with pytest.raises(ValueError, match=reason):
        p.run(tiled=True, **change)


def test_scales_in_tiles_need_codes_in_tiles():
    p = draw("int4", 192, 80, 1, group=64)
    request = p.request(p.no_result().ctypes.data)
    request.scale.tiled = 1
    assert random_products.call([request], "auto", 1, False) == "the layout of the scales"
    other = p.request(p.no_result().ctypes.data)
    other.tiled = 1
    assert random_products.call([p.request(p.no_result().ctypes.data), other], "auto", 1, False).startswith("one of")


def weight(scheme, axis):
    shape = (384, 144) if axis == IN else (144, 384)
    return to_qtensor(jax.random.normal(jax.random.key(0), shape), scheme, axis)


CASES = [(scheme, axis) for scheme in SCHEMES for axis in (IN, OUT) if (scheme, axis) != ("nf4", OUT)]


@pytest.mark.parametrize(("scheme", "axis"), CASES)
def test_expanded_weights_equal_decoded_ones(scheme, axis):
    s, q = number_formats.scheme(scheme), weight(scheme, axis)
    in_tiles = tiles.to_tiles(q._stored(), axis)
    decoded = q.dense() if axis == IN else q.dense().T
    for path in filter(available, PATHS):
        expanded = jax.jit(lambda c, path=path: cpu_product.expanded_weight(c, s, path))(in_tiles)
        # A product and a sum may be one operation, with one rounding: those of an offset and of quantized scales.
        joined = q.offset is not None or isinstance(q.scale, QTensor)
        tolerance = 1e-6 * float(jnp.abs(decoded).max()) if joined else 0
        np.testing.assert_allclose(expanded, decoded, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("scheme", "axis"), CASES)
def test_tiles_and_rows_are_inverse(scheme, axis):
    stored = weight(scheme, axis)._stored()
    jax.tree.map(np.testing.assert_array_equal, tiles.from_tiles(tiles.to_tiles(stored, axis), axis), stored)


def expand(p, y_at: int, tiled: bool = True) -> str:
    """Writes the values of a weight by the C function; returns what it says is wrong, or ""."""
    function = native.loaded()[0].llm_jax_expanded_weight
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.POINTER(CProduct), ctypes.c_int64, ctypes.c_int64]
    arrays = p.tiles()
    request = p.request(y_at, arrays["codes"].ctypes.data, 0, arrays["scale"].ctypes.data)
    request.tiled, request.scale.tiled = tiled, tiled
    return (function(request, 0, 2) or b"").decode()


@pytest.mark.parametrize("format", FORMATS)
def test_an_expansion_writes_only_its_result(format):
    p = draw(format, 384, 144, 1, group=64, scale="float16")
    result = np.full((384, 144), np.nan, np.float32)
    with guarded(result) as y:
        assert not expand(p, y)
        ctypes.memmove(result.ctypes.data, y, result.nbytes)
    np.testing.assert_allclose(result, p.weight(), rtol=1e-6)


def test_an_expansion_refuses_codes_in_rows():
    p = draw("int4", 192, 80, 1, group=64)
    assert expand(p, p.no_result().ctypes.data, tiled=False) == "the layout of the codes"


@pytest.mark.parametrize(
    ("shape", "scheme", "axis", "reason"),
    [
        ((96, 48), "int4:64", IN, ""),
        ((96, 40), "int4:64", IN, "no whole tiles"),
        ((96, 48), "int4:4", IN, "no whole tiles"),
        ((94, 48), "int8", IN, "no whole tiles"),
        ((96, 48), "int8", OUT, ""),
        ((90, 48), "int8", OUT, "90 outputs"),
        ((96, 42), "int8", OUT, "42 bytes"),
        ((96, 64), "nf4", OUT, "quantized scales"),
        ((2, 96, 48), "int8", IN, r"shape \(2, 96, 48\)"),
        ((96, 48), "fp8_e4m3", IN, "no kernel"),
    ],
)
def test_weights_without_tiles_are_named(shape, scheme, axis, reason):
    result = tiles.unsupported_reason(shape, number_formats.scheme(scheme), axis)
    assert re.search(reason, result) if reason else not result
