"""Methods on one weight, against their papers' formulas in numpy and their own objectives."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import weights
from llm_jax.kernels import number_formats
from llm_jax.quant import methods
from llm_jax.weights import IN


@functools.partial(jax.jit, static_argnums=(0, 2, 4))
def run(method, w, scheme, inputs, act_order=True):
    return methods.METHODS[method][0](w, scheme, IN, inputs, act_order)


def problem(seed, width=64, out=24):
    """A weight, inputs that are correlated and have outliers in a few channels, and what calibration sees of them."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(width, width)) * np.exp(draw.normal(size=width))
    x = (draw.normal(size=(2, 100, width)) @ mix / 8).astype(np.float32)
    x[..., 3] *= 30
    w = jnp.asarray(draw.normal(0, 0.1, (width, out)), jnp.float32)
    return w, x, jax.jit(methods.observe)(x, jnp.ones((2, 100), bool))


def output_error(w, q, x):
    return float(np.sum(np.square(x.reshape(-1, x.shape[-1]) @ np.asarray(w - q.dense(), np.float64))))


def test_statistics_are_those_of_the_tokens_that_count_and_add_up():
    _, x, _ = problem(0)
    mask = np.arange(100) < np.array([[70], [100]])
    seen = x[mask]
    got = methods.observe(x, jnp.asarray(mask))
    np.testing.assert_allclose(got.gram, seen.T @ seen, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(got.largest, np.abs(seen).max(0), rtol=1e-6)
    np.testing.assert_allclose(got.total, np.abs(seen).sum(0), rtol=1e-4)
    np.testing.assert_allclose(got.clipped, np.quantile(np.abs(seen), 0.999), rtol=1e-5)
    assert float(methods.observe(x, jnp.zeros((2, 100), bool)).clipped) == 0
    assert float(got.tokens) == 170
    twice = methods.add(got, got)
    np.testing.assert_allclose(twice.gram, 2 * got.gram)
    np.testing.assert_array_equal(twice.largest, got.largest)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.integers(0, 2**31), st.booleans(), st.sampled_from(["int4", "nf4:32", "int2_affine"]))
def test_gptq_is_never_worse_than_rounding_on_its_own_objective(seed, act_order, scheme):
    w, _, inputs = problem(seed)
    ours = methods.objective(w, run("gptq", w, scheme, inputs, act_order), inputs)
    plain = methods.objective(w, run("mse", w, scheme, inputs), inputs)
    assert (ours <= plain * (1 + 1e-5)).all()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", ["int4", "int4_affine", "nf4:32", "mxfp4", "int8"])
def test_gptq_lowers_the_error_of_outputs(scheme, act_order):
    w, x, inputs = problem(1)
    ours, plain = (output_error(w, run(m, w, scheme, inputs, act_order), x) for m in ("gptq", "mse"))
    assert ours < 0.7 * plain


def test_gptq_is_the_algorithm_of_the_paper():
    """Algorithm 1 in float64, column by column with an explicit inverse for those that are left (its equation 2)."""
    w, _, inputs = problem(2, width=32, out=8)
    q = run("gptq", w, "int4", inputs, False)
    scale = np.asarray(q.scale, np.float64)[0]
    gram = np.asarray(inputs.gram, np.float64)
    hessian = gram + 0.01 * np.trace(gram) / 32 * np.eye(32)
    left, found = np.asarray(w, np.float64), np.zeros((32, 8))
    for i in range(32):
        inverse = np.linalg.inv(hessian[i:, i:])
        found[i] = np.clip(np.rint(left[i] / scale), -8, 7) * scale
        left[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], left[i] - found[i])
    got = np.asarray(q.dense())
    kept_rounding = np.isclose(got, np.asarray(run("mse", w, "int4", inputs).dense())).all(0)
    assert kept_rounding.sum() < 4
    same = np.isclose(got, found, atol=1e-5).mean(0)
    assert (same[~kept_rounding] > 0.9).all()  # a tie that float32 sees otherwise moves all after it


@pytest.mark.parametrize("scheme", ["int4", "int2", "int4_affine", "nf4", "fp8_e4m3", "mxfp4", "int8"])
def test_mse_has_no_larger_error_than_absmax_in_any_group(scheme):
    w = jnp.asarray(np.random.default_rng(3).standard_t(3, (128, 16)), jnp.float32)
    s = number_formats.scheme(scheme)

    @jax.jit
    def error(scale, offset):  # before nf4 quantizes its scales again
        kept = number_formats.store_scales(scale, s)
        offset = None if offset is None else number_formats.store_scales(offset, s)
        values = number_formats.decode(number_formats.encode(w, kept, offset, s, IN), kept, offset, s, IN)
        return number_formats.reduce_groups(jnp.sum, jnp.square(values - w), s, IN)

    ours, plain = error(*methods.clip(w, s, IN)), error(*number_formats.scales(w, s, IN))
    assert (ours <= plain * (1 + 1e-5) + 1e-9).all()
    whole = [float(jnp.sum(jnp.square(run(m, w, scheme, None).dense() - w))) for m in ("mse", "absmax")]
    assert whole[0] <= whole[1] * (1 + 1e-5)
    if scheme in ("int4", "int2"):
        assert ours.sum() < 0.85 * plain.sum()


def test_percentiles_clip_what_lies_past_them():
    w = np.random.default_rng(4).normal(0, 1, (2048, 3)).astype(np.float32)
    w[7] = 1000
    q = run("percentile", jnp.asarray(w), "int8", None)
    np.testing.assert_allclose(np.asarray(q.scale)[0] * 127, np.quantile(np.abs(w), 0.999, axis=0), rtol=1e-4)
    assert np.abs(np.asarray(q.dense())[7]).max() < 50
    rest = np.arange(2048) != 7
    assert (
        np.abs(np.asarray(q.dense()) - w)[rest].max()
        < np.abs(np.asarray(run("absmax", w, "int8", None).dense()) - w)[rest].max()
    )


def test_smoothquant_takes_the_factors_of_the_paper():
    """t = sqrt(max |x|) / sqrt(max |w|), up to one factor for all (equation 4, alpha 0.5)."""
    w, x, inputs = problem(5)
    q = run("smoothquant", w, "w8a8", inputs)
    t = np.sqrt(np.abs(x).max((0, 1))) / np.sqrt(np.abs(np.asarray(w)).max(1))
    ratio = np.asarray(q.smooth, np.float32) * t
    np.testing.assert_allclose(ratio, ratio[0], rtol=2e-3)
    exact = x @ np.asarray(w)
    plain = run("absmax", w, "w8a8", inputs)
    error = lambda q: np.square(np.asarray(weights.dot(x, q)) - exact).mean()  # noqa: E731
    assert error(q) < 0.5 * error(plain)


def test_awq_is_never_worse_than_no_smoothing_on_its_objective():
    for seed in range(5):
        w, x, inputs = problem(seed)
        ours, plain = (output_error(w, run(m, w, "int4", inputs), x) for m in ("awq", "absmax"))
        assert ours <= plain * 1.001
    assert ours < 0.8 * plain


def test_awq_clips_by_the_importance_of_the_inputs():
    """Where clipping helps, scales minimize the error weighted by the mean square of the smoothed inputs."""
    clipped = 0
    for seed in range(5):
        w, _, inputs = problem(seed)
        q = run("awq", w, "int4", inputs)
        smooth, scheme = q.smooth.astype(jnp.float32), number_formats.scheme("int4")
        importance = (jnp.diag(inputs.gram) * smooth**2)[:, None]
        scaled = w / smooth[:, None]
        absmax, weighted, unweighted = (
            np.asarray(number_formats.scale_values(number_formats.store_scales(scale, scheme)), np.float32)
            for scale in (
                number_formats.scales(scaled, scheme, weights.IN)[0],
                methods.clip(scaled, scheme, weights.IN, importance)[0],
                methods.clip(scaled, scheme, weights.IN)[0],
            )
        )
        scale = np.asarray(number_formats.scale_values(q.scale), np.float32)
        if not np.array_equal(scale, absmax):
            clipped += 1
            np.testing.assert_allclose(scale, weighted, rtol=1e-2)
            assert np.mean(~np.isclose(scale, unweighted, rtol=1e-2)) > 0.1
    assert clipped


def test_static_scales_reach_the_largest_input():
    w, x, inputs = problem(6)
    q = run("absmax", w, "w8a8_static", inputs)
    np.testing.assert_allclose(q.input_scale, np.abs(x).max() / 127, rtol=1e-6)
    smoothed = run("smoothquant", w, "w8a8_static", inputs)
    largest = np.abs(x * np.asarray(smoothed.smooth, np.float32)).max()
    np.testing.assert_allclose(smoothed.input_scale, largest / 127, rtol=1e-3)
    clipped = run("percentile", w, "w8a8_static", inputs)
    np.testing.assert_allclose(clipped.input_scale, np.quantile(np.abs(x), 0.999) / 127, rtol=1e-3)
