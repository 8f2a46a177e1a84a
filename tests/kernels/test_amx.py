"""The kernels for AMX with its instructions computed in software (amx_model.h), against AVX-512 VNNI and float64.

The model was written from Intel's description of the instructions; no CPU with AMX runs these tests.
"""

import ctypes
import dataclasses
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.kernels import compiler, native
from tests.kernels import test_cpu_dense as dense
from tests.kernels import test_cpu_integers as integers
from tests.kernels.random_products import draw
from tests.kernels.test_cpu_blockwise import ALL_FORMATS
from tests.kernels.test_cpu_product import available, guarded, run_sanitized

pytestmark = pytest.mark.slow
AMX = "avx512_amx"
DIRECTORY = pathlib.Path(__file__).parent
MODEL = f'-DLLM_JAX_AMX_MODEL="{DIRECTORY / "amx_model.h"}"'


@pytest.fixture(scope="module")
def built(compiled_kernels, tmp_path_factory):
    if not available("avx512_vnni"):
        pytest.skip("this CPU has no avx512_vnni")
    flags = ("-O1", *compiler.FLAGS[1:], f"-I{compiler.SOURCES}", "-DLLM_JAX_WITHOUT_XLA", MODEL)
    path = tmp_path_factory.mktemp("amx") / "kernels.so"
    path.write_bytes(compiler.compile_library(compiler.find_compiler(), flags))
    return ctypes.CDLL(str(path))


@pytest.fixture(autouse=True)
def model(built, monkeypatch):
    monkeypatch.setattr(native, "loaded", lambda: (built, ""))


def test_it_is_the_fastest_path_and_can_be_disabled(built, monkeypatch):
    assert native.library() is built and native.PATHS[built.llm_jax_fastest_path()] == AMX
    assert native.amx_reason(built) == ""
    monkeypatch.setenv("LLM_JAX_CPU_PATH", "avx512_vnni")
    assert native.PATHS[native.library().llm_jax_fastest_path()] == "avx512_vnni"
    assert native.amx_reason(built) == "LLM_JAX_CPU_PATH=avx512_vnni"
    monkeypatch.delenv("LLM_JAX_CPU_PATH")
    native.library()


def test_another_path_of_the_first_call_does_not_disable_it_later(built, monkeypatch, tmp_path):
    """A copy of the library has variables of its own."""
    path = shutil.copy(built._name, tmp_path)
    library = ctypes.CDLL(path)
    monkeypatch.setattr(native, "loaded", lambda: (library, ""))
    for setting, expected in (("avx2", "avx2"), ("auto", AMX), ("avx512_vnni", "avx512_vnni"), (AMX, AMX)):
        monkeypatch.setenv("LLM_JAX_CPU_PATH", setting)
        assert native.PATHS[native.library().llm_jax_fastest_path()] == expected


@pytest.mark.parametrize("by_output", [False, True])
def test_products_of_integers_are_exact(by_output):
    for shape in ((16, 64, 16), (17, 1, 1), (32, 192, 70), (33, 100, 64), (50, 67, 129), (97, 576, 33)):
        for scales in (0, 1):
            operands = integers.draw(*shape, by_output, scales)
            for threads in (1, 3):
                np.testing.assert_array_equal(
                    integers.run(operands, by_output, threads), integers.exact(operands, by_output)
                )


@pytest.mark.parametrize("by_output", [False, True])
def test_nothing_beyond_integers_is_read_or_written(by_output):
    for inputs in (67, 128):
        operands = integers.draw(39, inputs, 77, by_output)
        expected = integers.exact(operands, by_output)
        for name in operands:
            with guarded(operands[name]) as address:
                np.testing.assert_array_equal(integers.run(operands, by_output, **{name: address}), expected)
        result = np.zeros_like(expected)
        with guarded(result) as y:
            integers.run(operands, by_output, y=y)
            ctypes.memmove(result.ctypes.data, y, result.nbytes)
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("name", ALL_FORMATS)
def test_products_of_rounded_activations_are_those_of_vnni(name, by_output):
    """Bit for bit, in whatever number of rows and threads."""
    for inputs, outputs, rows in ((192, 1, 16), (384, 70, 37), (192, 129, 100), (576, 256, 33)):
        p = draw(name.split()[0], inputs, outputs, rows, by_output=by_output, **ALL_FORMATS[name])
        expected = p.run("avx512_vnni", blockwise=True)
        np.testing.assert_array_equal(p.run(AMX, blockwise=True), expected)
        np.testing.assert_array_equal(p.run(AMX, threads=3, blockwise=True), expected)


def test_a_weight_longer_than_a_part_of_the_tile_and_rows_that_are_not_finite():
    p = draw("nf4", 12800, 66, 40, group=64)
    p.x[3, 7], p.x[20, 0] = np.nan, np.inf
    result = p.run(AMX, blockwise=True)
    np.testing.assert_array_equal(result, p.run("avx512_vnni", blockwise=True))
    assert np.isnan(result).any(1).nonzero()[0].tolist() == [3, 20]


@pytest.mark.parametrize("by_output", [False, True])
def test_products_in_bfloat16_equal_those_in_float64(by_output):
    for shape in ((1, 1, 1), (1, 576, 70), (2, 33, 577), (16, 32, 32), (17, 67, 129), (50, 192, 33)):
        x, w = dense.draw(*shape, by_output)
        exact_x, exact_w = x.astype(np.float64), (w.T if by_output else w).astype(np.float64)
        result = dense.run(x, w, by_output, AMX)
        error = np.abs(result - exact_x @ exact_w) / (np.abs(exact_x) @ np.abs(exact_w))
        assert error.max() < 4e-7, shape
        np.testing.assert_array_equal(dense.run(x, w, by_output, AMX, threads=3), result)
        for row in (0, len(x) - 1):
            np.testing.assert_array_equal(dense.run(x[row : row + 1], w, by_output, AMX), result[row : row + 1])
        if len(x) > 1:
            np.testing.assert_array_equal(dense.run(x, w, by_output), result)  # one row stays with AVX-512


@pytest.mark.parametrize("by_output", [False, True])
def test_what_is_not_finite_in_bfloat16_reaches_its_row_and_its_outputs_only(by_output):
    x, w = dense.draw(20, 33, 70, by_output)
    plain = dense.run(x, w, by_output, AMX)
    x[0, 32] = np.nan
    w[(5, 7) if by_output else (7, 5)] = np.inf
    result = dense.run(x, w, by_output, AMX)
    assert np.isnan(result[0]).all() and np.isinf(result[1:, 5]).all()
    np.testing.assert_array_equal(np.delete(result[1:], 5, 1), np.delete(plain[1:], 5, 1))


@pytest.mark.parametrize("by_output", [False, True])
def test_nothing_beyond_bfloat16_numbers_is_read_or_written(by_output):
    for inputs in (67, 64):
        x, w = dense.draw(19, inputs, 77, by_output)
        result = np.zeros((19, 77), np.float32)
        with guarded(x) as x_at, guarded(w) as w_at, guarded(result) as y_at:
            dense.run(x, w, by_output, AMX, x=x_at, w=w_at, y=y_at)
            ctypes.memmove(result.ctypes.data, y_at, result.nbytes)
        np.testing.assert_array_equal(result, dense.run(x, w, by_output, AMX))


@pytest.mark.parametrize("define", ["", "-DLLM_JAX_AMX_ASSUMED"])
def test_a_cpu_without_the_instructions_is_detected(built, tmp_path, define):
    """By what the CPU announces, and by a trial: the signal of an illegal instruction is caught, in its thread only."""
    cpu = pathlib.Path("/proc/cpuinfo").read_text()
    if "amx_tile" in cpu:
        pytest.skip("this CPU has AMX")
    flags = ("-std=c++17", "-pthread", f"-I{compiler.SOURCES}", *filter(None, [define]))
    program = tmp_path / "reason"
    source = DIRECTORY / "amx_reason.cc"
    subprocess.run([compiler.find_compiler(), *flags, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    trial = "the instructions fail in a trial, although the CPU announces them"
    assert done.stdout.strip() == (trial if define else "this CPU has no AMX")


def test_without_it_its_path_is_refused(built, monkeypatch):
    monkeypatch.undo()
    if available(AMX):
        pytest.skip("this CPU has AMX")
    monkeypatch.setenv("LLM_JAX_CPU_PATH", AMX)
    with pytest.raises(UserError, match="LLM_JAX_CPU_PATH=avx512_amx: this CPU has no AMX"):
        native.library()


def test_rows_can_be_replaced_without_another_result():
    """Of one product in a call of its own and in one with many rows: 16 by AMX, one by AVX-512 VNNI."""
    p = draw("int4", 1024, 130, 40, group=32)
    result = p.run(AMX, blockwise=True)
    for row in (0, 15, 16, 39):
        one = dataclasses.replace(p, x=p.x[row : row + 1].copy())
        np.testing.assert_array_equal(one.run(AMX, blockwise=True), result[row : row + 1])


def test_address_sanitizer_finds_nothing(tmp_path):
    statements = (
        "for by_output in (False, True):\n"
        "    operands = test_cpu_integers.draw(39, 67, 77, by_output)\n"
        "    test_cpu_integers.run(operands, by_output, 3)\n"
        "    test_cpu_dense.run(*test_cpu_dense.draw(39, 67, 77, by_output), by_output, threads=3)\n"
        "    for name, options in b.ALL_FORMATS.items():\n"
        "        p = t.draw(name.split()[0], 192, 70, 37, by_output=by_output, **options)\n"
        "        p.run('avx512_amx', threads=3, blockwise=True)\n"
    )
    run_sanitized(statements, tmp_path, MODEL)
