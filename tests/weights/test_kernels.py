"""Products of quantized weights through the kernels: under jit, vmap, scan and a mesh, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax import weights
from llm_jax.kernels import native
from llm_jax.weights import IN, OUT, QTensor, quantized

pytestmark = pytest.mark.usefixtures("compiled_kernels")
C, F = 192, 48  # contracted, free


@functools.cache
def setup(scheme: str, axis: int, layers: int = 0) -> QTensor:
    shape = (C, F) if axis == IN else (F, C)
    w = jax.random.normal(jax.random.key(0), (layers, *shape) if layers else shape)
    return jax.jit(quantized.to_qtensor, static_argnums=(1, 2))(w, scheme, axis)


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


def uses_kernel(function, *arguments) -> bool:
    # jax 0.12 lowers under an abstract mesh only for platforms that are named.
    traced = jax.jit(function).trace(*arguments)
    return "llm_jax_quantized_product" in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("axis", [IN, OUT])
@pytest.mark.parametrize("scheme", ["int8", "int8:64", "int8_affine", "int4", "int4_affine", "int2", "nf4", "mxfp4"])
def test_products_and_gradients_equal_those_of_the_dense_weight(scheme, axis):
    q, transposed = setup(scheme, axis), axis == OUT
    x, g = normal(1, 2, 2, C), normal(2, 2, 2, F)
    assert uses_kernel(lambda x, q: weights.dot(x, q, transposed), x, q)

    @jax.jit
    def both(x, q):
        y, pull = jax.vjp(lambda x: weights.dot(x, q, transposed), x)
        return y, pull(g)[0]

    y, dx = both(x, q)
    w = np.asarray(q.dense(), np.float64)
    w = w.T if transposed else w
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ w, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(dx, np.asarray(g, np.float64) @ w.T, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_weights_of_one_scheme_share_a_call(scheme):
    """And results and gradients are those of separate products, bit for bit."""
    x, qs = normal(1, 2, C), [setup(scheme, IN), setup(scheme, IN), quantized.to_qtensor(normal(3, C, 64), scheme, IN)]

    def separate(x):
        return [weights.dot(x, q) for q in qs]

    def together(x):
        return weights.dots(x, qs, accumulate=jnp.float32, gathered=[None] * len(qs))

    def both(function):
        return jax.jit(lambda x: (function(x), jax.grad(lambda x: sum(jnp.sum(y**2) for y in function(x)))(x)))

    assert both(together).lower(x).as_text().count("@llm_jax_quantized_product") == 2  # forward, once for each function
    jax.tree.map(np.testing.assert_array_equal, both(together)(x), both(separate)(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_in_half_precision_do_not_depend_on_the_number_of_rows(dtype):
    """The weight is rounded to the dtype of the activations for a few rows (decoding) as for many (verification)."""
    q, x = setup("nf4", IN), normal(1, 20, C).astype(dtype)
    rounded = np.asarray(x, np.float64) @ np.asarray(q.dense().astype(dtype), np.float64)
    for rows in (3, 20):
        y = weights.dot(x[:rows], q, out_dtype=jnp.float32)
        np.testing.assert_allclose(y, rounded[:rows], rtol=2e-5, atol=1e-4)
    full = np.asarray(x, np.float64) @ np.asarray(q.dense(), np.float64)
    assert np.abs(rounded - full).max() > 1e-3
    assert weights.dot(x, q).dtype == dtype


def test_batches_of_activations_and_of_weights():
    q, stack, x = setup("int4", IN), setup("int4", IN, 3), normal(1, 3, 2, C)
    np.testing.assert_allclose(jax.vmap(weights.dot, (0, None))(x, q), x @ q.dense(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(weights.dot)(x, stack), x @ weights.dense(stack), rtol=1e-4, atol=1e-4)


def test_scanned_layers():
    stack, x = setup("nf4", IN, 3), normal(1, 2, C)

    def layer(x, q):
        return x + jnp.pad(weights.dot(x, q), ((0, 0), (0, C - F))), None

    expected = x
    for w in weights.dense(stack):
        expected = expected + jnp.pad(expected @ w, ((0, 0), (0, C - F)))
    scan = lambda x, q: jax.lax.scan(layer, x, q)[0]  # noqa: E731
    assert uses_kernel(scan, x, stack)
    np.testing.assert_allclose(jax.jit(scan)(x, stack), expected, rtol=1e-3, atol=1e-2)


def test_the_setting_and_a_mesh_select_xla(monkeypatch):
    q, x = setup("int4", IN), normal(1, 1, C)
    assert uses_kernel(lambda x, q: weights.dot(x, q), x, q)
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    with jax.sharding.use_abstract_mesh(mesh):
        assert not uses_kernel(lambda x, q: weights.dot(x, q) + 0, x, q)
    monkeypatch.setenv(native.SETTING, "xla")
    assert not uses_kernel(lambda x, q: weights.dot(x, q) + 1, x, q)


def test_several_devices_select_xla_without_a_mesh(monkeypatch):
    """A weight that `device_put` sharded would be gathered for the kernel."""
    q, x = setup("int4", IN), normal(1, 1, C)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not uses_kernel(lambda x, q: weights.dot(x, q) + 2, x, q)


def test_many_rows_use_xla():
    q = setup("int4", IN)
    assert uses_kernel(lambda x, q: weights.dot(x, q), normal(1, 4, 4, C), q)
    assert not uses_kernel(lambda x, q: weights.dot(x, q), normal(1, 17, C), q)


def test_shard_map_computes_every_part():
    q, x = setup("int8", IN), normal(1, 4, C)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    product = jax.shard_map(weights.dot, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(product)(x, q), x @ q.dense(), rtol=1e-4, atol=1e-4)
