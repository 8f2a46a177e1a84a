import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax import lora, trees
from llm_jax.configuration import build
from llm_jax.errors import UserError
from llm_jax.lora import adapt
from llm_jax.lora.adapt import TRAINED
from llm_jax.model.stages import layout
from tests.lora import cases

GAUSSIAN = ("lora", "fa", "dora")


@pytest.fixture(scope="module")
def logits(make):
    model, _ = make()
    return jax.jit(lambda p: model.apply({"params": p}, cases.IDS))


@pytest.mark.parametrize("targets", [("linear",), ("attention", "embeddings")], ids=str)
@pytest.mark.parametrize("variant", GAUSSIAN)
def test_step_zero_equals_the_base_bit_for_bit(make, tiny, variant, targets):
    model, base = make(qk_norm=False)
    logits = jax.jit(lambda p: model.apply({"params": p}, cases.IDS))
    settings = cases.config(tiny, variant=variant, targets=targets)
    adapters = jax.jit(lambda p: lora.init(jax.random.key(0), p, settings))(base)
    np.testing.assert_array_equal(logits(lora.attach(base, adapters)), logits(base))
    moved = cases.made(base, settings)
    assert np.abs(logits(lora.attach(base, moved)) - logits(base)).max() > 1e-2


def test_step_zero_with_norms_of_keys_too(make, tiny):
    """Operation by operation: compiled, XLA fuses the sum with a zero into the norm and rounds that otherwise."""
    model, base = make()
    settings = cases.config(tiny, targets=("linear", "embeddings"))
    attached = lora.attach(base, lora.init(jax.random.key(0), base, settings))
    logits = lambda p: model.apply({"params": p}, cases.IDS[:1])  # noqa: E731
    np.testing.assert_allclose(jax.jit(logits)(attached), jax.jit(logits)(base), atol=1e-6)
    with jax.disable_jit():
        np.testing.assert_array_equal(logits(attached), logits(base))


@pytest.mark.parametrize("targets", [("linear",), ("attention", "embeddings")], ids=str)
@pytest.mark.parametrize("variant", [*GAUSSIAN, "pissa"])
def test_the_model_sees_the_dense_sum(make, tiny, logits, variant, targets):
    _, base = make()
    adapters = cases.made(base, cases.config(tiny, variant=variant, targets=targets))
    expected = logits(jax.tree.map(jnp.float32, cases.dense(base, adapters)))
    attached = logits(lora.attach(lora.subtract_start(base, adapters), adapters))
    np.testing.assert_allclose(attached, expected, atol=2e-5)


def test_a_is_gaussian_of_the_size_of_the_input_and_b_zero(make, tiny):
    _, base = make(width=64)
    for targets, deviation in ((("linear",), 1 / 8), (("embeddings",), 1.0)):
        settings = cases.config(tiny, rank=16, targets=targets)
        adapters = trees.flatten(lora.init(jax.random.key(1), base, settings))
        path = "embed/table" if targets == ("embeddings",) else "layers/0:2/0::1/mlp/up"
        a = np.asarray(adapters[f"{path}/a"])
        np.testing.assert_allclose(a.std(), deviation, rtol=0.05)
        np.testing.assert_allclose(a.mean(), 0, atol=0.06 * deviation)
        assert not np.asarray(adapters[f"{path}/b"]).any()


def test_the_start_does_not_depend_on_how_layers_are_stacked(make, tiny):
    _, base = make()
    settings = cases.config(tiny)
    stacked = lora.init(jax.random.key(0), base, settings)
    single = lora.init(jax.random.key(0), trees.unstack(base), settings)
    jax.tree.map(np.testing.assert_array_equal, trees.unstack(stacked), single)


def test_scales(make, tiny):
    _, base = make()
    for stabilized, expected in ((False, 16 / 4), (True, 16 / 2)):
        settings = cases.config(tiny, rank=4, alpha=16.0, rank_stabilized=stabilized)
        for path, leaf in trees.flatten(lora.init(jax.random.key(0), base, settings)).items():
            if path.endswith("/scale"):
                np.testing.assert_allclose(leaf, expected)


def test_pissa_starts_from_the_leading_singular_vectors_and_takes_them_out_of_the_base(make, tiny, logits):
    _, base = make()
    settings = cases.config(tiny, variant="pissa", targets=("linear",))
    adapters = jax.jit(lambda p: lora.init(jax.random.key(0), p, settings))(base)
    rest = lora.subtract_start(base, adapters)
    path = "layers/0:2/0::1/mlp/up"
    w, kept = (np.asarray(trees.flatten(tree)[path], np.float64) for tree in (base, rest))
    values = np.linalg.svd(w, compute_uv=False)
    left = np.linalg.svd(kept, compute_uv=False)
    np.testing.assert_allclose(left[:, :-3], values[:, 3:], atol=1e-5)  # the three largest are gone
    np.testing.assert_allclose(left[:, -3:], 0, atol=1e-5)
    np.testing.assert_allclose(logits(lora.attach(rest, adapters)), logits(base), atol=1e-5)
    twice = lora.to_lora(cases.made(base, settings))  # the same over the base as it was
    np.testing.assert_allclose(
        logits(lora.attach(base, twice)), logits(lora.attach(rest, cases.made(base, settings))), atol=2e-5
    )


def test_loftq_is_initialized_with_the_quantization_error(make, tiny):
    _, original = make()
    path = "layers/0:2/0::1/mlp/up"
    base = jax.tree.map(lambda w: jnp.round(8 * w) / 8, original)  # quantized, as far as this start can see
    settings = cases.config(tiny, variant="loftq")
    adapters = jax.jit(lambda q, w: lora.init(jax.random.key(0), q, settings, original=w))(base, original)
    merged, q, w = (
        np.asarray(trees.flatten(t)[path], np.float64) for t in (lora.merge(base, adapters), base, original)
    )
    lost, left = np.linalg.svd(w - q, compute_uv=False), np.linalg.svd(w - merged, compute_uv=False)
    np.testing.assert_allclose(left[:, :-3], lost[:, 3:], atol=1e-5)  # the best that rank 3 can do (Eckart, Young)
    assert (np.linalg.norm(w - merged, axis=(1, 2)) < 0.97 * np.linalg.norm(w - q, axis=(1, 2))).all()


def test_the_gradient_equals_that_of_a_dense_reference(make, tiny):
    """The reference forms W + B A by plain matmuls and is differentiated by autodiff."""
    model, base = make()
    for variant in ("lora", "fa", "dora"):
        settings = cases.config(tiny, variant=variant, targets=("linear", "embeddings"))
        trained, fixed = lora.split(cases.made(base, settings), variant)

        def loss(params):
            out = model.apply({"params": params}, cases.IDS)
            return jnp.mean(jnp.sin(out))

        def attached(trained, fixed):
            return loss(lora.attach(base, lora.join(trained, fixed)))

        def formed(trained, fixed):
            flat, parts = trees.flatten(base), trees.flatten(lora.join(trained, fixed))
            for path in {name.rsplit("/", 1)[0] for name in parts}:
                w = flat[path] + parts[f"{path}/scale"][..., None, None] * (parts[f"{path}/a"] @ parts[f"{path}/b"])
                if f"{path}/magnitude" in parts:
                    length = jax.lax.stop_gradient(jnp.linalg.norm(w, axis=-2))
                    w = w * (parts[f"{path}/magnitude"] / length)[..., None, :]
                flat[path] = w
            return loss(trees.unflatten(flat))

        got, expected = (jax.jit(jax.grad(f))(trained, fixed) for f in (attached, formed))
        tolerance = 2e-5 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance), got, expected)
        assert set(trees.flatten(got)) == set(trees.flatten(trained))


def test_the_trained_entries_of_each_variant():
    tree = {"w": dict.fromkeys(("a", "b", "scale", "magnitude", "squares", "start_a", "start_b"), 0)}
    for variant, names in TRAINED.items():
        trained, fixed = lora.split(tree, variant)
        assert set(trained["w"]) == set(names) and not set(names) & set(fixed["w"])
        assert lora.join(trained, fixed) == tree


def test_ranks_differ_by_layer_and_padding_stays_zero(make, tiny, logits):
    model, base = make()
    settings = cases.config(tiny, ranks=((r"layers/1/mlp/.*", 5), (r"layers/0/mlp/up", 1)), alpha=10.0)
    adapters = lora.init(jax.random.key(0), base, settings)
    parts = trees.flatten(adapters)
    up = "layers/0:2/0::1/mlp/up"
    assert parts[f"{up}/a"].shape[-1] == 5
    np.testing.assert_allclose(parts[f"{up}/scale"], [10 / 1, 10 / 5])
    assert np.count_nonzero(np.asarray(parts[f"{up}/a"]).any(-2), axis=-1).tolist() == [1, 5]
    assert parts["layers/0:2/0::1/attention/query/a"].shape[-1] == 3
    again = trees.restage(trees.unstack(adapters), ((1, 2),))  # any layout of any other
    jax.tree.map(np.testing.assert_array_equal, again, adapters)

    trained, fixed = lora.split(adapters, "lora")

    def loss(trained):
        return jnp.mean(jnp.sin(model.apply({"params": lora.attach(base, lora.join(trained, fixed))}, cases.IDS)))

    gradient = jax.jit(jax.grad(loss))
    for _ in range(3):
        trained = jax.tree.map(lambda x, g: x - g, trained, gradient(trained))
    after = trees.flatten(trained)
    assert not np.asarray(after[f"{up}/a"])[0, :, 1:].any() and not np.asarray(after[f"{up}/b"])[0, 1:].any()
    assert np.asarray(after[f"{up}/b"])[0, :1].any() and np.asarray(after[f"{up}/b"])[1].any()


def test_targets_of_some_stacked_layers_leave_the_others_as_they_are(make, tiny, logits):
    _, base = make()
    adapters = cases.made(base, cases.config(tiny, targets=(r"layers/1/attention/.*(query|out)",)))
    # cases.made moves the padding too, which training never does: put it back.
    adapters = jax.tree.map(lambda x: x.at[0].set(0) if x.ndim > 1 else x, adapters)
    merged = lora.merge(base, adapters)
    flat, before = trees.flatten(trees.unstack(merged)), trees.flatten(trees.unstack(base))
    changed = {p for p in flat if not np.array_equal(flat[p], before[p])}
    assert changed == {"layers/1/attention/query", "layers/1/attention/out"}


def test_dropout_drops_inputs_of_the_low_rank_path_only_and_differs_by_layer_and_weight(make, tiny):
    model, base = make()
    adapters = cases.made(base, cases.config(tiny))
    run = jax.jit(lambda k: model.apply({"params": lora.attach(base, adapters, dropout=0.5, key=k)}, cases.IDS))
    one, same, other = (run(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-2
    start = lora.init(jax.random.key(0), base, cases.config(tiny))
    plain = jax.jit(lambda p: model.apply({"params": p}, cases.IDS))(base)
    dropped = jax.jit(
        lambda: model.apply({"params": lora.attach(base, start, dropout=0.5, key=jax.random.key(0))}, cases.IDS)
    )
    np.testing.assert_allclose(dropped(), plain, atol=1e-6)  # nothing of the base path is dropped
    nodes = trees.flatten(lora.attach(base, adapters, dropout=0.5, key=jax.random.key(0)))
    keys = [jax.random.key_data(n.a.key).tolist() for p, n in nodes.items() if hasattr(n, "a")]
    flat = [tuple(k) for stacked in keys for k in stacked]
    assert len(flat) == 14 and len(set(flat)) == 14


def test_dropout_is_the_same_however_layers_are_stacked(make, tiny):
    model, base = make(num_layers=4)
    adapters, key = cases.made(base, cases.config(tiny, targets=("linear", "embeddings"))), jax.random.key(7)
    attach = functools.partial(lora.attach, dropout=0.5, key=key)

    def keys(params):
        flat = trees.flatten(trees.unstack(params))
        return {p: jax.random.key_data(n.a.key).tolist() for p, n in flat.items() if hasattr(n, "a")}

    expected = keys(attach(trees.unstack(base), trees.unstack(adapters)))
    assert len(expected) == 4 * 7 + 1
    for stages in (((1, 4),), ((2, 2),), ((2, 1), (1, 2))):
        assert keys(attach(trees.restage(base, stages), trees.restage(adapters, stages))) == expected
    out = {}
    for scan in (False, True):
        laid = model.clone(config=dataclasses.replace(model.config, scan_layers=scan))
        params = attach(*(trees.restage(tree, layout(laid.config)) for tree in (base, adapters)))
        out[scan] = jax.jit(lambda p, laid=laid: laid.apply({"params": p}, cases.IDS))(params)
    np.testing.assert_allclose(out[False], out[True], atol=1e-5)
    plain = jax.jit(lambda p: model.apply({"params": p}, cases.IDS))(lora.attach(base, adapters))
    assert np.abs(out[True] - plain).max() > 1e-2


def test_dropout_keeps_the_mean_and_its_share():
    from llm_jax import weights

    x, w = jnp.ones((64, 512)), jnp.eye(512)
    out = weights.dot(x, weights.InputDropout(w, jax.random.key(0), 0.25))
    np.testing.assert_allclose(np.mean(np.asarray(out) == 0), 0.25, atol=0.01)
    np.testing.assert_allclose(out[out != 0], 1 / 0.75, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ()}, "lora.targets is empty"),
        ({"targets": ("attention", "layers/9/mlp/up")}, "'layers/9/mlp/up' matches no weight"),
        ({"targets": ("q_proj",)}, r"'q_proj' matches no weight; did you mean 'layers/\.\*/query'\?"),
        ({"targets": (r".*\.q_proj$",)}, r"q_proj\$' matches no weight; did you mean 'layers/\.\*/query'\?"),
        ({"targets": ("c_fc|c_attn",)}, "the matrices of the model are embed/table, layers/N/attention/key, layers/N/"),
        ({"targets": ("q_proj, key",)}, r"several patterns are written as \('layers/\.\*/query', 'layers/\.\*/key'\)"),
        ({"targets": ("query",)}, r"'query' matches no weight; did you mean 'layers/\.\*/query'\?"),
        ({"targets": ("model.all-linear",)}, r"'model.all-linear' matches no weight; did you mean 'linear'\?"),
        ({"targets": ("attention", "linear")}, "'attention' and 'linear' overlap; both match 'layers/0/attention/key'"),
        ({"targets": (r"layers/(",)}, "is not a regular expression"),
        ({"targets": (r"layers/.*",)}, r"of shape \((8|32),\); only matrices"),
        ({"rank": 0}, "lora.rank is 0 for 'layers/0/attention/key'"),
        ({"rank": 17}, r"lora.rank is 17 for 'layers/0/attention/key' of shape \(32, 16\); expected 1 to 16"),
        ({"ranks": ((".*mlp.*", 0),)}, "lora.ranks: '.*mlp.*' is 0 for 'layers/0/mlp/"),
        ({"ranks": ((".*", "many"),)}, "is 'many' for"),
        ({"ranks": (("layers/7/.*", 2),)}, "lora.ranks: 'layers/7/.*' matches no target"),
        ({"variant": "loftq"}, "set quant.scheme"),
        (
            {"variant": "dora", "targets": ("layers/1/mlp/up",)},
            "'layers/0/mlp/up' is not matched; .* all layers or none",
        ),
    ],
    ids=str,
)
def test_invalid_options_are_one_line_errors(make, tiny, changes, message):
    _, base = make()
    with pytest.raises(UserError, match=message) as error:
        lora.init(jax.random.key(0), base, cases.config(tiny, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "answer"), adapt._OTHER_NAMES.items())
def test_the_answer_to_a_name_of_peft_matches_weights(make, tiny, name, answer):
    _, base = make(tie_embeddings=False)
    assert any(any(own.values()) for own in adapt.ranks(base, cases.config(tiny, targets=(answer,))).values())


def test_an_unknown_variant_is_refused_by_the_configuration(tiny):
    with pytest.raises(UserError, match="'lora.variant' is 'lore'; expected one of dora, fa, loftq, lora, pissa"):
        build(dataclasses.asdict(tiny.lora) | {"variant": "lore"}, type(tiny.lora), "lora.")


def test_adapters_of_another_model_are_refused(make, tiny):
    _, base = make()
    _, wide = make(width=64)
    adapters = cases.made(base, cases.config(tiny))
    with pytest.raises(UserError, match="do not fit 'layers/0:2/0::1/attention/key' .* another model"):
        lora.attach(wide, adapters)
    with pytest.raises(UserError, match="adapts 'layers/0:2/0::1/attention/key', which the base lacks"):
        lora.attach(trees.unstack(base), adapters)


def test_options_of_adapters_without_a_rank_are_refused():
    with pytest.raises(UserError, match=r"lora.alpha is set and has no effect with lora.rank=0; set lora.rank"):
        llm_jax.config("default", {"lora.alpha": 32.0})
    llm_jax.config("chat_lora", {"lora.rank": 0})  # a recipe of adapters for full fine-tuning
    assert llm_jax.config("llama2_7b").lora.alpha == 32  # prepared, and without effect until there is a rank
    with pytest.raises(UserError, match="lora.alpha is set and has no effect"):
        llm_jax.config("llama2_7b", {"lora.alpha": 16.0})
