"""Attention over a cache in C++ against its formula in float64, and against the plain attention of the model."""

import ctypes
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llm_jax.kernels import cpu_attention, native
from llm_jax.model import attention_kernels
from llm_jax.model.attention import expand
from tests.kernels.test_cpu_product import PATHS, available, guarded

pytestmark = pytest.mark.usefixtures("compiled_kernels")
# rows, queries, keys, heads, heads of keys and values, width
SHAPES = ((1, 1, 1, 1, 1, 1), (2, 1, 37, 6, 2, 64), (3, 5, 70, 4, 4, 33), (1, 2, 300, 3, 1, 80))


class CAttention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in "q k v k_scale v_scale mask bias y".split()),
        *((name, ctypes.c_int64) for name in "rows queries keys heads kv_heads width bias_rows type".split()),
        ("softcap", ctypes.c_float),
    ]


@dataclasses.dataclass
class Case:
    """Random operands, as in cached_attention.cc."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_scale: np.ndarray | None
    v_scale: np.ndarray | None
    mask: np.ndarray
    bias: np.ndarray | None
    softcap: float

    def run(self, path: str = "auto", threads: int = 1, **fields: int) -> np.ndarray:
        """Raises ValueError if the kernel refuses the sizes; `fields` replace those of the C struct."""
        library, reason = native.loaded()
        assert library is not None, reason
        function = library.llm_jax_cached_attention
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.POINTER(CAttention), ctypes.c_int64, ctypes.c_int64]
        y = np.full(self.q.shape, np.nan, np.float32)
        addresses = {
            name: 0 if (array := getattr(self, name)) is None else array.ctypes.data
            for name in "q k v k_scale v_scale mask bias".split()
        }
        rows, queries, heads, width = self.q.shape
        request = CAttention(
            **addresses, y=y.ctypes.data, rows=rows, queries=queries, keys=self.k.shape[1], heads=heads,
            kv_heads=self.k.shape[2], width=width, bias_rows=0 if self.bias is None else len(self.bias),
            type=("float32", "bfloat16", "int8").index(self.k.dtype.name), softcap=self.softcap,
        )  # fmt: skip
        for name, value in fields.items():
            setattr(request, name, value)
        if reason := function(ctypes.byref(request), native.PATHS.index(path), threads):
            raise ValueError(reason.decode())
        return y

    def expected(self) -> np.ndarray:
        """The formula in float64, for queries that attend to a key."""
        k, v = (
            x.astype(np.float64) * (1 if scale is None else scale.astype(np.float64))
            for x, scale in ((self.k, self.k_scale), (self.v, self.v_scale))
        )
        repeats = self.q.shape[2] // k.shape[2]
        k, v = k.repeat(repeats, 2), v.repeat(repeats, 2)
        scores = np.einsum("btnh,bsnh->bnts", self.q.astype(np.float64), k) / self.q.shape[3] ** 0.5
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        scores = scores + (0 if self.bias is None else self.bias)
        scores = np.where(self.mask[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def draw(shape: tuple[int, ...], dtype: str = "float32", bias_rows: int = 0, softcap: float = 0.0) -> Case:
    rows, queries, keys, heads, kv_heads, width = shape
    r = np.random.default_rng(0)
    q = r.normal(0, 1.5, (rows, queries, heads, width)).astype(np.float32)
    k, v = (r.normal(0, 1, (rows, keys, kv_heads, width)).astype(ml_dtypes.bfloat16) for _ in "kv")
    k_scale = v_scale = None
    if dtype == "float32":
        k, v = k.astype(np.float32) * np.float32(1.1), v.astype(np.float32) * np.float32(0.9)
    if dtype == "int8":
        k, v = (r.integers(-127, 128, x.shape, np.int8) for x in (k, v))
        k_scale, v_scale = (r.uniform(0.005, 0.02, (rows, keys, kv_heads, 1)).astype(np.float16) for _ in "kv")
    mask = r.random((rows, queries, keys)) < 0.6
    mask[..., keys // 2] = True
    bias = r.normal(0, 1, (bias_rows, heads, queries, keys)).astype(np.float32) if bias_rows else None
    return Case(q, k, v, k_scale, v_scale, mask, bias, softcap)


@pytest.mark.parametrize("path", PATHS[:3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_attention_equals_the_formula_in_float64(path, dtype):
    if not available(path):
        pytest.skip(f"this CPU has no {path}")
    for shape in SHAPES:
        for bias_rows, softcap in ((0, 0.0), (1, 0.0), (shape[0], 2.0)):
            case = draw(shape, dtype, bias_rows, softcap)
            np.testing.assert_allclose(case.run(path), case.expected(), rtol=1e-5, atol=1e-5)


def test_results_depend_neither_on_threads_nor_on_other_rows():
    case = draw((4, 3, 200, 8, 4, 64))
    whole = case.run()
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(case.run(threads=threads), whole)
    for row in range(4):
        arrays = {name: np.ascontiguousarray(getattr(case, name)[row : row + 1]) for name in ("q", "k", "v", "mask")}
        np.testing.assert_array_equal(dataclasses.replace(case, **arrays).run(), whole[row : row + 1])


@pytest.mark.parametrize("path", PATHS[:3])
def test_what_is_masked_or_not_finite(path):
    """Keys that are masked do not matter, whatever they hold; NaN and inf stay in their row."""
    if not available(path):
        pytest.skip(f"this CPU has no {path}")
    case = draw((5, 1, 33, 2, 1, 20))
    plain = case.run(path)
    hidden = np.argmin(case.mask[0, 0])
    assert not case.mask[0, 0, hidden]
    case.k[0, hidden], case.v[0, hidden] = np.nan, np.inf
    case.q[1, 0, 1, 3], case.v[2, 16], case.mask[3] = np.nan, np.inf, False
    case.q[4] *= 1e6  # one key has all the weight
    got = case.run(path)
    np.testing.assert_array_equal(got[0], plain[0])
    assert np.isnan(got[1, 0, 1]).all() and np.array_equal(got[1, 0, 0], plain[1, 0, 0])
    assert np.isposinf(got[2]).all()
    np.testing.assert_allclose(got[3, 0, 0], case.v[3].mean(0)[0], rtol=1e-5, atol=1e-6)
    with np.errstate(all="ignore"):
        expected = case.expected()
    np.testing.assert_allclose(got[4], expected[4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS[:3])
def test_each_query_that_attends_to_no_key_gets_the_mean_of_all_values(path):
    if not available(path):
        pytest.skip(f"this CPU has no {path}")
    case = draw((2, 3, 37, 4, 2, 16))
    plain = case.run(path)
    case.mask[0, 1] = case.mask[1, 2] = False
    result = case.run(path)
    for row, query in ((0, 1), (1, 2)):
        mean = case.v[row].mean(0).repeat(2, 0)
        np.testing.assert_allclose(result[row, query], mean, rtol=1e-5, atol=1e-6)
        others = [t for t in range(3) if t != query]
        np.testing.assert_allclose(result[row, others], plain[row, others], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_nothing_beyond_an_operand_is_read(dtype):
    for path in filter(available, PATHS[:3]):
        case = draw((2, 2, 19, 3, 1, 21), dtype, 2)
        names = ["q", "k", "v", "mask", "bias", *(["k_scale", "v_scale"] if dtype == "int8" else [])]
        for name in names:
            with guarded(getattr(case, name)) as address:
                np.testing.assert_array_equal(case.run(path, **{name: address}), case.run(path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": -1}, "the size of an operand"),
        ({"keys": 2**40}, "the size of an operand"),
        ({"width": 0}, "the size of an operand"),
        ({"kv_heads": 2}, "the number of heads"),
        ({"bias_rows": 5}, "the shape of the bias"),
        ({"type": 2}, "the scales"),
        ({"type": 3}, "the type of the cache"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        draw((2, 1, 9, 3, 1, 16), bias_rows=2).run(**change)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_model_uses_it_and_has_the_gradients_of_plain_attention(dtype, monkeypatch):
    case = draw((2, 2, 70, 4, 2, 128), dtype, 1, 3.0)
    q, mask, bias = (jnp.asarray(x) for x in (case.q, case.mask, case.bias))
    k, v = ((x, s) if dtype == "int8" else x for x, s in ((case.k, case.k_scale), (case.v, case.v_scale)))
    k, v = jax.tree.map(jnp.asarray, (k, v))

    def attend(q):
        return attention_kernels.attend_cached(q, k, v, mask, bias, 3.0, lambda x: expand(x, jnp.float32))

    both = jax.jit(lambda q: (attend(q), jax.grad(lambda q: jnp.sum(jnp.sin(attend(q))))(q)))
    got = both(q)
    assert "llm_jax_cached_attention" in both.lower(q).as_text()
    monkeypatch.setenv("LLM_JAX_KERNELS", "xla")
    expected = jax.jit(lambda q: both.__wrapped__(q))(q)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_each_choice_has_a_reason():
    q, k = (jax.ShapeDtypeStruct((2, n, 4, 64), "float32") for n in (1, 128))
    reason = cpu_attention.unsupported_reason
    assert reason(q, k) == "" and reason(q, (jax.ShapeDtypeStruct(k.shape, "int8"), k)) == ""
    assert reason(k, k) == "128 queries; the kernel takes 1 to 16"
    assert reason(jax.ShapeDtypeStruct(q.shape, "float16"), k) == "float16 queries and float32 keys"
    assert reason(q, jax.ShapeDtypeStruct((2, 16, 4, 64), "float32")).startswith("a cache of 8,192 numbers")
