"""Products with bfloat16 weights in C++ against float64."""

import ctypes

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llm_jax import weights
from llm_jax.kernels import cpu_dense, native
from tests.kernels.test_cpu_product import PATHS, available, guarded

pytestmark = pytest.mark.usefixtures("compiled_kernels")
SHAPES = ((1, 1, 1), (2, 67, 129), (4, 192, 577), (1, 576, 70))  # rows, inputs, outputs


class CProduct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x w y".split()),
        *((name, ctypes.c_int64) for name in "rows inputs outputs by_output".split()),
    ]


def draw(rows: int, inputs: int, outputs: int, by_output: bool) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.default_rng(0)
    shapes = (rows, inputs), (outputs, inputs) if by_output else (inputs, outputs)
    x, w = (r.normal(0, 1, shape).astype(ml_dtypes.bfloat16) for shape in shapes)
    return x, w


def run(
    activations: np.ndarray, weight: np.ndarray, by_output: bool, path: str = "auto", threads: int = 1, **fields: int
) -> np.ndarray:
    """Raises ValueError if the kernel refuses the sizes; `fields` replace those of the C struct."""
    library, reason = native.loaded()
    assert library is not None, reason
    function = library.llm_jax_bfloat16_product
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.POINTER(CProduct), ctypes.c_int64, ctypes.c_int64]
    outputs = weight.shape[0 if by_output else 1]
    y = np.full((activations.shape[0], outputs), np.nan, np.float32)
    request = CProduct(
        activations.ctypes.data, weight.ctypes.data, y.ctypes.data, *activations.shape, outputs, int(by_output)
    )
    for name, value in fields.items():
        setattr(request, name, value)
    if reason := function(ctypes.byref(request), native.PATHS.index(path), threads):
        raise ValueError(reason.decode())
    return y


@pytest.mark.parametrize("by_output", [False, True])
def test_products_equal_those_in_float64(by_output):
    for path in filter(available, PATHS[:3]):
        for shape in SHAPES:
            x, w = draw(*shape, by_output)
            exact_x, exact_w = x.astype(np.float64), (w.T if by_output else w).astype(np.float64)
            got = run(x, w, by_output, path)
            error = np.abs(got - exact_x @ exact_w) / (np.abs(exact_x) @ np.abs(exact_w))
            assert error.max() < 4e-7, (path, shape)
            np.testing.assert_array_equal(run(x, w, by_output, path, threads=3), got)
            for row in range(len(x)):
                np.testing.assert_array_equal(run(x[row : row + 1], w, by_output, path), got[row : row + 1])


@pytest.mark.parametrize("by_output", [False, True])
def test_nothing_beyond_an_operand_is_read_or_written(by_output):
    x, w = draw(3, 67, 77, by_output)
    result = np.zeros((3, 77), np.float32)
    for path in filter(available, PATHS[:3]):
        with guarded(x) as x_at, guarded(w) as w_at, guarded(result) as y_at:
            run(x, w, by_output, path, x=x_at, w=w_at, y=y_at)
            ctypes.memmove(result.ctypes.data, y_at, result.nbytes)
        np.testing.assert_array_equal(result, run(x, w, by_output, path))


@pytest.mark.parametrize("by_output", [False, True])
def test_what_is_not_finite_reaches_its_row_and_its_outputs_only(by_output):
    x, w = draw(3, 64, 70, by_output)
    plain = run(x, w, by_output)
    x[0, 3] = np.nan
    w[(5, 7) if by_output else (7, 5)] = np.inf
    got = run(x, w, by_output)
    assert np.isnan(got[0]).all() and np.isinf(got[1:, 5]).all()
    np.testing.assert_array_equal(np.delete(got[1:], 5, 1), np.delete(plain[1:], 5, 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": -1}, "the shape of the operands"),
        ({"inputs": 0}, "the shape of the operands"),
        ({"outputs": 2**40}, "the size of the operands"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        run(*draw(2, 64, 70, False), False, **change)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_use_it_and_have_the_gradients_of_xla(transposed, monkeypatch):
    x, w = (jnp.asarray(a) for a in draw(1, 256, 512, transposed))

    def both(x, w):
        y, gradients = jax.vjp(lambda x, w: weights.dot(x, w, transposed, out_dtype="float32"), x, w)
        return y, gradients(jnp.cos(y))

    got = jax.jit(both)(x, w)
    assert "llm_jax_bfloat16_product" in jax.jit(both).lower(x, w).as_text()
    monkeypatch.setenv(native.SETTING, "xla")
    expected = jax.jit(lambda x, w: both(x, w))(x, w)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-4)
    for a, b in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), rtol=1e-2, atol=1e-2)


def test_each_choice_has_a_reason():
    def reason(rows, shape=(256, 512), dtype="bfloat16"):
        return cpu_dense.unsupported_reason(
            jax.ShapeDtypeStruct((rows, 256), dtype), jax.ShapeDtypeStruct(shape, dtype), "float32"
        )

    assert reason(1) == "" and reason(2) == "2 rows of activations; the kernel takes 1 to 1"
    assert reason(1, (256, 8)) == "a weight of the shape (256, 8), which XLA reads fast"
    assert reason(1, dtype="float32") == "float32 activations, float32 weights and float32 sums"
