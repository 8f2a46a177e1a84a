"""The kernels on a 64-bit ARM CPU, which an emulator runs, against float64; with and without its 8-bit dot products."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from llm_jax.kernels import native
from tests.kernels import random_products, remote
from tests.kernels import test_cpu_attention as attention
from tests.kernels import test_cpu_blockwise as blockwise
from tests.kernels import test_cpu_dense as dense
from tests.kernels import test_cpu_integers as integers
from tests.kernels import test_cpu_product as quantized

pytestmark = pytest.mark.slow
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
CPUS = {"cortex-a53": ("portable",), "max": ("portable", "neon_dot")}  # the paths that each has


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    for name in (COMPILER, EMULATOR):
        if not shutil.which(name):
            pytest.skip(f"{name} is not installed")
    output = tmp_path_factory.mktemp("neon") / "remote"
    remote.build(COMPILER, output)
    return output


def emulated(program, cpu: str) -> list[str]:
    return [EMULATOR, "-cpu", cpu, str(program)]


def place(p: random_products.Product):
    """Places the operands of a product; see `remote.Calls.add`."""

    def request(calls: remote.Calls, y: int) -> ctypes.Structure:
        addresses = (calls.place(array) for array in (p.codes, p.x, p.scale))
        request = p.request(y, *addresses)
        if (table := random_products.TABLES.get(p.format)) is not None:
            request.table = calls.place(table)
        if p.inner is not None:
            request.scale.table, request.scale.inner = calls.place(random_products.DYNAMIC), calls.place(p.inner)
        if p.offset is not None:
            request.offset.data = calls.place(p.offset)
        return request

    return request


def errors(calls: remote.Calls, references, results) -> list[float]:
    """The largest error of each result, relative to the sums of the magnitudes of its terms."""
    return [
        float((np.abs(y - expected) / size).max()) for y, (_, expected, size) in zip(results, references, strict=True)
    ]


@pytest.mark.parametrize("cpu", CPUS)
def test_the_instructions_are_found_at_run_time(program, cpu):
    paths = [subprocess.run([*emulated(program, cpu), str(i)], check=False) for i in range(1, len(native.PATHS))]
    assert tuple(name for name, done in zip(native.PATHS[1:], paths, strict=True) if not done.returncode) == CPUS[cpu]


@pytest.mark.parametrize("function", ["quantized", "blockwise"])
@pytest.mark.parametrize(("cpu", "path"), [("cortex-a53", "auto"), ("max", "auto"), ("max", "portable")])
def test_products_equal_those_in_float64(program, tmp_path, cpu, path, function):
    """All formats and layouts, with guard pages behind the operands; one to three threads."""
    rounded = function == "blockwise"
    formats, shapes = (blockwise.ALL_FORMATS, blockwise.SHAPES) if rounded else (quantized.FORMATS, quantized.SHAPES)
    for by_output in (False, True):
        calls, references = remote.Calls(), []
        for name, options in formats.items():
            drawn = random_products.references(name.split()[0], shapes, by_output, rounded, **options)
            references += drawn
            for i, (p, expected, _) in enumerate(drawn):
                calls.add(function, path, place(p), expected.shape, threads=1 + i % 3)
        results = calls.run(emulated(program, cpu), tmp_path / "operands")
        largest = max(errors(calls, references, results))
        assert largest < (1e-6 if rounded else 4e-7), (by_output, largest)


@pytest.mark.parametrize("by_output", [False, True])
def test_a_row_has_the_same_result_in_any_number_of_rows(program, tmp_path, by_output):
    calls = remote.Calls()
    for format in ("int4", "uint8", "nf4"):
        p = random_products.draw(format, 192, 70, 7, group=64, by_output=by_output)
        rows = (p, *(random_products.dataclasses.replace(p, x=p.x[row : row + 1].copy()) for row in range(7)))
        for part in rows:
            calls.add("blockwise", "neon_dot", place(part), (len(part.x), 70))
    results = calls.run(emulated(program, "max"), tmp_path / "operands")
    for i in range(0, len(results), 8):
        np.testing.assert_array_equal(results[i], np.concatenate(results[i + 1 : i + 8]))


@pytest.mark.parametrize("by_output", [False, True])
def test_a_row_that_is_not_finite_becomes_nan(program, tmp_path, by_output):
    p = random_products.draw("int4", 64, 70, 7, group=32, by_output=by_output)
    p.x[1, 5], p.x[3, 6] = np.nan, np.inf
    calls = remote.Calls()
    calls.add("blockwise", "neon_dot", place(p), (7, 70))
    (result,) = calls.run(emulated(program, "max"), tmp_path / "operands")
    assert np.isnan(result).all(1).tolist() == [False, True, False, True, False, False, False]
    assert np.isfinite(np.delete(result, (1, 3), 0)).all()


def test_products_of_integers_are_exact(program, tmp_path):
    calls, expected = remote.Calls(), []
    for by_output in (False, True):
        for shape in integers.SHAPES:
            for scales in (0, 1):
                operands = integers.draw(*shape, by_output, scales)
                expected.append(integers.exact(operands, by_output))
                calls.add(
                    "integer", "auto", place_integers(operands, by_output), expected[-1].shape, threads=1 + scales
                )
    results = calls.run(emulated(program, "max"), tmp_path / "operands")
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, exact)


def place_integers(operands, by_output):
    def request(calls: remote.Calls, y: int) -> ctypes.Structure:
        (rows, inputs), outputs = operands["x"].shape, operands["codes"].shape[0 if by_output else 1]
        addresses = {name: calls.place(array) for name, array in operands.items()}
        return integers.CIntegerProduct(
            **addresses, y=y, rows=rows, inputs=inputs, outputs=outputs, by_output=by_output,
            scales=operands["scale"].size,
        )  # fmt: skip

    return request


def test_products_in_bfloat16_equal_those_in_float64(program, tmp_path):
    calls, references = remote.Calls(), []
    for by_output in (False, True):
        for shape in dense.SHAPES:
            x, w = dense.draw(*shape, by_output)
            exact_x, exact_w = x.astype(np.float64), (w.T if by_output else w).astype(np.float64)
            references.append((None, exact_x @ exact_w, np.abs(exact_x) @ np.abs(exact_w)))

            def request(calls, y, x=x, w=w, by_output=by_output, outputs=exact_w.shape[1]):
                return dense.CProduct(calls.place(x), calls.place(w), y, *x.shape, outputs, by_output)

            calls.add("bfloat16", "auto", request, references[-1][1].shape)
    assert max(errors(calls, references, calls.run(emulated(program, "max"), tmp_path / "operands"))) < 4e-7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_attention_equals_the_formula_in_float64(program, tmp_path, dtype):
    calls, cases = remote.Calls(), [attention.draw(shape, dtype) for shape in attention.SHAPES]
    for case in cases:

        def request(calls, y, case=case):
            names = "q k v k_scale v_scale mask bias".split()
            arrays = {name: getattr(case, name) for name in names}
            rows, queries, heads, width = case.q.shape
            return attention.CAttention(
                **{name: 0 if array is None else calls.place(array) for name, array in arrays.items()},
                y=y, rows=rows, queries=queries, keys=case.k.shape[1], heads=heads, kv_heads=case.k.shape[2],
                width=width, bias_rows=0,
                type=("float32", "bfloat16", "int8").index(case.k.dtype.name), softcap=case.softcap,
            )  # fmt: skip

        calls.add("attention", "auto", request, case.q.shape, threads=2)
    for case, result in zip(cases, calls.run(emulated(program, "max"), tmp_path / "operands"), strict=True):
        np.testing.assert_allclose(result, case.expected(), atol=2e-6)
