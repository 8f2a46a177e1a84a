"""Products of int8 activations and int8 weights in C++ against exact integers."""

import ctypes

import jax
import numpy as np
import pytest

from llm_jax.kernels import cpu_product, matmul, native
from tests.kernels.test_cpu_product import available, guarded

pytestmark = pytest.mark.usefixtures("compiled_kernels")
SHAPES = ((1, 1, 1), (1, 192, 70), (3, 100, 64), (13, 67, 129), (6, 576, 33))  # rows, inputs, outputs


class CIntegerProduct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x x_scale codes scale y".split()),
        *((name, ctypes.c_int64) for name in "rows inputs outputs by_output scales".split()),
    ]


def draw(rows: int, inputs: int, outputs: int, by_output: bool, scales: int = 0) -> dict[str, np.ndarray]:
    r = np.random.default_rng(0)
    x = r.integers(-128, 128, (rows, inputs), np.int8)
    codes = r.integers(-128, 128, (outputs, inputs) if by_output else (inputs, outputs), np.int8)
    x_scale, scale = (r.uniform(0.01, 1, n).astype(np.float32) for n in (rows, scales or outputs))
    return {"x": x, "x_scale": x_scale, "codes": codes, "scale": scale}


def run(operands: dict[str, np.ndarray], by_output: bool, threads: int = 1, **fields: int) -> np.ndarray:
    """Raises ValueError if the kernel refuses the sizes; `fields` replace those of the C struct."""
    library, reason = native.loaded()
    assert library is not None, reason
    function = library.llm_jax_integer_product
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.POINTER(CIntegerProduct), ctypes.c_int64]
    (rows, inputs), outputs = operands["x"].shape, operands["codes"].shape[0 if by_output else 1]
    y = np.full((rows, outputs), np.nan, np.float32)
    addresses = {name: array.ctypes.data for name, array in operands.items()}
    request = CIntegerProduct(
        **addresses, y=y.ctypes.data, rows=rows, inputs=inputs, outputs=outputs, by_output=int(by_output),
        scales=operands["scale"].size,
    )  # fmt: skip
    for name, value in fields.items():
        setattr(request, name, value)
    if reason := function(ctypes.byref(request), threads):
        raise ValueError(reason.decode())
    return y


def exact(operands: dict[str, np.ndarray], by_output: bool) -> np.ndarray:
    codes = operands["codes"].T if by_output else operands["codes"]
    total = (operands["x"].astype(np.int64) @ codes.astype(np.int64)).astype(np.float32)
    return total * operands["x_scale"][:, None] * operands["scale"]


@pytest.fixture(autouse=True)
def instructions(compiled_kernels):
    if not available("avx512_vnni"):
        pytest.skip("this CPU has no avx512_vnni")


@pytest.mark.parametrize("by_output", [False, True])
def test_products_are_exact(by_output):
    for shape in SHAPES:
        for scales in (0, 1):
            operands = draw(*shape, by_output, scales)
            for threads in (1, 3):
                np.testing.assert_array_equal(run(operands, by_output, threads), exact(operands, by_output))


@pytest.mark.parametrize("by_output", [False, True])
def test_nothing_beyond_an_operand_is_read_or_written(by_output):
    operands = draw(7, 67, 77, by_output)
    expected = exact(operands, by_output)
    for name in operands:
        with guarded(operands[name]) as address:
            np.testing.assert_array_equal(run(operands, by_output, **{name: address}), expected)
    result = np.zeros_like(expected)
    with guarded(result) as y:
        run(operands, by_output, y=y)
        ctypes.memmove(result.ctypes.data, y, result.nbytes)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": -1}, "the shape of the operands"),
        ({"inputs": 0}, "the shape of the operands"),
        ({"inputs": 2**40}, "the size of the operands"),
        ({"outputs": 2**40}, "the size of the operands"),
        ({"scales": 5}, "the shape of the scales"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        run(draw(2, 64, 70, False), False, **change)


@pytest.mark.parametrize("axis", [-2, -1])
def test_the_entry_point_uses_it_and_equals_xla(axis, monkeypatch):
    operands = draw(6, 64, 70, axis == -1)
    arguments = operands["x"].reshape(2, 3, 64), operands["x_scale"].reshape(2, 3, 1), operands["codes"]
    arguments = (*arguments, operands["scale"].reshape((1, 70) if axis == -2 else (70, 1)))
    function = jax.jit(lambda *arguments: matmul.integer_product(*arguments, axis))
    got = function(*arguments)
    assert "llm_jax_integer_product" in function.lower(*arguments).as_text()
    monkeypatch.setenv(native.SETTING, "xla")
    by_xla = jax.jit(lambda *arguments: matmul.integer_product(*arguments, axis))(*arguments)
    np.testing.assert_array_equal(got, by_xla)
    reason = cpu_product.unsupported_integer_reason(arguments[0], arguments[2])
    assert reason == "XLA computes everything"
