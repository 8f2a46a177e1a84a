import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax import weights
from llm_jax.weights import Adapted, Decomposed, InputDropout


def normal(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(i), shape)


def adapted(rows: int | None = None) -> Adapted:
    scale = jnp.float32(0.5) if rows is None else normal(4, rows, 2)
    return Adapted(normal(1, 6, 8), normal(2, 6, 2), normal(3, 2, 8), scale)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.sampled_from([(), (1,), (3,), (2, 4), (3, 1, 2)]), st.booleans())  # few shapes: each is compiled
def test_dot_and_its_gradients_equal_plain_matmul(leading, transposed):
    x, w = normal(0, *leading, 5), normal(1, *((7, 5) if transposed else (5, 7)))
    plain = lambda x, w: jnp.sum(jnp.sin(x @ (w.T if transposed else w)))  # noqa: E731
    ours = lambda x, w: jnp.sum(jnp.sin(weights.dot(x, w, transposed)))  # noqa: E731
    for a, b in zip(jax.value_and_grad(ours, (0, 1))(x, w), jax.value_and_grad(plain, (0, 1))(x, w), strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), a, b)


def test_bf16_products_are_summed_in_f32_and_the_weight_gradient_keeps_it():
    x, w = normal(0, 4096, 1).T.astype(jnp.bfloat16), normal(1, 4096, 1)
    exact = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.bfloat16), np.float64)
    got = weights.dot(x, w, out_dtype=jnp.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=1e-4)
    assert weights.dot(x, w).dtype == jnp.bfloat16
    x = jnp.ones((1024, 2), jnp.bfloat16)
    gradient = jax.grad(lambda w: jnp.sum(weights.dot(x, w, out_dtype=jnp.float32) * 1.0))(jnp.ones((2, 3)))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, 1024.0)  # bf16 sums would stop at 256


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_adapted_dot_equals_the_dense_sum(rows, transposed):
    w = adapted(rows)
    x = normal(5, 3, 4, 8 if transposed else 6)
    scales = jnp.broadcast_to(w.scale, (3, 2))
    dense = jnp.stack([w.base + (w.a * s) @ w.b for s in scales])
    expected = jnp.einsum("bto,bio->bti" if transposed else "bti,bio->bto", x, dense)
    np.testing.assert_allclose(weights.dot(x, w, transposed), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [None, 3])
def test_adapted_take_equals_rows_of_the_dense_sum(rows):
    w, ids = adapted(rows), jnp.array([[0, 5], [2, 2], [1, 4]])
    scales = jnp.broadcast_to(w.scale, (3, 2))
    expected = jnp.stack([(w.base + (w.a * s) @ w.b)[i] for s, i in zip(scales, ids, strict=True)])
    np.testing.assert_allclose(weights.take(w, ids), expected, rtol=1e-5, atol=1e-5)
    if rows is None:
        np.testing.assert_allclose(weights.dense(w)[ids], expected, rtol=1e-5, atol=1e-5)


def test_zero_b_equals_the_base_bit_for_bit():
    w = adapted()
    zero = Adapted(w.base, w.a, jnp.zeros_like(w.b), w.scale)
    x = normal(6, 2, 3, 6)
    np.testing.assert_array_equal(weights.dot(x, zero), weights.dot(x, w.base))


def test_nested_nodes_have_gradients_of_the_trained_leaves_only():
    inner = adapted()
    outer = Adapted(inner, normal(7, 6, 3), normal(8, 3, 8), jnp.float32(1))
    x = normal(9, 2, 6)
    np.testing.assert_allclose(weights.dot(x, outer), x @ weights.dense(outer), rtol=1e-4, atol=1e-4)

    def loss(b):
        return jnp.sum(weights.dot(x, Adapted(inner, outer.a, b, outer.scale)))

    # (x a)^T 1: the gradient of b alone, with no product of the frozen weight's shape (6, 8) in it.
    np.testing.assert_allclose(jax.grad(loss)(outer.b), (x @ outer.a).T @ jnp.ones((2, 8)), rtol=1e-5)
    text = jax.jit(jax.grad(loss)).lower(outer.b).compile().as_text()
    assert not [line for line in text.splitlines() if "f32[6,8]" in line and " dot(" in line]


def test_take_out_of_range_is_nan_and_not_clamped():
    assert jnp.isnan(weights.take(jnp.ones((3, 2)), jnp.array([3]))).all()


def test_partition_splits_factors_with_their_side_of_the_base():
    spec = weights.partition(adapted(), P(None, "fsdp", "tensor"))
    assert (spec.base, spec.a, spec.b) == (P(None, "fsdp", "tensor"), P(None, "fsdp", None), P(None, None, "tensor"))


def test_partition_of_nodes_that_contain_an_adapted_weight():
    spec = weights.partition(Decomposed(adapted(), normal(5, 8), normal(6, 8)), P(None, "fsdp", "tensor"))
    assert (spec.weight.a, spec.magnitude, spec.squares) == (
        P(None, "fsdp", None),
        P(None, "tensor"),
        P(None, "tensor"),
    )
    dropped = weights.partition(InputDropout(normal(1, 6, 2), jax.random.key(0), 0.5), P("fsdp", None))
    assert (dropped.weight, dropped.key, dropped.rate) == (P("fsdp", None), P(), 0.5)


@pytest.mark.parametrize("transposed", [False, True])
def test_decomposed_weights_are_columns_of_their_own_length(transposed):
    inner, magnitude = adapted(), jnp.abs(normal(5, 8)) + 0.5
    w = Decomposed(inner, magnitude, jnp.sum(inner.base**2, 0))
    dense = np.asarray(inner.base + 0.5 * inner.a @ inner.b, np.float64)
    expected = dense / np.linalg.norm(dense, axis=0) * np.asarray(magnitude)
    np.testing.assert_allclose(weights.dense(w), expected, rtol=1e-5, atol=1e-6)
    x = normal(6, 3, 8 if transposed else 6)
    np.testing.assert_allclose(weights.dot(x, w, transposed), x @ (expected.T if transposed else expected), atol=1e-5)
    np.testing.assert_allclose(weights.take(w, jnp.array([0, 5])), expected[[0, 5]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_input_dropout_applies_to_the_contracted_axis(transposed):
    w, x = normal(1, 6, 8), normal(2, 3, 8 if transposed else 6)
    mask = jax.random.bernoulli(jax.random.key(0), 0.75, x.shape)
    expected = jnp.where(mask, x / 0.75, 0) @ (w.T if transposed else w)
    out = weights.dot(x, InputDropout(w, jax.random.key(0), 0.25), transposed)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_weight_decay_applies_to_every_leaf_but_learned_steps():
    fake = weights.FakeQuant(normal(0, 8, 4), jnp.ones((1, 4)), jnp.float32(1), None, "int8", weights.IN)
    mask = weights.decay_mask(fake)
    assert (mask.weight, mask.step, mask.input_scale, mask.active) == (True, False, False, None)
    assert jax.tree.structure(mask) == jax.tree.structure(fake)
    assert weights.decay_mask(normal(0, 8, 4)) is True
    assert jax.tree.leaves(weights.decay_mask(adapted())) == [True] * 4


def test_kinds_are_named_and_only_arrays_are_cast():
    w, q = normal(0, 8, 4), weights.to_qtensor(normal(0, 8, 4), "int8", weights.IN)
    assert [weights.kind(node) for node in (w, q, adapted())] == ["array", "QTensor", "Adapted"]
    assert [weights.is_dense(node) for node in (w, q, adapted())] == [True, False, False]
    assert [weights.is_quantized(node) for node in (w, q, adapted())] == [False, True, False]
    assert weights.cast(w, jnp.bfloat16).dtype == jnp.bfloat16 and weights.cast(q, jnp.bfloat16) is q


def test_repeated_rows_use_the_adapters_of_the_row_they_repeat():
    w, x = adapted(3), normal(5, 3, 4, 6)
    repeated = weights.repeat_rows({"dense": w.base, "mixed": w, "one": adapted()}, 2)
    assert repeated["dense"] is w.base and repeated["one"].scale.shape == ()
    got = weights.dot(jnp.repeat(x, 2, 0), repeated["mixed"])
    expected = np.repeat(np.asarray(weights.dot(x, w)), 2, 0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_reduce_first_orders_gradients_and_changes_no_value():
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 3, 4), (4, 5)))

    def loss(x, w, pair=weights.reduce_first):
        x, w = pair(x, w)
        return jnp.sum(jnp.tanh(weights.dot(x, w)))

    plain = jax.grad(lambda x, w: loss(x, w, lambda *pair: pair), (0, 1))(x, w)
    assert all(map(jnp.array_equal, jax.grad(loss, (0, 1))(x, w), plain))
    (barrier,) = (
        equation for equation in jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w).jaxpr.eqns
        if equation.primitive.name == "optimization_barrier"
    )  # fmt: skip
    assert [operand.aval.shape for operand in barrier.invars] == [x.shape, w.shape]
    # A part without a gradient waits for nothing.
    for used in (0, 1):
        alone = jax.grad(lambda x, w, used=used: jnp.sum(weights.reduce_first(x, w)[used] ** 2), (0, 1))(x, w)
        np.testing.assert_array_equal(alone[used], 2 * (x, w)[used])
        assert not alone[1 - used].any()
    # A frozen w has no gradient, whose computation the order would keep.
    assert "optimization_barrier" not in str(jax.make_jaxpr(jax.grad(loss))(x, w))
