"""The kernels in C++ against float64, over odd shapes, group sizes, instruction sets, threads, NaN and inf."""

import contextlib
import ctypes
import dataclasses
import mmap
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import compiler, cpu_product, native, number_formats
from tests.kernels import random_products
from tests.kernels.random_products import draw

pytestmark = pytest.mark.usefixtures("compiled_kernels")
PATHS = native.PATHS[1:]
FORMATS = {
    "int8": {},
    "int8 groups": {"group": 32, "scale": "float16"},
    "int8 tensor": {"one_scale": True},
    "uint8": {"offset": True},
    "int4": {"group": 32, "scale": "float16"},
    "int4 channel": {},
    "int4 small": {"group": 8, "scale": "float16"},
    "int4 long": {"group": 192},
    "uint4": {"group": 32, "scale": "float16", "offset": True},
    "int2": {"group": 32, "scale": "float16"},
    "int2 small": {"group": 4},
    "uint2": {"group": 64, "scale": "float16", "offset": True},
    "nf4": {"group": 64, "scale": "nested"},
    "nf4 small": {"group": 2},
    "e2m1": {"group": 32, "scale": "e8m0"},
}
SHAPES = ((192, 1, 1), (384, 70, 1), (192, 129, 3), (576, 256, 2), (384, 68, 16))


def available(path: str) -> bool:
    library, reason = native.loaded()
    assert library is not None, reason
    return bool(library.llm_jax_has_path(native.PATHS.index(path)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_those_in_float64(name, by_output, path):
    """As exact as float32: the bound is that of a sum of rounded products."""
    if not available(path):
        pytest.skip(f"this CPU has no {path}")
    for p, expected, size in random_products.references(name.split()[0], SHAPES, by_output, False, **FORMATS[name]):
        error = np.abs(p.run(path) - expected) / size
        assert error.max() < 4e-7, (p.x.shape, expected.shape)


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_sums_of_the_largest_terms_do_not_overflow(name, by_output, blockwise):
    """Activations whose digits are extreme (base 256: 127, -128, -128; base 4096: 2024, -128) times equal codes.

    The bound is that of a float32 sum of 768 terms, which all round to the same side. An overflow exceeds it by far.
    """
    p = draw(name.split()[0], 768, 70, 4, by_output=by_output, **FORMATS[name] | {"offset": False})
    p.x[:] = 127 * 65536 - 128 * 256 - 128
    p.x[1] *= -1
    p.x[2:, ::2] *= -1
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        p.codes.view(np.uint8)[:] = byte
        w = p.weight(random_products.ROUNDED_TABLES if blockwise else None)
        for path in filter(available, PATHS):
            error = np.abs(p.run(path, blockwise=blockwise) - p.x.astype(np.float64) @ w) / (np.abs(p.x) @ np.abs(w))
            assert not error.max() > 768 * 2.0**-24, (path, byte)  # NaN where all values are 0


@pytest.mark.parametrize("by_output", [False, True])
def test_tables_of_two_bits_need_not_be_consecutive(by_output, monkeypatch):
    monkeypatch.setitem(random_products.TABLES, "int2", np.array([-1.5, 0.25, 1, 4], np.float32))
    p = draw("int2", 192, 70, 3, group=64, by_output=by_output)
    for path in filter(available, PATHS):
        np.testing.assert_allclose(p.run(path), p.x.astype(np.float64) @ p.weight(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("name", ["int4", "int8", "nf4", "e2m1"])
def test_results_depend_neither_on_threads_nor_on_other_rows(name, by_output):
    p = draw(name, 1024, 1000, 5, by_output=by_output, **FORMATS[name])
    whole = p.run()
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(p.run(threads=threads), whole)
    for row in range(5):
        np.testing.assert_array_equal(dataclasses.replace(p, x=p.x[row : row + 1].copy()).run(), whole[row : row + 1])


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("path", ["auto", "portable"])
def test_weights_of_one_call_have_the_results_of_calls_of_their_own(path, by_output, blockwise):
    """On several threads, whose parts end within a tile, after one output, and at the end of a weight."""
    products = [draw("int4", 1024, n, 3, group=32, by_output=by_output, seed=n) for n in (500, 65, 64, 129)]
    products = [dataclasses.replace(p, x=products[0].x) for p in products]
    alone = [p.run(path, blockwise=blockwise) for p in products]
    for threads in (1, 3, 7):
        results = [p.no_result() for p in products]
        requests = [p.request(y.ctypes.data) for p, y in zip(products, results, strict=True)]
        assert not random_products.call(requests, path, threads, blockwise)
        for result, expected in zip(results, alone, strict=True):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize(
    ("format", "change", "reason"),
    [
        ("int8", {"rows": 2}, "one of several weights"),
        ("int8", {"inputs": 256}, "one of several weights"),
        ("int8", {"group": 64}, "one of several weights"),
        ("int4", {"bits": 2}, "one of several weights"),
        ("int8", {"kind": 1}, "one of several weights"),
        ("int8", {"by_output": 1}, "one of several weights"),
        ("int8", {"x": 0}, "one of several weights"),
        ("int8", {"outputs": -1}, "the shape of the operands"),
    ],
)
def test_a_second_weight_that_does_not_fit_is_refused(format, change, reason, blockwise):
    p = draw(format, 128, 70, 1, one_scale=True)
    requests = [p.request(p.no_result().ctypes.data) for _ in range(2)]
    for name, value in change.items():
        setattr(requests[1], name, value)
    assert random_products.call(requests, "auto", 1, blockwise) == reason


@pytest.mark.parametrize("sanitizer", ["", pytest.param("-fsanitize=thread", marks=pytest.mark.slow)])
def test_threads_that_wait_get_the_next_task(sanitizer, tmp_path):
    """Also with several callers at once, whose parts run once each; see crew.cc."""
    program, source = tmp_path / "crew", pathlib.Path(__file__).with_name("crew.cc")
    flags = ("-O1", "-std=c++17", "-pthread", f"-I{compiler.SOURCES}", *filter(None, [sanitizer]))
    subprocess.run([compiler.find_compiler(), *flags, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("name", ["int4", "int8", "nf4"])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_stays_so_in_its_row(path, name, by_output):
    """NaN, inf and magnitudes at the ends of the range, each in a row of its own."""
    if not available(path):
        pytest.skip(f"this CPU has no {path}")
    p = draw(name, 64, 70, 7, group=32, by_output=by_output)
    w = p.weight()
    plain = p.run(path)
    p.x[0, 5], p.x[1, 5], p.x[2, 5], p.x[2, 6] = np.nan, np.inf, np.inf, -np.inf
    p.x[3], p.x[4], p.x[5, 7] = p.x[3] * 1e30, p.x[4] * 1e-30, 1e6
    with np.errstate(invalid="ignore"):
        expected, got = p.x.astype(np.float64) @ w, p.run(path)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
    np.testing.assert_array_equal(got[6], plain[6])
    # An activation may be rounded as the largest of its row is; the row with one of a million needs that bound.
    x = np.abs(p.x[3:].astype(np.float64))
    bound = 4e-7 * x @ np.abs(w) + 2.0**-23 * x.max(1, keepdims=True) * np.abs(w).sum(0)
    assert (np.abs(got[3:] - expected[3:]) < bound).all()


@pytest.mark.parametrize("by_output", [False, True])
def test_scales_that_are_not_finite_reach_their_outputs_only(by_output):
    p = draw("int8", 128, 70, 2, group=32, by_output=by_output)
    p.scale[(69, 3) if by_output else (3, 69)] = np.nan
    got = p.run()
    assert np.isnan(got[:, 69]).all() and np.isfinite(got[:, :69]).all()


def test_zeros_and_exact_numbers_are_exact():
    p = draw("int4", 96, 66, 3, group=32)
    p.x[0], p.x[1], p.x[2] = 0, np.eye(96, dtype=np.float32)[40], np.arange(96) - 50.0
    expected = p.x.astype(np.float64) @ p.weight()
    np.testing.assert_array_equal(p.run()[:2], expected[:2].astype(np.float32))
    np.testing.assert_allclose(p.run()[2], expected[2], rtol=1e-6, atol=1e-5)


@contextlib.contextmanager
def guarded(array: np.ndarray) -> Iterator[int]:
    """The address of a copy of `array` that ends where memory that cannot be read begins."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(base + size, page, 0) == 0
    address = base + size - array.nbytes
    ctypes.memmove(address, array.ctypes.data, array.nbytes)
    yield address
    assert protect(base + size, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_nothing_beyond_an_operand_is_read_or_written(name, by_output):
    """Every operand ends at a page without access: a read beyond it ends the process."""
    inputs = 192 if "scale" in FORMATS[name] or "group" in FORMATS[name] else 100
    for path in filter(available, PATHS):
        p = draw(name.split()[0], inputs, 77, 3, by_output=by_output, **FORMATS[name])
        result = np.zeros((3, 77), np.float32)
        with guarded(p.x) as x, guarded(p.codes) as codes, guarded(result) as y, guarded(p.scale) as scale:
            p.run(path, x_at=x, codes_at=codes, y_at=y, scale_at=scale)
            ctypes.memmove(result.ctypes.data, y, result.nbytes)
        np.testing.assert_array_equal(result, p.run(path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": -1}, "the shape of the operands"),
        ({"inputs": 0}, "the shape of the operands"),
        ({"outputs": 2**40}, "the size of the operands"),
        ({"inputs": 2**32}, "the size of the operands"),
        ({"bits": 3}, "the bits of a code"),
        ({"bits": 8}, "the codes"),
        ({"group": 0}, "the size of a group"),
        ({"group": -32}, "the size of a group"),
        ({"group": 48}, "the size of a group"),
        ({"group": 1}, "the size of a group"),
        ({"outputs": 71}, "the shape of the scales"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, reason):
    p = draw("int4", 64, 70, 2, group=32)
    with pytest.raises(ValueError, match=reason):
        p.run(**change)


def test_each_choice_has_a_reason():
    def unsupported_reason(name, x, accumulate="float32", contracted=0, axis=-2):
        s = number_formats.scheme(name)
        f = number_formats.FORMATS[s.format]
        codes = jax.ShapeDtypeStruct((x.shape[-1] * f.bits // 8, 8), f.dtype)
        return cpu_product.unsupported_reason(x, (codes, None, None), s, axis, contracted, accumulate)

    x = jnp.ones((1, 64))
    for name in ("int8", "int8_affine", "int4:64", "int2", "nf4", "mxfp4"):
        assert unsupported_reason(name, x) == ""
    assert unsupported_reason("int8", x.astype(jnp.bfloat16)) == "bfloat16 activations with float32 sums"
    assert unsupported_reason("fp8_e4m3", x) == "the format e4m3 has no kernel"
    assert unsupported_reason("int4", jnp.ones((17, 64))) == "17 rows of activations; the kernels of int4 take 1 to 16"
    assert unsupported_reason("int8", jnp.ones((0, 64))) == "0 rows of activations; the kernels of int8 take 1 to 4"
    assert unsupported_reason("int8", x, contracted=1) == "the groups do not lie along the contracted axis"
    assert unsupported_reason("int8", x.astype(jnp.bfloat16), "bfloat16") == "bfloat16 activations with bfloat16 sums"


def run_sanitized(statements: str, tmp_path: pathlib.Path, *flags: str) -> None:
    """Executes Python statements in a process whose kernels are instrumented; `t` is this module."""
    program = compiler.find_compiler()
    library = tmp_path / "kernels.so"
    sanitize = ("-g", "-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=all")
    flags = ("-O1", *compiler.FLAGS[1:], *sanitize, f"-I{compiler.SOURCES}", "-DLLM_JAX_WITHOUT_XLA", *flags)
    library.write_bytes(compiler.compile_library(program, flags))
    runtime = subprocess.run([program, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    script = (
        "import ctypes, itertools; from llm_jax.kernels import native\n"
        f"library = ctypes.CDLL({str(library)!r}); native.loaded = lambda: (library, '')\n"
        "from tests.kernels import test_cpu_attention, test_cpu_blockwise as b, test_cpu_dense, test_cpu_integers\n"
        f"from tests.kernels import test_cpu_product as t, test_tiles\n{statements}print('passed')\n"
    )
    environment = os.environ | {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "passed", done.stderr[-2000:]


@pytest.mark.slow
def test_address_sanitizer_finds_nothing(tmp_path):
    statements = (
        "for name, by_output, path in itertools.product(t.FORMATS, (False, True), filter(t.available, t.PATHS)):\n"
        "    t.test_products_equal_those_in_float64(name, by_output, path)\n"
        "for name, by_output, path in itertools.product(b.ALL_FORMATS, (False, True), filter(t.available, t.PATHS)):\n"
        "    b.check_products(name, by_output, path)\n"
        "for name, scale in itertools.product(test_tiles.FORMATS, ('float16', 'nested')):\n"
        "    test_tiles.test_products_equal_those_of_rows(name, scale, False)\n"
        "    test_tiles.test_products_equal_those_of_rows(name, scale, True)\n"
        "    test_tiles.test_an_expansion_writes_only_its_result(name)\n"
        "for dtype, path in itertools.product(('float32', 'bfloat16', 'int8'), filter(t.available, t.PATHS[:3])):\n"
        "    test_cpu_attention.test_attention_equals_the_formula_in_float64(path, dtype)\n"
        "for by_output in (False, True):\n"
        "    test_cpu_dense.test_products_equal_those_in_float64(by_output)\n"
        "for by_output in (False, True) if t.available('avx512_vnni') else ():\n"
        "    test_cpu_integers.test_products_are_exact(by_output)\n"
    )
    run_sanitized(statements, tmp_path)
