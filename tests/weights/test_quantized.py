"""Quantized weights as values: products, gradients, layouts, scans, meshes, checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax import trees, weights
from llm_jax.kernels import number_formats
from llm_jax.weights import IN, OUT, Adapted, FakeQuant, QTensor, quantized

SOME = ("int8", "int8_affine", "int4", "int4_affine", "int2", "nf4", "fp8_e4m3", "mxfp4")
SIZE = {IN: (128, 48), OUT: (48, 128)}


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def made(w, scheme, axis) -> QTensor:
    return quantized.to_qtensor(w, scheme, axis, input_scale=jnp.float32(0.02) if "static" in scheme else None)


@jax.jit
def uses(w, x, y, ids):
    """Both products, and rows."""
    return weights.dot(x, w), weights.dot(y, w, True), weights.take(w, ids)


@pytest.mark.parametrize("axis", [IN, OUT])
@pytest.mark.parametrize("scheme", SOME)
def test_products_and_rows_are_those_of_the_numbers_that_codes_stand_for(scheme, axis):
    shape = SIZE[axis]
    q = made(normal(0, *shape), scheme, axis)
    assert q.shape == shape
    w, x, y = np.asarray(q.dense()), normal(1, 2, 3, shape[0]), normal(2, 5, shape[1])
    product, transposed, rows = uses(q, x, y, jnp.array([[0, 5], [47, 5], [200, 1]]))
    np.testing.assert_allclose(product, x @ w, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(transposed, y @ w.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rows[:2], w[np.array([[0, 5], [47, 5]])], rtol=1e-5, atol=1e-6)
    assert jnp.isnan(rows[2, 0]).all() and not jnp.isnan(rows[2, 1]).any()


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("axis", [IN, OUT])
def test_products_by_tiles_equal_the_product_at_once(scheme, axis, monkeypatch):
    """A weight large enough to be expanded tile by tile for one row, against all at once for many."""
    monkeypatch.setenv("LLM_JAX_KERNELS", "xla")
    shape = (1024, 768)
    q, transposed = made(normal(0, *shape), scheme, axis), axis == OUT
    x = normal(1, 32, shape[int(transposed)])
    dot = jax.jit(weights.dot, static_argnums=2)
    text = dot.lower(x[:1], q, transposed).compile().as_text()
    assert " while(" in text and f"f32[{shape[0]},{shape[1]}]" not in text
    np.testing.assert_allclose(dot(x[:1], q, transposed), dot(x, q, transposed)[:1], rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("static", [False, True])
def test_integer_products_follow_the_formula(static):
    """Per-token absmax activations, exact integer sums (Dettmers et al. 2022, arXiv:2208.07339, section 2)."""
    w, x = np.asarray(normal(0, 64, 24)), np.asarray(normal(1, 5, 64))
    q = made(w, "w8a8_static" if static else "w8a8", IN)
    w_scale = np.abs(w).max(0) / 127
    x_scale = np.float32(0.02) if static else np.abs(x).max(1, keepdims=True) / 127
    w8, x8 = np.rint(w / w_scale), np.clip(np.rint(x / x_scale), -127, 127)
    assert np.abs(x8).max() == 127
    expected = (x8 @ w8) * x_scale * w_scale
    np.testing.assert_allclose(jax.jit(weights.dot)(x, q), expected, rtol=1e-5)
    text = jax.jit(weights.dot).lower(x, q).as_text()
    assert "tensor<5x64xi8>" in text and ("tensor<5x24xi32>" in text or "llm_jax_integer_product" in text)


@pytest.mark.parametrize("axis", [IN, OUT])
@pytest.mark.parametrize("scheme", ["int8_affine", "int4", "nf4", "mxfp4", "w8a8", "w8a8_static"])
def test_fake_quantized_products_equal_those_of_the_integers(scheme, axis):
    shape = SIZE[axis]
    w, x, y = normal(0, *shape), normal(1, 3, shape[0]), normal(2, 3, shape[1])
    q = made(w, scheme, axis)
    fake = FakeQuant(w, None, q.input_scale, None, scheme, axis)
    got, want = uses(fake, x, y, jnp.arange(5)), uses(q, x, y, jnp.arange(5))
    for ours, theirs in zip(got, want, strict=True):  # both sides round; relative to the largest sum
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())
    for ours, exact in zip(want, (x @ w, y @ w.T, w[:5]), strict=True):
        assert jnp.abs(ours - exact).max() > 1e-3  # so the two agree about the rounding, and not about nothing


def test_learned_steps_have_the_gradients_of_lsq():
    """Esser et al. 2020, equations 3 and 5, in numpy; the scale is 1 / sqrt(N Qp) with N numbers of a group."""
    w, step, g = np.asarray(normal(0, 64, 6)), np.full((2, 6), 0.3, np.float16).astype(np.float32), normal(1, 64, 6)
    fake = FakeQuant(jnp.asarray(w), jnp.asarray(step), None, None, "int4", IN)
    dw, dstep = jax.grad(lambda w, s: jnp.sum(dataclasses.replace(fake, weight=w, step=s).dense() * g), (0, 1))(w, step)
    units = w.reshape(2, 32, 6) / step[:, None]
    inside = (units > -8) & (units < 7)
    slope = np.where(inside, np.rint(units) - units, np.clip(units, -8, 7))
    np.testing.assert_allclose(dw, np.where(inside.reshape(64, 6), g, 0), rtol=1e-5)
    expected = (slope * np.asarray(g).reshape(2, 32, 6)).sum(1) / np.sqrt(32 * 7)
    np.testing.assert_allclose(dstep, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(fake.dense(), fake.quantized().dense())


def test_an_inactive_fake_quant_is_the_weight():
    w, x = normal(0, 64, 8), normal(1, 3, 64)
    for scheme in ("int4", "w8a8"):
        fake = FakeQuant(w, None, None, jnp.array(False), scheme, IN)
        np.testing.assert_array_equal(weights.dot(x, fake), weights.dot(x, w))
        on = dataclasses.replace(fake, active=jnp.array(True))
        np.testing.assert_allclose(weights.dot(x, on), weights.dot(x, made(w, scheme, IN)), rtol=1e-5, atol=1e-5)


def test_smoothing_leaves_the_product_as_it_is():
    w, x = normal(0, 64, 24), normal(1, 5, 64)
    smooth = jnp.exp2(jnp.arange(64) % 5 - 2.0).astype(jnp.float16)
    q = quantized.to_qtensor(w, "int8", IN, smooth=smooth)
    np.testing.assert_allclose(
        q.dense(), smooth[:, None] * number_formats.decode(*q._codes(), number_formats.scheme("int8"), IN)
    )
    np.testing.assert_allclose(weights.dot(x, q), x @ q.dense(), rtol=1e-4, atol=1e-4)
    y = normal(2, 5, 24)
    np.testing.assert_allclose(weights.dot(y, q, True), y @ q.dense().T, rtol=1e-4, atol=1e-4)
    half_steps = np.asarray(smooth, np.float32)[:, None] * q.scale / 2
    assert (np.abs(q.dense() - w) <= half_steps * 1.001).all()


FORMS = ["int8", "int8:tensor", "int8_affine", "w8a8", "w8a8_static", "int4", "int4_affine", "int2", "int2_affine"]
FORMS += ["nf4", "fp8_e4m3", "fp8_e5m2", "mxfp4"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", [IN, OUT])
@pytest.mark.parametrize("scheme", FORMS)
def test_smoothing_multiplies_rows_of_the_weight_in_every_product_and_gradient(scheme, axis, transposed):
    """A smoothed weight is diag(smooth) times its numbers: x diag(s) N, or (x N^T) diag(s), and rows s_i N_i."""
    shape, s = SIZE[axis], number_formats.scheme(scheme)
    smooth = jnp.exp2(jnp.arange(shape[0]) % 5 - 2.0).astype(jnp.float16)
    factors = np.asarray(smooth, np.float32)
    static = jnp.float32(0.02) if s.activations == "static" else None
    q = smoothed(normal(0, *shape), scheme, axis, smooth, static)
    numbers = np.asarray(number_formats.decode(*q._codes(), s, axis))
    x = np.asarray(normal(1, 3, shape[transposed]))
    inputs = x if transposed else x * factors
    if s.activations and axis == (OUT if transposed else IN):  # the integer product sees smoothed activations
        unit = 0.02 if static is not None else np.abs(inputs).max(-1, keepdims=True) / 127
        inputs = np.clip(np.rint(inputs / np.float32(unit)), -127, 127) * np.float32(unit)
    expected = (inputs @ numbers.T) * factors if transposed else inputs @ numbers
    g = np.asarray(normal(2, *expected.shape))
    got, gradient = product_and_gradient(x, q, g, transposed)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-4 * np.abs(expected).max())
    dense = numbers * factors[:, None]
    want = g @ dense if transposed else g @ dense.T  # rounded activations count as themselves
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    rows = weights.take(q, jnp.arange(5))
    np.testing.assert_allclose(rows, dense[:5], rtol=1e-5, atol=1e-6)


@functools.partial(jax.jit, static_argnums=(1, 2))
def smoothed(w, scheme, axis, smooth, input_scale) -> QTensor:
    return quantized.to_qtensor(w, scheme, axis, smooth=smooth, input_scale=input_scale)


@functools.partial(jax.jit, static_argnums=3)
def product_and_gradient(x, q, g, transposed):
    product, pullback = jax.vjp(lambda x: weights.dot(x, q, transposed), x)
    return product, pullback(g)[0]


def test_gradients_pass_through_and_nothing_but_codes_is_saved():
    """Through a scan of layers, as in training of adapters over a frozen base."""
    q = made(normal(0, 4, 128, 128), "int4", IN)
    a, b, x = normal(1, 4, 128, 2), normal(2, 4, 2, 128), normal(3, 3, 128)

    def loss(b, q):
        def layer(x, part):
            base, a, b = part
            # Scaled down: the gradient of a saturated tanh is a difference of rounding errors.
            return jnp.tanh(weights.dot(x, Adapted(base, a, b, jnp.float32(0.1))) / 16), None

        return jnp.sum(jax.lax.scan(layer, x, (q, a, b))[0])

    got = jax.jit(jax.grad(loss))(b, q)
    want = jax.jit(jax.grad(loss))(b, weights.dense(q))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    text = jax.jit(jax.grad(loss)).lower(b, q).compile().as_text()
    assert "f32[4,128,128]" not in text  # the expanded base of all layers


def test_quantized_weights_are_stacked_and_unstacked():
    stacked = {"layers": {"0:3": {"0::1": {"mlp": {"up": made(normal(0, 3, 128, 48), "nf4", IN)}}}}}
    apart = trees.restage(stacked)
    one = made(normal(0, 3, 128, 48)[1], "nf4", IN)
    jax.tree.map(np.testing.assert_array_equal, apart["layers"]["1"]["mlp"]["up"], one)
    jax.tree.map(np.testing.assert_array_equal, trees.restage(apart, ((1, 3),)), stacked)
    w = stacked["layers"]["0:3"]["0::1"]["mlp"]["up"]
    assert w.shape == (3, 128, 48) and weights.dense(w).shape == (3, 128, 48)


@pytest.mark.parametrize("scheme", ["int8", "int4_affine", "nf4", "w8a8_static"])
def test_codes_and_scales_shard_together(scheme):
    q = dataclasses.replace(made(normal(0, 128, 48), scheme, IN), smooth=jnp.ones(128, jnp.float16))
    spec = weights.partition(q, P("fsdp", "tensor"))
    assert spec.codes == P("fsdp", "tensor") and spec.smooth == P("fsdp")
    assert jax.tree.structure(spec, is_leaf=lambda s: isinstance(s, P)) == jax.tree.structure(q)
    if scheme == "nf4":
        assert (spec.scale.codes, spec.scale.offset) == (P("fsdp", "tensor"), P(None, None))
    else:
        assert spec.scale == P("fsdp", "tensor")


def test_donated_codes_are_reused():
    q = made(normal(0, 128, 48), "int4", IN)
    keep = jax.jit(lambda q, x: (q, weights.dot(x, q)), donate_argnums=0)
    again, _ = keep(q, normal(1, 2, 128))
    assert q.codes.is_deleted() and not again.codes.is_deleted()


@pytest.mark.parametrize("scheme", ["int8", "nf4", "int4_affine", "fp8_e4m3", "fp8_e5m2", "mxfp4", "w8a8_static"])
def test_records_and_orbax_keep_every_bit(scheme, tmp_path):
    import orbax.checkpoint as ocp

    params = {
        "up": made(normal(0, 128, 48), scheme, IN),
        "fake": FakeQuant(normal(1, 8, 4), None, None, None, "int8", IN),
    }
    record = trees.describe(params)
    abstract = {path: weights.abstract(r) for path, r in record.items()}
    trees.check(trees.describe(abstract), record, "here")
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        orbax.save(tmp_path / "a", params)
        got = orbax.restore(tmp_path / "a", abstract)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    bits = lambda a: np.asarray(a).view(np.uint8) if np.ndim(a) else np.asarray(a)  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), got, params)
