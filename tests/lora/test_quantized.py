"""QLoRA: adapters over a quantized base, and quantized low-rank factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import lora, trees, weights
from llm_jax.errors import UserError
from llm_jax.training import trainable
from llm_jax.weights import IN, FakeQuant, QTensor, quantized
from tests.lora import cases

SCHEME = "nf4:16"  # with double quantization of the scales; 16 divides the tiny widths
SHAPE = {"width": 64, "mlp_dim": 96, "qk_norm": False}


@pytest.fixture(scope="module")
def base(make):
    """The tiny model with its linear layers in NF4."""

    def one(path, w):
        return quantized.to_qtensor(w, SCHEME, IN) if "attention/" in path or "mlp/" in path else w

    return jax.jit(lambda p: trees.map_weights(one, p))(make(**SHAPE)[1])


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_adapters_over_a_quantized_base_are_those_over_its_dense_form(make, tiny, base, variant):
    """Logits, and gradients of the adapters, against W (expanded) + B A by plain autodiff."""
    model, settings = make(**SHAPE)[0], cases.config(tiny, variant=variant)
    trained, fixed = lora.split(cases.made(base, settings), variant)
    expanded = trees.map_weights(lambda path, w: weights.dense(w), base)
    assert isinstance(trees.flatten(base)["layers/0:2/0::1/mlp/up"], QTensor)

    def loss(trained, fixed, base):
        out = model.apply({"params": lora.attach(base, lora.join(trained, fixed))}, cases.IDS)
        return jnp.mean(jnp.sin(out)), out

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    ((_, got), gradient), ((_, want), reference) = both(trained, fixed, base), both(trained, fixed, expanded)
    np.testing.assert_allclose(got, want, atol=2e-5)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * size), gradient, reference)


def test_step_zero_over_a_quantized_base_is_bit_for_bit(make, tiny, base):
    model, _ = make(**SHAPE)
    adapters = jax.jit(lambda p: lora.init(jax.random.key(0), p, cases.config(tiny)))(base)
    logits = jax.jit(lambda p: model.apply({"params": p}, cases.IDS))
    np.testing.assert_array_equal(logits(lora.attach(base, adapters)), logits(base))


def test_loftq_brings_a_quantized_base_nearer_to_what_it_was(make, tiny, base):
    _, original = make(**SHAPE)
    settings = cases.config(tiny, variant="loftq", rank=8)
    adapters = jax.jit(lambda q, w: lora.init(jax.random.key(0), q, settings, original=w))(base, original)
    merged = trees.flatten(lora.merge(base, adapters))
    for path, w in trees.flatten(original).items():
        if isinstance(q := trees.flatten(base)[path], QTensor):
            before, after = (np.linalg.norm(x - w) for x in (weights.dense(q), merged[path]))
            assert after < 0.95 * before, path


def test_factors_in_eight_bits_are_what_the_model_sees_and_train_straight_through(make, tiny):
    model, base = make(qk_norm=False)
    settings = cases.config(tiny, factors="int8")
    adapters = cases.made(base, settings)
    round_trip = lambda w: weights.dense(quantized.to_qtensor(w, "int8", IN))  # noqa: E731
    factors = {p: round_trip(x) if p.endswith(("/a", "/b")) else x for p, x in trees.flatten(adapters).items()}
    rounded = lora.quantize_factors(adapters, "int8")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), rounded, trees.unflatten(factors))
    trained, fixed = lora.split(adapters, "lora")

    def loss(trained, factors):
        out = model.apply({"params": lora.attach(base, lora.join(trained, fixed), factors=factors)}, cases.IDS)
        return jnp.mean(jnp.sin(out)), out

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ((_, got), gradient), ((_, want), reference) = both(trained, "int8"), both(lora.split(rounded, "lora")[0], "")
    np.testing.assert_allclose(got, want, atol=2e-5)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(reference))  # the gradient at the rounded factors
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * size), gradient, reference)
    ((_, plain), _) = both(trained, "")
    assert np.abs(got - plain).max() > 1e-3
    merged = [lora.merge(base, adapters, factors="int8"), lora.merge(base, rounded)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *merged)
    start = lora.init(jax.random.key(0), base, settings)  # b is zero, and so it stays when rounded
    logits = jax.jit(lambda p: model.apply({"params": p}, cases.IDS))
    np.testing.assert_array_equal(logits(lora.attach(base, start, factors="int8")), logits(base))


def test_merging_into_a_quantized_base_reports_the_error(tiny, base):
    adapters = cases.made(base, cases.config(tiny))
    params, costs = lora.requantize(base, adapters)
    assert set(costs) == {path for path, w in trees.flatten(base).items() if isinstance(w, QTensor)}
    merged = trees.flatten(lora.merge(base, adapters))
    for path, cost in costs.items():
        q, w, before = trees.flatten(params)[path], np.asarray(merged[path]), weights.dense(trees.flatten(base)[path])
        assert isinstance(q, QTensor) and q.scheme == SCHEME
        np.testing.assert_allclose(cost, np.linalg.norm(weights.dense(q) - w) / np.linalg.norm(w - before), rtol=1e-4)
        assert 0 < cost < 1


def test_invalid_schemes_of_factors_are_one_line_errors(make, tiny):
    _, base = make()
    for name, message in (
        ("int3", "the scheme 'int3' is unknown"),
        ("int4", "lora.factors=int4 for the adapter of .*: the group 32 does not divide its"),
        ("w8a8", "lora.factors=w8a8: it also quantizes activations"),
    ):
        with pytest.raises(UserError, match=message):
            lora.init(jax.random.key(0), base, cases.config(tiny, factors=name))


def test_full_weights_are_wanted_where_all_are_trained_or_a_start_is_taken_out(make, tiny, base):
    with pytest.raises(UserError, match="is a QTensor, and full fine-tuning needs dense weights"):
        trainable.FullTraining(tiny).init(base, jax.random.key(0))
    rounded = trees.map_weights(lambda _, w: FakeQuant(w, None, None, None, "int8", IN), make()[1])
    with pytest.raises(
        UserError, match="is a FakeQuant, and full fine-tuning needs dense weights"
    ):  # it would be trained so, untold
        trainable.FullTraining(tiny).init(rounded, jax.random.key(0))
    pissa = cases.made(make(**SHAPE)[1], cases.config(tiny, variant="pissa"))
    with pytest.raises(
        UserError, match="is a QTensor; lora.variant=pissa subtracts its initial value from dense weights"
    ):
        lora.subtract_start(base, pissa)
