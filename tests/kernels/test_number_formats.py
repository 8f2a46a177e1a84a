"""Number formats against the papers' formulas in numpy, ml_dtypes, ggml's blocks, and bitsandbytes' NF4."""

import dataclasses
import functools
import pathlib

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llm_jax import weights
from llm_jax.errors import UserError
from llm_jax.kernels import blocks, number_formats

GOLDEN = np.load(pathlib.Path(__file__).with_name("nf4_golden.npz"))
NORMAL = np.random.default_rng(1).normal(0, 0.1, (128, 96)).astype(np.float32)


scales, stored = (
    jax.jit(f, static_argnums=n) for f, n in ((number_formats.scales, (1, 2)), (number_formats.store_scales, 1))
)
encode, decode = (jax.jit(f, static_argnums=(3, 4)) for f in (number_formats.encode, number_formats.decode))


@functools.partial(jax.jit, static_argnums=(1, 2))
def round_trip(w, name, axis):
    s = number_formats.scheme(name)
    scale, offset = number_formats.scales(w, s, axis)
    kept, offset = (
        number_formats.store_scales(scale, s),
        offset if offset is None else number_formats.store_scales(offset, s),
    )
    return number_formats.decode(number_formats.encode(w, kept, offset, s, axis), kept, offset, s, axis)


def groups(w, size, axis):
    """Every group as a row."""
    w = np.moveaxis(w, axis, -1)
    return w.reshape(-1, size)


# What a number may be off by, over the largest magnitude of its group: half the widest gap between the values of a
# format in units of its largest one, and 2^-10 where the scale is a float16.
BOUND = {
    "int8": 0.5 / 127,
    "w8a8": 0.5 / 127,
    "int4": 0.5 / 7 + 2**-10,
    "int2": 0.5 + 2**-10,
    "nf4": (1 - 0.6961928) / 2,
    "fp8_e4m3": 2.0**-4,
    "fp8_e5m2": 2.0**-3,
    "mxfp4": 0.25,  # 8 is clipped to 6
}
AFFINE = {"int8_affine": 255, "int4_affine": 15, "int2_affine": 3}
# Zeros, constants and outliers of 10^6 beside the plain numbers; float16 scales bound the smallest.
NUMBERS = st.one_of(st.floats(-4, 4, width=32), st.sampled_from([0.0, 1.0, -1.0, 1e4, -1e4]))
# A weight of each number of axes, and groups along each of the last two: each shape is a compilation for each format.
WEIGHTS = st.one_of(
    *(
        st.tuples(arrays.arrays(np.float32, shape, elements=NUMBERS), st.just(axis))
        for shape, axis in (((2, 64, 4), -2), ((3, 64), -1))
    )
)


@hypothesis.settings(max_examples=15)
@hypothesis.given(WEIGHTS)
@pytest.mark.parametrize("name", BOUND)
def test_symmetric_round_trips_are_off_by_half_a_gap(name, weight):
    w, axis = weight
    s = number_formats.scheme(name)
    size = s.group if s.group > 0 else w.shape[axis]
    got = np.asarray(round_trip(w, name, axis))
    largest = np.abs(groups(w, size, axis)).max(-1)
    error = np.abs(groups(got, size, axis) - groups(w, size, axis)).max(-1)
    assert (error <= largest * BOUND[name] * (1 + 1e-5) + 1e-6).all()


@hypothesis.settings(max_examples=15)
@hypothesis.given(WEIGHTS)
@pytest.mark.parametrize("name", AFFINE)
def test_affine_round_trips_are_off_by_half_a_step_of_the_range(name, weight):
    w, axis = weight
    s = number_formats.scheme(name)
    size = s.group if s.group > 0 else w.shape[axis]
    by_group = groups(w, size, axis)
    error = np.abs(groups(np.asarray(round_trip(w, name, axis)), size, axis) - by_group).max(-1)
    bound = np.ptp(by_group, -1) / AFFINE[name] / 2 * (1 + 1e-5) + 1e-6
    if s.scale == "float16":  # both ends are rounded: the minimum once, the step as often as there are steps
        bound += (np.abs(by_group).max(-1) + np.ptp(by_group, -1)) * 2.0**-10
    assert (error <= bound + np.abs(by_group).max(-1) * 1e-6).all()


@pytest.mark.parametrize("name", number_formats.WEIGHT_SCHEMES)
def test_representable_values_are_unchanged(name):
    """Quantizing again what codes stand for gives the same numbers: the nearest code is the code."""
    s = number_formats.scheme(name)
    scale, offset = scales(NORMAL, s, -2)
    kept = stored(scale, s)
    offset = None if offset is None else stored(offset, s)
    codes = encode(NORMAL, kept, offset, s, -2)
    values = decode(codes, kept, offset, s, -2)
    np.testing.assert_array_equal(encode(values, kept, offset, s, -2), codes)


@pytest.mark.parametrize("name", ["int4", "int2", "nf4", "mxfp4", "int4_affine:64"])
@pytest.mark.parametrize("axis", [-2, -1])
def test_codes_are_the_nearest_of_all(name, axis):
    """Against a search over every value that a code has."""
    w = NORMAL if axis == -2 else NORMAL.T
    s = number_formats.scheme(name)
    f = number_formats.FORMATS[s.format]
    scale, offset = scales(w, s, axis)
    kept = stored(scale, s)
    offset = None if offset is None else stored(offset, s)
    codes = encode(w, kept, offset, s, axis)
    assert codes.dtype == np.uint8 and codes.size * 8 // f.bits == w.size
    values = np.asarray(f.values or np.arange(f.low, f.high + 1), np.float64)
    wide = lambda a: np.repeat(np.asarray(number_formats.scale_values(a), np.float64), s.group, axis)  # noqa: E731
    candidates = wide(kept)[..., None] * values + (0 if offset is None else wide(offset)[..., None])
    best = np.abs(candidates - w[..., None]).min(-1)
    got = np.asarray(decode(codes, kept, offset, s, axis), np.float64)
    np.testing.assert_allclose(np.abs(got - w), best, atol=1e-7)


def test_bits_per_weight_count_every_scale():
    w = jnp.zeros((1024, 512))
    expected = {
        "int8": 8 + 32 / 1024,
        "int8:tensor": 8 + 32 / (1024 * 512),
        "int4": 4.5,
        "int4:64": 4.25,
        "int4:channel": 4 + 32 / 2 / 1024,
        "int4_affine": 5,
        "int2_affine:64": 2.5,
        "mxfp4": 4.25,
        "nf4": 4 + 8 / 64 + 32 / (64 * 256) + 32 / (1024 * 512),  # QLoRA, section 3: 0.127 bits, and the mean
        "fp8_e4m3": 8 + 32 / 1024,
    }
    for name, bits in expected.items():
        q = jax.eval_shape(lambda w, name=name: weights.to_qtensor(w, name, -2), w)
        assert weights.bits_per_weight(q) == bits, name


def test_nf4_and_its_scales_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(np.float32(number_formats.FORMATS["nf4"].values), GOLDEN["table"])
    # Of 8 bits: equal as printed, to the rounding of a float32.
    np.testing.assert_allclose(np.float32(number_formats.FORMATS["dynamic8"].values), GOLDEN["scale_table"], atol=6e-8)
    rows, s = GOLDEN["rows"].astype(np.float32), number_formats.scheme("nf4")
    scale, _ = number_formats.scales(rows, s, -1)
    np.testing.assert_array_equal(np.ravel(scale), GOLDEN["scales"])
    codes = number_formats.encode(rows, scale, None, s, -1)
    whole = np.concatenate([codes.reshape(64, 5, 32) & 15, codes.reshape(64, 5, 32) >> 4], -1).reshape(64, 320)
    np.testing.assert_array_equal(whole, GOLDEN["codes"])
    # bitsandbytes has its 320 scales in one run, ours lie along an axis: 256 and the rest.
    run = np.asarray(scale).reshape(1, -1)
    double = number_formats.scheme("double")
    mean = np.full((1, 1), GOLDEN["mean"])
    np.testing.assert_allclose(run.mean(), mean[0, 0], rtol=1e-6)
    for part, theirs in ((run[:, :256], GOLDEN["scale_scales"][:1]), (run[:, 256:], GOLDEN["scale_scales"][1:])):
        kept = np.abs(part - mean).max(-1, keepdims=True)
        np.testing.assert_allclose(kept[0], theirs, rtol=1e-6)
    kept = np.repeat(GOLDEN["scale_scales"], [256, 64])[None]
    x = ((run - mean) / kept)[0]
    ours = np.asarray(
        number_formats.encode(x[None], jnp.ones((1, 1)), None, dataclasses.replace(double, group=320), -1)
    )[0]
    theirs = GOLDEN["scale_codes"]
    # Theirs looks codes up by rounded numbers: where we differ, by the next code, ours is the nearer one.
    table = np.float64(number_formats.FORMATS["dynamic8"].values)
    assert (np.abs(table[ours] - x) <= np.abs(table[theirs] - x)).all()
    assert np.abs(ours.astype(int) - theirs).max() <= 1 and np.mean(ours == theirs) > 0.98


def test_double_quantization_takes_the_scales_of_the_paper():
    """Groups of 64, their scales less the mean in groups of 256 (QLoRA, section 3), one step after the other."""
    w = np.random.default_rng(2).normal(0, 0.1, (256, 512)).astype(np.float32)
    q = weights.to_qtensor(jnp.asarray(w), "nf4", -2)
    assert q.scale.scheme == "double:256" and q.scale.codes.shape == (4, 512) and q.scale.scale.shape == (4, 2)
    scales = np.abs(w.reshape(4, 64, 512)).max(1)
    np.testing.assert_allclose(q.scale.offset, scales.mean(keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(q.scale.scale, np.abs(scales - scales.mean()).reshape(4, 2, 256).max(-1), rtol=1e-4)
    assert np.abs(q.scale.dense() / scales - 1).max() < 0.01


def test_e2m1_and_fp8_round_as_ml_dtypes():
    """MXFP4 elements and fp8 (OCP), ties to even included."""
    x = np.concatenate([np.linspace(-6, 6, 4001), np.arange(-24, 25) / 4]).astype(np.float32)
    np.testing.assert_array_equal(
        number_formats.round_to_format(x, "e2m1"), x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    )
    for name, dtype in (("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)):
        y = x * number_formats.FORMATS[name].high / 6
        np.testing.assert_array_equal(number_formats.round_to_format(y, name), y.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("largest", [0.7, 1.0, 3.99, 4.0, 6.0, 2.0**-100, 2.0**100])
def test_mxfp4_scales_are_powers_of_two_by_the_standard(largest):
    """Shared exponent: floor(log2(largest)) - 2 (OCP Microscaling Formats 1.0, section 6.3)."""
    w = np.zeros((32, 1), np.float32)
    w[5] = -largest
    s = number_formats.scheme("mxfp4")
    kept = number_formats.store_scales(number_formats.scales(w, s, -2)[0], s)
    assert kept.dtype == np.uint8 and int(kept[0, 0]) - 127 == np.floor(np.log2(largest)) - 2
    assert number_formats.scale_values(kept)[0, 0] == 2.0 ** (np.floor(np.log2(largest)) - 2)


@pytest.mark.parametrize(("name", "block"), [("int8:32", "Q8_0"), ("int4", "Q4_0"), ("int4_affine", "Q4_1")])
def test_codes_mean_what_ggml_blocks_mean(name, block):
    """A block's codes and scales, taken as ours, stand for the very numbers that ggml reads."""
    rows = blocks.encode(block, NORMAL).reshape(128, 3, -1)
    half = lambda b: np.ascontiguousarray(b).view(np.float16)[..., 0]  # noqa: E731
    scale, offset = half(rows[..., :2]), half(rows[..., 2:4]) if block == "Q4_1" else None
    codes = rows[..., {"Q8_0": 2, "Q4_0": 2, "Q4_1": 4}[block] :].reshape(128, -1)
    codes = codes.view(np.int8) if block == "Q8_0" else codes
    s = dataclasses.replace(number_formats.scheme(name), scale="float16")
    ours = number_formats.decode(jnp.asarray(codes), jnp.asarray(scale), offset, s, -1)
    np.testing.assert_array_equal(ours, blocks.decode(block, rows.reshape(128, -1)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("int5", "the scheme 'int5' is unknown; expected one of int8,"),
        ("int4:", "the group ''"),
        ("int4:1", "the group '1'"),
        ("int4:-32", "the group '-32'"),
        ("w8a8:32", "one scale per channel"),
    ],
)
def test_unknown_scheme_names_are_rejected(name, said):
    with pytest.raises(UserError, match=said):
        number_formats.scheme(name)


def test_a_group_that_does_not_fit_is_named():
    reason = number_formats.unsupported_reason
    assert reason(number_formats.scheme("int4"), 96) == ""
    assert reason(number_formats.scheme("int4"), 100) == "the group 32 does not divide its 100 inputs"
    assert "do not pack" in reason(number_formats.scheme("int4:3"), 9)
    assert "do not pack" in reason(number_formats.scheme("int2:channel"), 6)
