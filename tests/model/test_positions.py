"""Position schemes against their papers' formulas in plain numpy, and the properties P1, P3, P6."""

import dataclasses
import functools
import json
import math
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.model import distances, positions, rope
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.transformer import Transformer, check_length, consecutive
from tests import compilation

GOLDEN = json.loads(pathlib.Path(__file__).with_name("rope_golden.json").read_text())


@pytest.fixture
def position(tiny):
    return lambda **changes: dataclasses.replace(tiny.model.position, **changes)


def rotated(config, x, where):
    return np.asarray(rope.rotate(config, jnp.asarray(x), jnp.asarray(where), None))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["scaling"])
def test_frequencies_equal_those_of_transformers(position, case):
    """tests/model/make_rope_golden.py made the golden with transformers."""
    config = position(kind="rope", **case["ours"])
    width = int(case["head_dim"] * config.partial_rotary_factor)
    got = rope.frequencies(config, width, jnp.asarray([[case["length"]]])).reshape(-1)
    np.testing.assert_allclose(got, case["inv_freq"], rtol=2e-6)
    assert rope.attention_factor(config) == pytest.approx(case["attention_factor"], rel=1e-6)


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    st.integers(0, 3000),
    st.integers(0, 500),
    st.sampled_from([2, 8, 64]),
    st.booleans(),
    # Phases are float32, off by up to s 2^-24 at s radians, in either dtype; bfloat16 rounds each entry by 2^-9.
    st.sampled_from([("float32", 5e-4), ("bfloat16", 1.5e-2)]),
)
def test_p6_rope_scores_depend_on_the_offset_only(shift, offset, width, interleaved, precision):
    config, (dtype, bound) = DEFAULT(partial_rotary_factor=1.0, interleaved=interleaved), precision
    q, k = np.random.default_rng(shift).normal(size=(2, 1, 1, 1, width)).astype(np.float32)
    q, k = (np.asarray(jnp.asarray(x, dtype)) for x in (q, k))

    def score(start):
        turned = (rotated(config, q, [[start + offset]]), rotated(config, k, [[start]]))
        return float(np.sum(np.prod([np.asarray(x, np.float32) for x in turned], 0)))

    size = float(np.linalg.norm(q.astype(np.float32)) * np.linalg.norm(k.astype(np.float32)))
    assert score(shift) == pytest.approx(score(0), abs=bound * size)


def DEFAULT(**changes):
    from llm_jax import configuration as config_lib
    from tests.test_configuration import default

    return dataclasses.replace(config_lib.build(default()).model.position, **changes)


def test_phases_are_f32_whatever_the_compute_dtype(position):
    config, where = position(kind="rope"), [[1023]]
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 64)).astype(np.float32)
    low = np.asarray(rope.rotate(config, jnp.asarray(x, jnp.bfloat16), jnp.asarray(where), None), np.float32)
    # bf16 angles would be off by up to 4 radians here; rounding the result is off by 2^-8.
    np.testing.assert_allclose(low, rotated(config, x, where), atol=0.04)


@pytest.mark.parametrize("case", [{}, {"interleaved": True}, {"partial_rotary_factor": 0.5}], ids=str)
def test_rows_of_tokens_are_rotated_as_single_tokens(position, case):
    config, where = position(kind="rope", **case), np.asarray([[3, 0, 1023, 70000], [0, 1, 2, 3]])
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 16)).astype(np.float32)
    rows = rotated(config, x, where)
    single = [rotated(config, x[:, i : i + 1], where[:, i : i + 1]) for i in range(4)]
    np.testing.assert_allclose(rows, np.concatenate(single, 1), rtol=0, atol=1e-6)
    assert np.max(np.abs(rows - x)) > 1


def test_on_cpus_sines_are_computed_once(position):
    config, shape = position(kind="rope"), jax.ShapeDtypeStruct((2, 16, 4, 16), jnp.float32)

    def scores(q, k, where):
        q, k = (rope.rotate(config, x, where, None) for x in (q, k))
        return jnp.sum(jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k)) ** 2)

    gradient = jax.jit(jax.grad(scores, (0, 1)))
    lowered = gradient.lower(shape, shape, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    assert compilation.with_optimized_hlo(lowered).as_text().count(" sine(") == 1


def test_interleaved_pairs_are_neighbours_and_the_rest_stays(position):
    config = position(kind="rope", interleaved=True, partial_rotary_factor=0.5)
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 16)).astype(np.float32)
    got = rotated(config, x, [[7]])[0, 0, 0]
    np.testing.assert_array_equal(got[8:], x[0, 0, 0, 8:])
    z = x[0, 0, 0, :8:2] + 1j * x[0, 0, 0, 1:8:2]
    turned = z * np.exp(7j * 10000.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(got[:8:2] + 1j * got[1:8:2], turned, atol=1e-5)


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.integers(0, 2000), st.integers(0, 2000), st.sampled_from([2, 16, 128]))
def test_p3_an_offset_is_a_linear_map_of_sinusoids(p, k, width):
    at = lambda n: np.asarray(positions.sinusoids(jnp.asarray([n]), width, 10000.0), np.float64)[0]  # noqa: E731
    angles = k * 10000.0 ** (-np.arange(0, width, 2) / width)
    moved = np.empty(width)
    moved[::2] = at(p)[::2] * np.cos(angles) + at(p)[1::2] * np.sin(angles)
    moved[1::2] = at(p)[1::2] * np.cos(angles) - at(p)[::2] * np.sin(angles)
    np.testing.assert_allclose(at(p + k), moved, atol=1e-3)


@functools.cache
def _applied(model):
    return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))


@hypothesis.settings(max_examples=6)
@hypothesis.given(st.sampled_from([(1, 5), (3, 20)]), st.integers(0, 2**31))  # few shapes: each is compiled
def test_p1_without_positions_a_bidirectional_model_sees_no_order_and_a_causal_one_does(make, tiny, shape, seed):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(3, 259, shape)
    order = np.append(draw.permutation(np.arange(1, shape[1])), 0)  # the first comes last: not the identity
    none = dataclasses.replace(tiny.model.position, kind="none")

    def error(causal, position):
        model, params = make(causal=causal, position=position)
        run = _applied(model)
        return np.abs(run(params, tokens[:, order]) - run(params, tokens)[:, order]).max()

    assert error(False, none) < 1e-5
    assert error(True, none) > 0.1
    assert error(False, tiny.model.position) > 0.1


def t5_bucket_of_the_paper(offset, causal, buckets=32, far=128):
    """One number at a time, from the text of section 2.1 and the code it points to."""
    start = 0
    if not causal:
        buckets //= 2
        start = buckets if offset > 0 else 0
        n = abs(offset)
    else:
        n = max(-offset, 0)
    exact = buckets // 2
    if n < exact:
        return start + n
    return start + min(buckets - 1, exact + int(math.log(n / exact) / math.log(far / exact) * (buckets - exact)))


@pytest.mark.parametrize("causal", [True, False])
def test_t5_buckets_are_those_of_the_paper(causal):
    offsets = np.arange(-300, 301)
    # Exact powers fall on a rounding edge of the logarithm; the reference implementation's is float32 too.
    got = np.asarray(distances.t5_buckets(jnp.asarray(offsets), 32, 128, causal))
    expected = np.array([t5_bucket_of_the_paper(int(o), causal) for o in offsets])
    assert np.mean(got == expected) > 0.98 and np.max(np.abs(got - expected)) <= 1


@pytest.mark.parametrize(
    "where", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 0], [7, 8, 9, 10, 0, 0], [0, 2, 3, 7, 8, 40], [3, 2, 1, 0, 9, 4]]
)
def test_t5_looks_up_the_offset_of_positions_whatever_they_are(tiny, where):
    """By diagonals where positions are consecutive, entry by entry where they are not; with the same gradient."""
    position = dataclasses.replace(tiny.model.position, kind="t5", num_buckets=8, max_distance=9)
    scheme = positions.T5(dataclasses.replace(tiny.model, position=position))
    table = jax.random.normal(jax.random.key(0), (8, tiny.model.num_heads))
    rows = jnp.asarray([where, where])
    offsets = np.asarray(where)[None, :] - np.asarray(where)[:, None]
    segments = np.cumsum([0] + [after == 0 for after in where[1:]])
    same = segments[:, None] == segments[None, :]
    weight = np.random.default_rng(0).normal(size=(2, tiny.model.num_heads, 6, 6)) * same

    def summed(table, bucket_of=None):
        bias = scheme.bias(rows, rows, {"bias": table}) if bucket_of is None else jnp.moveaxis(table[bucket_of], -1, 0)
        return jnp.sum(bias * weight)

    buckets = distances.t5_buckets(jnp.asarray(offsets), 8, 9, tiny.model.causal)
    got, gradient = jax.jit(jax.value_and_grad(summed))(table)
    expected, expected_gradient = jax.value_and_grad(summed)(table, buckets)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def test_alibi_penalizes_by_slope_and_distance(tiny):
    scheme = positions.Alibi(tiny.model)
    got = scheme.bias(jnp.asarray([[3, 4]]), jnp.asarray([[0, 3, 4]]), {})
    slopes = np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    np.testing.assert_allclose(got[0], -slopes[:, None, None] * [[3, 0, 1], [4, 1, 0]])


@pytest.mark.parametrize("which", ["keys", "values", "both"])
def test_shaw_equals_the_formula_with_every_vector_written_out(make, tiny, which):
    position = dataclasses.replace(tiny.model.position, kind="shaw", relative_embeddings=which, max_relative_position=2)
    model, _ = make(position=position)
    scheme, clip = positions.make(model.config), 2
    draw = np.random.default_rng(0)
    q, k, v = draw.normal(size=(3, 1, 5, 2, 8)).astype(np.float32)
    table = {name: draw.normal(size=shape).astype(np.float32) for name, shape in scheme.declare_layer().items()}
    where = TokenMetadata(jnp.arange(5)[None], jnp.ones((1, 5), int))
    from llm_jax.model.attention import attention_mask
    from llm_jax.model.attention_kernels import attend_adding

    add = scheme.values(where.positions, where.positions, table) or (lambda shares: 0 * jnp.asarray(v))
    own = scheme.keys(jnp.asarray(q), where.positions, where.positions, table)
    mask = attention_mask(where, where, None)
    got = attend_adding(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), mask, own, add)

    index = np.clip(np.arange(5)[None] - np.arange(5)[:, None], -clip, clip) + clip
    key = table.get("keys", np.zeros((5, 8)))[index]  # (T, S, H), which the model never forms
    value = table.get("values", np.zeros((5, 8)))[index]
    for n in range(2):
        scores = (q[0, :, n] @ k[0, :, n].T + np.einsum("th,tsh->ts", q[0, :, n], key)) / np.sqrt(8)
        scores = np.where(np.tril(np.ones((5, 5))), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        expected = shares @ v[0, :, n] + np.einsum("ts,tsh->th", shares, value)
        np.testing.assert_allclose(got[0, :, n], expected, atol=1e-5)


def test_shaw_forms_nothing_of_size_time_by_time_by_head(make, tiny):
    position = dataclasses.replace(tiny.model.position, kind="shaw", max_relative_position=5)
    model, params = make(position=position)
    tokens = jnp.zeros((1, 48), int)
    text = jax.jit(jax.grad(lambda p: jnp.var(model.apply({"params": p}, tokens)))).lower(params).compile().as_text()
    assert "48,48]" in text and "48,48,8]" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "rotary"}, "expected one of alibi, learned, none, rope, shaw, sinusoidal, t5"),
        ({"partial_rotary_factor": 0.3}, r"partial_rotary_factor=0.3 of head_dim=8 is 2.4"),
        ({"partial_rotary_factor": 0.125}, "is 1; rope rotates pairs"),
        ({"scaling": "magic"}, "expected one of dynamic, linear, llama3, longrope, none, ntk, yarn"),
        ({"scaling": "yarn", "scaling_factor": 2.0}, "scaling=yarn needs model.position.original_length"),
        ({"scaling": "linear", "scaling_factor": 0.5}, "'model.position.scaling_factor' is 0.5"),
        (
            {"scaling": "llama3", "scaling_factor": 2.0, "original_length": 8, "low_freq_factor": 4.0},
            "low_freq_factor is 4; expected",
        ),
        ({"kind": "learned", "combine": "concatenate", "width": 32}, "model.position.width=32"),
        ({"kind": "learned", "combine": "concatenate", "width": 8}, "needs model.tie_embeddings=False"),
        ({"kind": "shaw", "relative_embeddings": "queries"}, "expected one of both, keys, values"),
        ({"kind": "t5", "num_buckets": 6}, "model.position.num_buckets=6"),
    ],
)
def test_contradictory_position_options_are_rejected(tiny, position, changes, message):
    config = dataclasses.replace(tiny.model, position=position(**changes))
    with pytest.raises(UserError, match=message):
        positions.make(config)


def test_local_layers_rotate_with_their_own_base_and_without_scaling(tiny):
    x = jax.random.normal(jax.random.key(0), (1, 9, 2, 8))
    where = jnp.arange(9, dtype=jnp.int32)[None]
    scaled = {"kind": "rope", "base": 1e4, "scaling": "linear", "scaling_factor": 4.0}

    def rotated(local, **options):
        position = dataclasses.replace(tiny.model.position, **options)
        return positions.make(dataclasses.replace(tiny.model, position=position), local and "local").rotate(
            x, where, None
        )

    own = rotated(True, **scaled, local_base=50.0)
    np.testing.assert_array_equal(own, rotated(False, kind="rope", base=50.0))
    shared = rotated(False, **scaled)
    np.testing.assert_array_equal(shared, rotated(True, **scaled, local_base=0.0))
    np.testing.assert_array_equal(shared, rotated(False, **scaled, local_base=50.0))
    assert np.abs(own - shared).max() > 0.1


def test_longrope_has_its_long_factors_past_the_trained_length_only(position):
    settings = {"original_length": 10, "short_factors": (1.0, 2.0), "long_factors": (4.0, 8.0)}
    got = rope.frequencies(position(scaling="longrope", base=100.0, **settings), 4, jnp.asarray([[9, 10, 11]]))
    np.testing.assert_allclose(got[0], [[1, 0.05], [1, 0.05], [0.25, 0.0125]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["rope", "alibi", "t5"])
def test_layers_without_positions_are_those_of_a_model_without_positions(make, tiny, kind):
    tokens = jnp.arange(3, 12)[None]
    position = dataclasses.replace(tiny.model.position, kind=kind)
    model, params = make(position=position, layer_pattern=("nope",))
    plain, _ = make(position=dataclasses.replace(position, kind="none"))
    params = trees.map_weights(lambda path, w: w * 30 if "position" in path else w, params)
    got, expected = (jax.jit(m.apply)({"params": params}, tokens) for m in (model, plain))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_positions_past_a_learned_table_are_refused(make, tiny):
    config = dataclasses.replace(
        tiny.model, position=dataclasses.replace(tiny.model.position, kind="learned", max_length=8)
    )
    check_length(config, 8)
    with pytest.raises(UserError, match="exceed the 8 positions"):
        check_length(config, 9)
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    with pytest.raises(UserError, match="exceed the 8 positions"):
        jax.jit(model.apply)({"params": params}, jnp.zeros((1, 9), int))
    where = consecutive(jnp.zeros((1, 9), int))
    assert jnp.isnan(jax.jit(model.apply)({"params": params}, where.positions, where)[0, 8]).all()
