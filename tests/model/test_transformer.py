import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.model import distances, positions
from llm_jax.model.attention import TokenMetadata, attention_mask, read_layer
from llm_jax.model.attention_kernels import attend
from llm_jax.model.layer_stack import Layer
from llm_jax.model.stages import stages
from llm_jax.model.transformer import Transformer, init_cache, matmul_parameters

LENGTH = 12
ZEROS = np.zeros((2, 3), int)
LAYOUTS = {
    "single": {"num_layers": 1},
    "uniform": {},
    "local": {
        "num_layers": 5,
        "layer_pattern": ("local", "nope", "global"),
        "window": 4,
        "norm_placement": "output",
        "qk_norm_axis": "width",
    },
    "parallel": {
        "num_layers": 3,
        "layer_pattern": ("local", "global"),
        "window": 4,
        "mlp": "plain",
        "activation": "gelu",
        "norm": "layer",
        "parallel_residual": True,
        "parallel_norms": True,
        "scale_attention_by_depth": True,
        "attention_bias": True,
        "tie_embeddings": False,
        "qk_norm_kind": "layer",
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
    },
    "plain": {
        "mlp": "plain",
        "activation": "gelu",
        "norm": "layer",
        "bias": True,
        "tie_embeddings": False,
        "qk_norm": False,
    },
}

VARIANTS = {
    **{kind: {"kind": kind} for kind in positions.SCHEMES},
    "half": {"kind": "rope", "partial_rotary_factor": 0.5, "interleaved": True},
    "yarn": {"kind": "rope", "scaling": "yarn", "scaling_factor": 2.0, "original_length": 6},
    "dynamic": {"kind": "rope", "scaling": "dynamic", "scaling_factor": 2.0, "original_length": 6},
    "longrope": {
        "kind": "rope",
        "scaling": "longrope",
        "scaling_factor": 2.0,
        "original_length": 7,
        "short_factors": (1.0, 1.2, 1.5, 2.0),
        "long_factors": (1.0, 2.0, 4.0, 8.0),
    },
    "shaw-keys": {"kind": "shaw", "relative_embeddings": "keys", "max_relative_position": 3},
    "concatenate": {"kind": "sinusoidal", "combine": "concatenate", "width": 8},
}
CASES = [
    *((name, {"concatenate": "plain"}.get(name, "uniform")) for name in VARIANTS),
    ("t5", "local"),
    ("rope", "parallel"),
]


def cases_of_the_gate(fast):  # the others are slow
    return [pytest.param(case, marks=[] if case in fast else pytest.mark.slow) for case in CASES]


@pytest.fixture(params=CASES, ids="-".join)
def any_model(request, make, tiny):
    variant, layout = request.param
    model, params = make(position=dataclasses.replace(tiny.model.position, **VARIANTS[variant]), **LAYOUTS[layout])
    # Position weights start small: bring them up to where a mistake shows.
    return model, trees.map_weights(lambda path, w: w * 30 if "position" in path else w, params)


@pytest.fixture
def tokens():
    return jax.random.randint(jax.random.key(1), (2, LENGTH), 3, 259)


@functools.partial(jax.jit, static_argnums=0)  # one function, so that tests of one model share its programs
def logits(model, params, *inputs):
    return model.apply({"params": params}, *inputs)


def test_a_token_changes_its_own_logits_and_later_ones_only(any_model, tokens):
    model, params = any_model
    before, far = logits(model, params, tokens), -2 if "local" in model.config.layer_pattern else 0
    for t in range(LENGTH):
        other = np.array(tokens)
        other[:, t] = np.where(other[:, t] > 9, other[:, t] - 1, 20)
        changed = np.any(logits(model, params, other) != before, -1)
        assert not changed[:, :t].any() and changed[:, t].all(), t
        assert changed[:, -1].all() or t not in (far % LENGTH, LENGTH - 1), t


# The backward pass of positions added, rotated and biased, and of both patterns; .ci/full takes them all.
BY_GRADIENT = [("learned", "uniform"), ("shaw", "uniform"), ("t5", "local"), ("rope", "parallel")]


@pytest.mark.parametrize("any_model", cases_of_the_gate(BY_GRADIENT), ids="-".join, indirect=True)
def test_causality_by_gradient(any_model):
    model, params = any_model
    x = jnp.zeros((1, LENGTH, params["embed"]["table"].shape[1]))

    def at(x, t):  # the embeddings are an input, so that one can ask who depends on whom
        table = jnp.concatenate([x[0], params["embed"]["table"][LENGTH:]])
        changed = params | {"embed": params["embed"] | {"table": table}}
        return jnp.sum(
            jnp.square(model.apply({"params": changed}, jnp.arange(LENGTH)[None], method="features")[0][0, t])
        )

    x += jax.random.normal(jax.random.key(2), x.shape)
    gradient = jax.jit(jax.grad(at))
    reach = jnp.concatenate([gradient(x, t) for t in range(LENGTH)])
    depends = jnp.max(jnp.abs(reach), -1) > 0
    np.testing.assert_array_equal(np.triu(depends, 1), False)
    assert np.diag(depends).all() and depends[-1, 0 if "local" not in model.config.layer_pattern else -2]


def test_cached_decode_equals_the_full_forward_of_the_prefix(any_model, tokens):
    model, params = any_model
    counts = jnp.arange(LENGTH)[None].repeat(2, 0)
    pad = ((0, 0), (0, LENGTH))  # the shape of the test of padding and packing

    def full(params, t):  # what comes after position t is padding
        where = TokenMetadata(jnp.pad(counts, pad), jnp.pad((counts <= t).astype(int), pad))
        return logits(model, params, jnp.pad(tokens, pad), where)

    step = jax.jit(lambda p, t, w, c: model.apply({"params": p}, t, w, c))
    start = TokenMetadata(counts[:, :5], jnp.ones((2, 5), int))
    got, cache = step(params, tokens[:, :5], start, init_cache(model.config, 2, 20))
    np.testing.assert_allclose(got, full(params, 4)[:, :5], atol=5e-5)
    for t in range(5, LENGTH):
        where = TokenMetadata(counts[:, t : t + 1], jnp.ones((2, 1), int))
        got, cache = step(params, tokens[:, t : t + 1], where, cache)
        np.testing.assert_allclose(got[:, 0], full(params, t)[:, t], atol=5e-5)


def test_an_int8_cache_rounds_every_head_and_token_and_nothing_else(make, tokens):
    (model, params), (unrounded, _) = make(kv_cache="int8"), make()
    counts = jnp.arange(LENGTH)[None].repeat(2, 0)
    step = jax.jit(lambda p, t, w, c: model.apply({"params": p}, t, w, c))
    where = TokenMetadata(counts, jnp.ones((2, LENGTH), int))
    whole = jax.jit(lambda p, c: unrounded.apply({"params": p}, tokens, where, c))
    _, exact = whole(params, init_cache(unrounded.config, 2, 16))
    full, cache = step(params, tokens, where, init_cache(model.config, 2, 16))
    (layer,), (of_exact,) = (next(iter(c.layers.values())).values() for c in (cache, exact))
    for name in ("key", "value"):
        kept, scale = layer[name][0], layer[f"{name}_scale"][0].astype(jnp.float32)  # the first layer sees no rounding
        assert kept.dtype == jnp.int8 and jnp.abs(kept).max() == 127
        values = of_exact[name][0]
        np.testing.assert_allclose(scale[..., 0] * 127, jnp.abs(values).max(-1), rtol=1e-3)
        assert (
            jnp.abs(read_layer({"x": kept, "x_scale": scale}, "x", jnp.float32) - values) <= scale * 0.56 + 1e-9
        ).all()
    # Token by token it is what it is in one go, and both are near the unrounded model.
    one = init_cache(model.config, 2, 16)
    for t in range(LENGTH):
        got, one = step(params, tokens[:, t : t + 1], TokenMetadata(counts[:, t : t + 1], jnp.ones((2, 1), int)), one)
    np.testing.assert_allclose(got[:, 0], full[:, -1], atol=1e-4)
    plain = logits(unrounded, params, tokens)
    assert 1e-6 < jnp.abs(full - plain).max() < 0.05 * jnp.abs(plain).max()


@pytest.mark.parametrize(
    ("tokens", "where", "types", "message"),
    [
        (np.zeros(3, np.int32), None, None, r"tokens: int32 of shape \(3,\); expected .* of shape \(batch, length\)"),
        (np.zeros((2, 3), np.float32), None, None, r"tokens: float32 of shape \(2, 3\); expected integers of shape"),
        (np.array([[1, 259]]), None, None, "the id 259 is not in the vocabulary of the model; expected 0 to 258"),
        (np.array([[1, -1]]), None, None, "tokens: the id -1 is not in the vocabulary"),
        (ZEROS, TokenMetadata(np.zeros((2, 3)), ZEROS), None, "metadata.positions: float"),
        (
            *(ZEROS, TokenMetadata(ZEROS, np.zeros((2, 4), int)), None),
            r"metadata.segments: int\d\d of shape \(2, 4\); expected integers of shape \(2, 3\), like the tokens",
        ),
        (ZEROS, None, np.zeros((1, 3), int), r"types: int\d\d of shape \(1, 3\); expected"),
        ([[1, 2]], None, None, r"tokens: list; expected an array, such as jnp.asarray\(tokens\)"),
        (np.zeros((2, 0), int), None, None, r"tokens: shape \(2, 0\); expected at least one token per row"),
        (ZEROS, None, None, r"called without parameters; call model.apply\({\"params\": params}"),
    ],
)  # fmt: skip
def test_inputs_of_another_shape_dtype_or_range_are_refused(tiny, tokens, where, types, message):
    model = Transformer(tiny.model)
    with pytest.raises(UserError, match=message):
        model.apply({}, tokens, where, None, types, method="features")


def test_calls_of_other_codebases_name_the_call_of_this_model(tiny):
    model, tokens = Transformer(tiny.model), jnp.zeros((1, 2), int)
    for call in (lambda: model(tokens), lambda: model.apply({"embed": {}, "layers": {}}, tokens)):
        with pytest.raises(UserError, match="called without parameters"):
            call()
    with pytest.raises(UserError, match='first argument of model.apply is list; expected {"params": params}, follow'):
        model.apply([[1]])
    with pytest.raises(AttributeError, match="Transformer has no attribute 'get_num_params'; here it is sum"):
        model.get_num_params()
    with pytest.raises(AttributeError, match='has no attribute "zzz"'):
        _ = model.zzz
    with pytest.raises(UserError, match="model.vocab_size is 0, which only training replaces by the size of its"):
        Transformer(dataclasses.replace(tiny.model, vocab_size=0)).init(jax.random.key(0), tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_packing_change_nothing(any_model, tokens, side):
    model, params = any_model
    alone = logits(model, params, tokens)
    pad = ((0, 0), (LENGTH, 0) if side == "left" else (0, LENGTH))
    where = TokenMetadata(jnp.pad(jnp.arange(LENGTH)[None].repeat(2, 0), pad), jnp.pad(jnp.ones_like(tokens), pad))
    got = logits(model, params, jnp.pad(tokens, pad), where)
    real = slice(LENGTH, None) if side == "left" else slice(None, -LENGTH)
    np.testing.assert_allclose(got[:, real], alone, atol=5e-5)

    packed = tokens.reshape(1, -1).repeat(2, 0)  # both rows of tokens in each row
    where = TokenMetadata(
        jnp.tile(jnp.arange(LENGTH), 2)[None].repeat(2, 0), jnp.repeat(jnp.arange(1, 3), LENGTH)[None].repeat(2, 0)
    )
    for row in logits(model, params, packed, where):
        np.testing.assert_allclose(row.reshape(alone.shape), alone, atol=5e-5)


# Every pattern of layers, and positions with weights in each layer; .ci/full takes all cases.
LAID_OUT = [("rope", "uniform"), ("shaw", "uniform"), ("t5", "local"), ("rope", "parallel"), ("concatenate", "plain")]


@pytest.mark.parametrize("any_model", cases_of_the_gate(LAID_OUT), ids="-".join, indirect=True)
def test_scanned_and_single_layers_are_one_model(any_model, tokens):
    model, params = any_model
    assert trees.layers_of(next(p for p in trees.flatten(params) if "attention" in p))
    single = model.clone(config=dataclasses.replace(model.config, scan_layers=False))
    np.testing.assert_allclose(logits(single, trees.restage(params), tokens), logits(model, params, tokens), atol=5e-5)


@pytest.fixture(scope="module")
def gradients(make):
    """{remat: compiled gradient}"""
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 3, 259)

    def compiled(remat):
        model, params = make(remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.var(model.apply({"params": p}, tokens)))).lower(params).compile()

    return {remat: compiled(remat) for remat in ("none", "dots", "full")}


def test_remat_changes_no_gradient_and_each_policy_recomputes_more(make, gradients):
    _, params = make()
    expected = gradients["none"](params)
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradients[remat](params), expected
        )
    flops = {remat: compiled.cost_analysis()["flops"] for remat, compiled in gradients.items()}
    assert flops["none"] < flops["dots"] < flops["full"]


@pytest.mark.parametrize("bias", [False, True])
def test_attention_and_its_gradients_equal_the_formula(bias):
    b, t, s, n, k, h = 2, 5, 7, 6, 2, 4
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    q, key, value = draw(0, b, t, n, h), draw(1, b, s, k, h), draw(2, b, s, k, h)
    added = draw(3, 1, n, t, s) if bias else None
    mask = jax.random.bernoulli(jax.random.key(4), 0.6, (b, t, s)).at[:, :, 0].set(True)

    def formula(q, key, value, added):
        key, value = (jnp.repeat(x, n // k, 2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", q, key) / jnp.sqrt(h) + (0 if added is None else added)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf)), value)

    def ours(q, key, value, added):
        return attend(q, key, value, mask, added)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function):
        total = lambda *a: jnp.sum(jnp.sin(function(*a)))  # noqa: E731
        return function(q, key, value, added), jax.grad(total, (0, 1, 2, 3) if bias else (0, 1, 2))(
            q, key, value, added
        )

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), both(ours), both(formula))


def test_the_attention_mask_is_causal_windowed_and_within_the_segment():
    where = TokenMetadata(jnp.array([[0, 1, 2, 0, 1, 0]]), jnp.array([[1, 1, 1, 2, 2, 0]]))
    seen = np.asarray(attention_mask(where, where, 2)[0]).astype(int)
    np.testing.assert_array_equal(
        seen,
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 0],
        ],
    )


def test_rope_follows_the_rotation_matrices_of_the_paper(tiny):
    scheme = positions.make(tiny.model)
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 8))
    where = np.array([[0, 5, 1000]])
    got = scheme.rotate(x, jnp.asarray(where), None)[0, :, 0]
    for t, m in enumerate(where[0]):
        for i in range(4):
            angle = m * 10000.0 ** (-2 * i / 8)
            pair = np.asarray(x[0, t, 0, [i, i + 4]], np.float64)
            turned = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]] @ pair
            np.testing.assert_allclose(got[t, [i, i + 4]], turned, atol=3e-4)


def test_alibi_slopes_are_those_of_the_paper():
    np.testing.assert_allclose(distances.alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(
        distances.alibi_slopes(12), [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    )


def test_stages_of_a_pattern_that_does_not_divide_the_depth(tiny):
    config = dataclasses.replace(tiny.model, num_layers=26, layer_pattern=("local",) * 5 + ("global",))
    assert stages(config) == ((("local",) * 5 + ("global",), 4), (("local", "local"), 1))


def test_bf16_compute_keeps_f32_parameters_and_logits(make, tiny, tokens):
    model, params = make(precision=dataclasses.replace(tiny.model.precision, compute="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    features = jax.eval_shape(lambda p: model.apply({"params": p}, tokens, method="features")[0], params)
    assert features.dtype == jnp.bfloat16
    got = logits(model, params, tokens)
    assert got.dtype == jnp.float32
    exact, _ = make()
    np.testing.assert_allclose(got, logits(exact, params, tokens), atol=0.05)


def test_flops_count_every_matrix(make):
    model, params = make(tie_embeddings=False)
    assert matmul_parameters(model.config) == sum(
        w.size for p, w in trees.flatten(params).items() if w.ndim > 1 and "norm" not in p and p != "embed/table"
    )


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("local", True),
        ("parallel", False),
        pytest.param("local", False, marks=pytest.mark.slow),
        pytest.param("parallel", True, marks=pytest.mark.slow),
    ],
)
def test_unrolled_layers_of_a_kind_are_traced_once(make, monkeypatch, name, cached):
    """Their outputs, caches and gradients have the bits of layers that are traced one by one."""
    model, params = make(scan_layers=False, **LAYOUTS[name] | {"num_layers": {"local": 4, "parallel": 3}[name]})
    tokens = jnp.arange(LENGTH)[None]

    def loss(params, one_by_one):
        state = init_cache(model.config, 1, LENGTH) if cached else None
        options = {"mutable": ["unused"]} if one_by_one else {}  # with a mutable collection, each layer is a module
        out = model.apply({"params": params}, tokens, None, state, **options)
        return jnp.sum(jax.tree.leaves(out)[0] ** 2), out[0] if one_by_one else out

    traced = []
    call = Layer.__call__
    monkeypatch.setattr(Layer, "__call__", lambda self, *inputs: traced.append(self.kind) or call(self, *inputs))
    for one_by_one in (True, False):
        traced.clear()
        jax.make_jaxpr(lambda p, one_by_one=one_by_one: loss(p, one_by_one))(params)
        kinds = [kind for block, repeats in stages(model.config) for kind in block * repeats]
        assert sorted(traced) == sorted(kinds if one_by_one else set(kinds))
    monkeypatch.undo()
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    results = [gradient(params, one_by_one) for one_by_one in (True, False)]
    for expected, actual in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_parameters_in_the_layout_of_the_other_model_are_refused(make, scan_layers):
    model = Transformer(dataclasses.replace(make()[0].config, scan_layers=not scan_layers))
    params = make(scan_layers=scan_layers)[1]
    with pytest.raises(UserError, match=f"layers, but the model has model.scan_layers={not scan_layers}; use a model"):
        jax.eval_shape(model.apply, {"params": params}, jnp.zeros((1, 1), jnp.int32))
