"""Products of activations in 8 bits by the kernels in C++ against float64 products of the same rounded activations."""

import ctypes
import dataclasses
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import weights
from llm_jax.errors import UserError
from llm_jax.kernels import compiler, cpu_product, matmul, native, number_formats
from tests.kernels import random_products
from tests.kernels.random_products import draw
from tests.kernels.test_cpu_product import FORMATS, available, guarded

PATHS = ("portable", "avx2", "avx512_vnni")  # avx512 rounds as avx512_vnni does and multiplies by the source of avx2

SHAPES = ((192, 1, 1), (384, 70, 1), (192, 129, 4), (576, 256, 2), (384, 68, 13))  # inputs, outputs, rows
MORE_FORMATS = {
    "int8 odd": {"group": 6},
    "int8 long": {"group": 48},
    "uint8 small": {"group": 16, "offset": True},
    "uint4 small": {"group": 16, "offset": True, "scale": "float16"},
    "int4 odd": {"group": 48},
    "int2 long": {"group": 192},
}
ALL_FORMATS = FORMATS | MORE_FORMATS


@pytest.fixture(autouse=True)
def kernels(compiled_kernels):
    pass


def check_products(name: str, by_output: bool, path: str) -> None:
    dirty = draw("int8", 1024, 8, 16, by_output=by_output)  # it stays in the memory that the next product uses
    dirty.x[::2] = np.nan
    for p, expected, size in random_products.references(name.split()[0], SHAPES, by_output, True, **ALL_FORMATS[name]):
        dirty.run(path, blockwise=True)
        error = np.abs(p.run(path, blockwise=True) - expected) / size
        assert error.max() < 1e-6, (p.x.shape, expected.shape)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("name", ALL_FORMATS)
def test_products_equal_those_of_rounded_activations(name, by_output, path):
    if not available(path):
        pytest.skip(f"this CPU has no {path}")
    check_products(name, by_output, path)


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("options", [{"group": 32, "scale": "float16"}, {"group": 128}, {}])
def test_results_depend_neither_on_threads_nor_on_other_rows(options, by_output):
    p = draw("int4", 1024, 500, 101, by_output=by_output, **options)
    result = p.run(blockwise=True)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(p.run(threads=threads, blockwise=True), result)
    for row in (0, 31, 100):  # 31 is the last row of a part that is rounded by one thread
        one_row = dataclasses.replace(p, x=p.x[row : row + 1].copy())
        np.testing.assert_array_equal(one_row.run(blockwise=True), result[row : row + 1])


@pytest.mark.parametrize("path", PATHS)
def test_nested_scales_of_one_output_do_not_depend_on_the_number_of_rows(path):
    """A multiplication and an addition that compilers join in one function and not in another."""
    if not available(path):
        pytest.skip(f"this CPU has no {path}")
    for seed in range(8):
        p = draw("int8", 96, 1, 31, group=32, scale="nested", seed=seed)
        result = p.run(path, blockwise=True)
        for row in (0, 7, 30):
            one_row = dataclasses.replace(p, x=p.x[row : row + 1].copy())
            np.testing.assert_array_equal(one_row.run(path, blockwise=True), result[row : row + 1])


def test_a_weight_longer_than_a_part_of_the_tile():
    """Tiles are expanded in parts of 128 blocks."""
    p = draw("nf4", 12800, 66, 7, group=64)
    x, w = p.rounded(), p.weight(random_products.ROUNDED_TABLES)
    error = np.abs(p.run(blockwise=True) - x @ w) / (np.abs(x) @ np.abs(w))
    assert error.max() < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("by_output", [False, True])
def test_a_row_that_is_not_finite_becomes_nan(by_output, path):
    """And magnitudes at the ends of the range are rounded as all others."""
    if not available(path):
        pytest.skip(f"this CPU has no {path}")
    for rows in (1, 7):
        p = draw("int4", 64, 70, rows, group=32, by_output=by_output)
        plain = p.run(path, blockwise=True)
        for value in (np.nan, np.inf, -np.inf):
            p.x[0, 5] = value
            result = p.run(path, blockwise=True)
            assert np.isnan(result[0]).all()
            np.testing.assert_array_equal(result[1:], plain[1:])
    p.x[0], p.x[1], p.x[2] = p.x[1] * 1e30, p.x[1] * 1e-25, p.x[1] * 1e-38
    result, x = p.run(path, blockwise=True), p.rounded()
    np.testing.assert_allclose(result[:2], (x @ p.weight())[:2], rtol=1e-4)
    assert (result[2] == 0).all()


@pytest.mark.parametrize("by_output", [False, True])
def test_zeros_and_small_integers_are_exact(by_output):
    p = draw("int8", 64, 70, 2, group=64, by_output=by_output)
    p.scale[:] = 0.5
    p.x[0], p.x[1] = 0, np.arange(64) - 31
    p.x[1, ::32] = 127  # the scale of both blocks is 1
    np.testing.assert_array_equal(p.run(blockwise=True), p.x.astype(np.float64) @ p.weight())


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("name", ALL_FORMATS)
def test_nothing_beyond_an_operand_is_read_or_written(name, by_output):
    """Every operand ends at a page without access: a read beyond it ends the process."""
    for path in filter(available, PATHS):
        for rows in (1, 3):
            inputs = 192 if "scale" in ALL_FORMATS[name] or "group" in ALL_FORMATS[name] else 100
            p = draw(name.split()[0], inputs, 77, rows, by_output=by_output, **ALL_FORMATS[name])
            result = np.zeros((rows, 77), np.float32)
            with guarded(p.x) as x, guarded(p.codes) as codes, guarded(result) as y, guarded(p.scale) as scale:
                p.run(path, x_at=x, codes_at=codes, y_at=y, scale_at=scale, blockwise=True)
                ctypes.memmove(result.ctypes.data, y, result.nbytes)
            np.testing.assert_array_equal(result, p.run(path, blockwise=True))


def test_the_rounding_of_a_block_writes_its_codes_only(tmp_path):
    """Other threads round the blocks beside it; see rounding.cc."""
    program, source = tmp_path / "rounding", pathlib.Path(__file__).with_name("rounding.cc")
    flags = ("-O1", "-std=c++17", "-pthread", "-w", f"-I{compiler.SOURCES}")
    subprocess.run([compiler.find_compiler(), *flags, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": -1}, "the shape of the operands"),
        ({"inputs": 2**32}, "the size of the operands"),
        ({"group": 48}, "the size of a group"),
        ({"outputs": 71}, "the shape of the scales"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, reason):
    p = draw("int4", 64, 70, 2, group=32)
    with pytest.raises(ValueError, match=reason):
        p.run(**change, blockwise=True)


@pytest.mark.parametrize("name", ["int4", "int8", "int2_affine", "nf4", "mxfp4"])
def test_kernels_equal_xla_for_one_weight_and_for_several(name, monkeypatch):
    """Three weights of one scheme share a custom call, and the products are those of XLA."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 128))
    to_qtensor = jax.jit(weights.to_qtensor, static_argnums=(1, 2))
    ws = [to_qtensor(jax.random.normal(jax.random.key(n), (128, n)), name, weights.IN) for n in (64, 32, 64)]
    ws = weights.with_activations(ws, "int8")

    def products(x, ws):
        return weights.dots(x, ws, accumulate=jnp.float32, gathered=[None] * len(ws))

    function = jax.jit(products)
    results = function(x, ws)
    assert function.lower(x, ws).as_text().count("@llm_jax_blockwise_product") == 1
    gradient = jax.jit(jax.grad(lambda x: sum(y.sum() for y in products(x, ws))))(x)
    dense = [np.asarray(w) for w in jax.jit(lambda ws: [weights.dense(w) for w in ws])(ws)]
    np.testing.assert_allclose(gradient[0, 0], sum(w.sum(1) for w in dense), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(results[1], jax.jit(weights.dot)(x, ws[1]))
    monkeypatch.setenv(native.SETTING, "xla")
    by_xla = jax.jit(lambda x, ws: [weights.dot(x, w) for w in ws])(x, ws)
    for result, reference, w in zip(results, by_xla, dense, strict=True):
        np.testing.assert_allclose(result, reference, rtol=1e-5, atol=1e-5)
        exact = np.asarray(x) @ w
        assert 1e-4 < jnp.abs(result - exact).max() / jnp.abs(exact).max() < 2e-2  # activations are rounded


def test_smoothed_weights_tables_and_fake_weights_round_the_activations():
    """Weights with and without a smoothing vector do not share the activations."""
    x, numbers = jax.random.normal(jax.random.key(0), (3, 96)), jax.random.normal(jax.random.key(1), (96, 64))
    plain = weights.to_qtensor(numbers, "int4+a8", weights.IN)
    smoothed = dataclasses.replace(plain, smooth=jnp.linspace(0.5, 2, 96, dtype=jnp.float16))
    fake = weights.FakeQuant(numbers, None, None, None, "int4+a8", weights.IN)
    x_smoothed = x * smoothed.smooth.astype(jnp.float32)
    for pair in ((plain, smoothed), (smoothed, smoothed)):
        products = weights.dots(x, list(pair), accumulate=jnp.float32, gathered=[None, None])
        for w, y in zip(pair, products, strict=True):
            expected = matmul.round_blocks(x if w is plain else x_smoothed, 32) @ weights.dense(plain)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weights.dot(x, fake), weights.dot(x, plain), rtol=1e-5, atol=1e-5)
    table = weights.to_qtensor(numbers.T, "int4+a8", weights.OUT)
    expected = matmul.round_blocks(x, 32) @ weights.dense(table).T
    np.testing.assert_allclose(weights.dot(x, table, transposed=True), expected, rtol=1e-5, atol=1e-5)
    assert weights.dot(x[:0], plain).shape == (0, 64)


def test_rounding_of_activations_equals_that_of_the_kernel():
    p = draw("int8", 200, 3, 4, group=40)
    np.testing.assert_allclose(matmul.round_blocks(jnp.asarray(p.x), 40), p.rounded(), rtol=1e-6)
    p.x[1, 5], p.x[2, 50] = np.nan, np.inf
    result = np.asarray(matmul.round_blocks(jnp.asarray(p.x), 40))
    assert np.isnan(result[1, :32]).all() and np.isnan(result[2, 40:72]).all() and np.isnan(result).sum() == 64


def test_only_weights_with_such_products_are_changed():
    w = jax.random.normal(jax.random.key(0), (64, 32))
    tree = {name: weights.to_qtensor(w, name, weights.IN) for name in ("int4:64", "w8a8", "fp8_e4m3")} | {"array": w}
    changed = weights.with_activations(tree, "int8")
    assert [changed[name].scheme for name in ("int4:64", "w8a8", "fp8_e4m3")] == ["int4:64+a8", "w8a8", "fp8_e4m3"]
    assert changed["array"] is w
    assert weights.with_activations(changed, "int8") == changed and weights.with_activations(tree, "float") is tree
    with pytest.raises(UserError, match="--activations=int8 expects weights that are quantized"):
        weights.with_activations({"array": w, "fp8": tree["fp8_e4m3"]}, "int8")
    with pytest.raises(UserError, match="activations='int4'; expected one of float, int8"):
        weights.with_activations(tree, "int4")
    with pytest.raises(UserError, match=r"the scheme 'w8a8\+a8': \+a8 expects integers, NF4 or MXFP4 as weights"):
        number_formats.scheme("w8a8+a8")


def test_each_choice_has_a_reason():
    codes = jnp.ones((64, 8), jnp.int8), None, None
    s = number_formats.scheme("int8+a8")
    assert cpu_product.unsupported_blockwise_reason(jnp.ones((600, 64)), codes, s, -2, 0) == ""
    reason = cpu_product.unsupported_blockwise_reason(jnp.ones((0, 64)), codes, s, -2, 0)
    assert reason == "no activations"
    reason = cpu_product.unsupported_blockwise_reason(jnp.ones((1, 8)), codes, s, -2, 1)
    assert reason == "the groups do not lie along the contracted axis"
