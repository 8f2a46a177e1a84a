"""Products of quantized weights through the kernels in Pallas, interpreted: under jit, scan, vmap and shard_map, and
their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax import weights
from llm_jax.kernels import native, pallas
from llm_jax.weights import IN, to_qtensor

C, F, LAYERS = 128, 256, 2


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    monkeypatch.setenv(native.SETTING, "pallas")


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)


def stack(scheme, inputs=C, outputs=F):
    w = jax.random.normal(jax.random.key(0), (LAYERS, inputs, outputs)) / inputs**0.5
    return to_qtensor(w, scheme, IN)


def kernels_in(function, *arguments) -> int:
    return str(jax.make_jaxpr(function)(*arguments)).count("pallas_call[")


def test_a_scanned_stack_and_its_gradient_equal_the_reference(monkeypatch):
    """The gradient with respect to the activations is a transposed product by the kernel."""
    up, down = stack("nf4"), stack("int4", F, C)

    def loss(x):
        def layer(x, pair):
            return weights.dot(jax.nn.silu(weights.dot(x, pair[0])), pair[1]), None

        return jnp.sum(jax.lax.scan(layer, x, (up, down))[0].astype(jnp.float32) ** 2)

    x = normal(1, 3, C)
    assert kernels_in(loss, x) == 2 and kernels_in(jax.grad(loss), x) == 4
    y, dx = jax.jit(jax.value_and_grad(loss))(x)
    monkeypatch.setenv(native.SETTING, "xla")
    assert kernels_in(jax.grad(lambda x: loss(x)), x) == 0
    expected, expected_dx = jax.jit(jax.value_and_grad(lambda x: loss(x)))(x)
    np.testing.assert_allclose(y, expected, rtol=1e-2)
    np.testing.assert_allclose(dx.astype(float), expected_dx.astype(float), rtol=5e-2, atol=5e-2)


def test_vmap_over_activations_and_weights():
    q, x = stack("int4"), normal(1, LAYERS, 3, C)
    product = jax.jit(jax.vmap(weights.dot))
    assert kernels_in(product, x, q) == 1
    expected = jnp.einsum("lmc,lcf->lmf", x.astype(jnp.float32), weights.dense(q))
    np.testing.assert_allclose(product(x, q).astype(float), expected, rtol=2e-2, atol=4e-2)


def test_shard_map_computes_every_part():
    q = jax.tree.map(lambda leaf: leaf[0], stack("int8"))
    x = normal(1, 4, C)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
    for check_vma in (True, False):
        product = jax.shard_map(weights.dot, mesh=mesh, check_vma=check_vma, **specs)
        assert kernels_in(product, x, q) == 1
    np.testing.assert_allclose(jax.jit(product)(x, q).astype(float), x @ q.dense(), rtol=2e-2, atol=4e-2)


def test_a_weight_without_a_kernel_leaves_the_others_theirs(monkeypatch):
    """On GPUs, tiles depend on the number of outputs."""
    reason = pallas.unsupported_reason
    monkeypatch.setattr(
        pallas,
        "unsupported_reason",
        lambda x, codes, *rest: "narrow" * (codes[0].shape[1] < F) or reason(x, codes, *rest),
    )
    qs = [jax.tree.map(lambda leaf: leaf[0], stack("int8", outputs=outputs)) for outputs in (F, F // 2, 2 * F)]
    together = lambda x: weights.dots(x, qs, accumulate=jnp.float32, gathered=[None] * 3)  # noqa: E731
    assert kernels_in(together, normal(1, 3, C)) == 2


def test_integer_products_use_the_kernel():
    q = jax.tree.map(lambda leaf: leaf[0], stack("w8a8"))
    assert kernels_in(weights.dot, normal(1, 3, C), q) == 1


def test_devices_outside_of_shard_map_and_other_platforms_use_xla(monkeypatch):
    assert pallas.unusable_reason() == ""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
        assert pallas.unusable_reason() == "a mesh of devices is in use, outside of shard_map"
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert pallas.unusable_reason() == "JAX uses 2 devices, outside of shard_map"
    monkeypatch.undo()
    assert pallas.unusable_reason() == "LLM_JAX_KERNELS=pallas is not set"
