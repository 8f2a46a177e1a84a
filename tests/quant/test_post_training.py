"""Rules, calibration layer by layer, the command, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llm_jax
from llm_jax import checkpoints, trees, weights
from llm_jax.data import masking
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.quant import calibrate, methods, post_training, qat
from llm_jax.schema import QATConfig, QuantConfig
from llm_jax.training import optim
from llm_jax.weights import FakeQuant, QTensor, quantized


@pytest.fixture
def single(make):
    """(model, parameters), one entry per layer."""
    model, params = make()
    params = trees.unstack(params)
    return Transformer(dataclasses.replace(model.config, scan_layers=False)), params


def rows(count, length=24):
    draw = np.random.default_rng(0)
    there = np.ones(length, np.int32)
    there[-4:] = 0  # padding, which does not count
    return [
        {
            "inputs": draw.integers(4, 200, length).astype(np.int32),
            "positions": np.arange(length, dtype=np.int32),
            "segments": there,
        }
        for _ in range(count)
    ]


def test_presets_keep_norms_and_put_tables_in_8_bits(make):
    _, params = make()
    planned = post_training.plan(params, post_training.rules("int4:16", "int8"), "here")
    flat = trees.flatten(post_training.quantize_params(params, post_training.rules("int4:16", "int8"), "here"))
    assert {p for p, s in planned.items() if not s} == {p for p in planned if "norm" in p}
    assert flat["embed/table"].scheme == "int8" and flat["embed/table"].axis == quantized.OUT
    up = flat["layers/0:2/0::1/mlp/up"]
    assert up.scheme == "int4:16" and up.codes.shape == (2, 16, 48)
    mine = post_training.plan(params, post_training.rules("int8", "int8", ((r"layers/.*/mlp/down", ""),)), "here")
    assert [p for p, s in mine.items() if not s and "norm" not in p] == ["layers/0:2/0::1/mlp/down"]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (
            post_training.rules("int4", "int8"),
            "int4 for 'layers/0:2/0::1/mlp/down': the group 32 does not divide its 48 inputs",
        ),
        (post_training.rules("int5", "int8"), "the scheme 'int5' is unknown"),
        (
            post_training.rules("int8", "int8", (("layers/9/.*", "int4"),)),
            "the rule 'layers/9/.*' matches no parameter",
        ),
        (
            post_training.rules("int8", "int8", (("final_norm/scale", "int8"),)),
            "'final_norm/scale' of shape .* is not a matrix",
        ),
        (
            post_training.rules("int8", "int8", (("embed/table", 8),)),
            "8 for 'embed/table'; expected the name of a scheme",
        ),
        (post_training.rules("w8a8_static", "int8"), "needs calibration"),
    ],
)
def test_rules_that_do_not_fit_are_refused(make, chosen, said):
    with pytest.raises(UserError, match=said):
        post_training.quantize_params(make()[1], chosen, "here")


@pytest.mark.optimized
@pytest.mark.parametrize("scheme", ["nf4:32", "int4:32", "int8"])
def test_stacked_layers_are_rounded_one_after_the_other(scheme):
    """To the same numbers, with a copy of the stack at most (at once NF4 takes two)."""
    layers = jax.random.normal(jax.random.key(0), (16, 64, 96))
    path = "layers/0:16/0::1/mlp/up"
    stacked = trees.flatten(post_training.quantize_params(trees.unflatten({path: layers}), ((".*", scheme),), "rules"))[
        path
    ]
    at_once = jax.jit(quantized.to_qtensor, static_argnums=(1, 2))(layers, scheme, quantized.IN)
    jax.tree.map(np.testing.assert_array_equal, stacked, at_once)
    taken = [
        post_training._rounded.lower(layers, scheme, quantized.IN, stacked)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for stacked in (True, False)
    ]
    assert taken[0] < 1.25 * layers.nbytes


def test_quantized_and_non_finite_weights_are_rejected(make):
    _, params = make()
    once = post_training.quantize_params(params, post_training.rules("int8", "int8"), "here")
    with pytest.raises(UserError, match="'embed/table' is quantized already"):
        post_training.quantize_params(once, post_training.rules("int4:16", "int8"), "here")
    post_training.check_finite(once, "here")
    bad = trees.map_weights(lambda p, w: w.at[0].set(jnp.nan) if p == "final_norm/scale" else w, params)
    with pytest.raises(UserError, match="here: 'final_norm/scale' has infinite or NaN values"):
        post_training.check_finite(bad, "here")


def test_a_scheme_that_the_backend_cannot_run_is_named(monkeypatch):
    assert post_training.unsupported_reason("w8a8_static") == ""

    def fail(*_):
        raise RuntimeError("no such type\nand more")

    monkeypatch.setattr(post_training.weights, "dot", fail)
    assert post_training.unsupported_reason("int8") == "cpu cannot run int8 (no such type)"


def test_calibration_sees_what_weights_are_multiplied_by(single):
    """The statistics of the first layer against its inputs, computed by hand."""
    model, params = single
    streams = calibrate._embedded(model, trees.flatten(params), rows(3), 2)
    layer = params["layers"]["0"]
    watched = ("attention/query", "attention/key", "mlp/up", "mlp/down", "attention/out")
    seen: dict = {}
    for s in streams:
        found = calibrate._observe(model.config, "global", watched, layer, s["x"], s["metadata"], s["bias"])
        seen = {k: methods.add(seen[k], v) for k, v in found.items()} if seen else found
    x = np.concatenate([s["x"][:, :-4].reshape(-1, 32) for s in streams])
    normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + model.config.norm_eps)
    normed = normed * np.asarray(layer["attention_norm"]["scale"])
    np.testing.assert_allclose(seen["attention/query"].gram, normed.T @ normed, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(seen["attention/query"].gram, seen["attention/key"].gram)
    assert seen["mlp/down"].gram.shape == (48, 48) and float(seen["mlp/up"].tokens) == 60


def test_an_interrupted_calibration_goes_on_and_ends_the_same(single, tmp_path, monkeypatch):
    model, params = single
    planned = post_training.plan(params, post_training.rules("int4:16", "int8"), "here")
    options = calibrate.CalibrationOptions("gptq", True, 2)
    whole, lines = calibrate.quantize_layers(model, trees.flatten(params), planned, rows(4), options, tmp_path / "a")
    layer = calibrate._quantize_layer
    calls = []

    def counted(config, kind, name, *rest):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return layer(config, kind, name, *rest)

    monkeypatch.setattr(calibrate, "_quantize_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate.quantize_layers(model, trees.flatten(params), planned, rows(4), options, tmp_path / "b")
    again, same = calibrate.quantize_layers(model, trees.flatten(params), planned, rows(4), options, tmp_path / "b")
    assert calls == ["layers/0", "layers/1", "layers/1"] and same == lines
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    table = post_training.table(lines)
    assert "layers/1/mlp/up" in table and "int4:16" in table
    long = dataclasses.replace(lines[0], path="layers/10/attention/query_norm/scale")
    assert len({len(row) for row in post_training.table([lines[0], long]).splitlines()[:3]}) == 1  # aligned columns
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole))
    assert f"in {size:,} bytes" in table


def test_the_command_writes_what_evaluate_and_load_take(command, trained, tmp_path):
    out = tmp_path / "small"
    said = command(
        "quantize", f"--checkpoint={trained}", f"--output={out}", "--scheme=int4:16", "--method=gptq", "--sequences=4",
        "--rule=layers/0/mlp/down=none",
    ).stdout  # fmt: skip
    assert "calibrating on 4 sequences of 32 tokens" in said and "bits per weight" in said
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    flat = trees.flatten(llm_jax.load(out).params)
    assert isinstance(flat["layers/1/mlp/down"], QTensor) and not isinstance(flat["layers/0/mlp/down"], QTensor)
    before = json.loads((trained / "summary.json").read_text())["validation_loss"]
    after = json.loads(command("evaluate", f"--checkpoint={out}", "--json").stdout)["loss"]
    assert after == pytest.approx(before, abs=0.1) and after != before


def test_calibration_text_that_is_too_short_is_refused(trained, tmp_path, text_file):
    (tmp_path / "short.txt").write_text("too short")
    config, tokenizer = checkpoints.read_config(trained), llm_jax.load(trained).tokenizer
    with pytest.raises(UserError, match=r"short.txt has 11 tokens, fewer than one calibration sequence of 32"):
        calibrate.calibration_rows(config, str(tmp_path / "short.txt"), tokenizer, 32, 4)
    found, _ = calibrate.calibration_rows(config, str(text_file), tokenizer, 32, 4)
    assert len(found) == 4 and all(len(row["inputs"]) == 32 for row in found)


def test_an_encoder_of_hidden_tokens_is_calibrated_on_text_with_hidden_tokens(trained, text_file):
    config, tokenizer = checkpoints.read_config(trained), llm_jax.load(trained).tokenizer
    masked = dataclasses.replace(config, loss=dataclasses.replace(config.loss, masked="words", mask_prob=0.3))
    for given in ("", str(text_file)):
        plain, _ = calibrate.calibration_rows(config, given, tokenizer, 32, 40)
        found, _ = calibrate.calibration_rows(masked, given, tokenizer, 32, 40)
        for row, same in zip(found, plain, strict=True):
            np.testing.assert_array_equal(row["targets"], same["inputs"])  # the same text, hidden
        inputs, chosen = (np.stack([row[name] for row in found]) for name in ("inputs", "mask"))
        hidden = inputs == masking.mask_id(tokenizer)
        assert 0.15 < chosen.mean() < 0.35 and not hidden[chosen == 0].any()
        assert 0.7 < hidden[chosen == 1].mean() < 0.9
        assert not any((row["inputs"] == masking.mask_id(tokenizer)).any() for row in plain)


def test_what_the_backend_cannot_run_falls_back_only_if_asked(single, monkeypatch):
    _, params = single
    planned = post_training.plan(params, post_training.rules("int4:16", "int8"), "here")
    assert post_training.replace_unsupported(params, planned, "") is planned
    monkeypatch.setattr(post_training, "unsupported_reason", lambda name: "cpu cannot run it" if "int4" in name else "")
    with pytest.raises(UserError, match="cpu cannot run it; choose another scheme, or --fallback"):
        post_training.replace_unsupported(params, planned, "")
    assert set(post_training.replace_unsupported(params, planned, "w8a8").values()) == {"", "int8", "w8a8"}
    with pytest.raises(UserError, match="--fallback: .* does not divide"):
        post_training.replace_unsupported(params, planned, "int4")


QUANT = QuantConfig("", "int8", (), QATConfig("int4:16", 0, False))


def test_qat_trees_round_forward_and_train_the_dense_weights(make):
    model, params = make()
    prepared = jax.jit(lambda p: qat.prepare(p, QUANT))(params)
    finished = post_training.replace_fake_quant(prepared)
    tokens = jnp.arange(20)[None] % 50
    apply = jax.jit(lambda p: model.apply({"params": p}, tokens))
    np.testing.assert_allclose(apply(prepared), apply(finished), atol=2e-5)
    assert jnp.abs(apply(prepared) - apply(params)).max() > 1e-2
    assert isinstance(finished["layers"]["0:2"]["0::1"]["mlp"]["up"], QTensor)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, tokens)))))(prepared)
    for path, g in trees.flatten(gradient).items():
        assert float(jnp.abs(weights.dense(g.weight if isinstance(g, FakeQuant) else g)).max()) > 0, path


def test_rounding_starts_when_it_is_asked_to(make):
    model, params = make()
    prepared = jax.jit(lambda p: qat.prepare(p, QUANT))(params)
    tokens = jnp.arange(20)[None] % 50
    apply = jax.jit(lambda p, step: model.apply({"params": qat.active_from(p, step, 3)}, tokens))
    plain = jax.jit(lambda p: model.apply({"params": p}, tokens))
    np.testing.assert_allclose(apply(prepared, 2), plain(params), atol=1e-5)
    np.testing.assert_allclose(apply(prepared, 3), plain(prepared), atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "learned", "said"),
    [("w8a8_static", False, "choose w8a8"), ("nf4:16", True, "no step to learn"), ("int4", False, "does not divide")],
)
def test_qat_schemes_that_cannot_be_trained_are_refused(make, scheme, learned, said):
    with pytest.raises(UserError, match=said):
        qat.prepare(make()[1], dataclasses.replace(QUANT, qat=QATConfig(scheme, 0, learned)))


def test_quantization_aware_training_learns_and_is_exported_as_integers(command, tmp_path):
    scheme = ("--config.quant.qat.scheme=int4:16", "--config.quant.qat.learned_step=True")
    command("train", f"--workdir={tmp_path / 'run'}", *scheme, "--config.quant.qat.start_step=2")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    command("quantize", f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'int'}")
    model, params, tokenizer = llm_jax.load(tmp_path / "run")
    got = llm_jax.load(tmp_path / "int")
    assert isinstance(trees.flatten(params)["embed/table"], FakeQuant)
    assert isinstance(trees.flatten(got.params)["embed/table"], QTensor)
    tokens = jnp.asarray([tokenizer.encode("the model reads a token")])
    apply = jax.jit(lambda m, p: m.apply({"params": p}, tokens), static_argnums=0)
    logits = apply(got.model, got.params)
    np.testing.assert_allclose(apply(model, params), logits, atol=2e-4)
    rounded = llm_jax.load(tmp_path / "int", activations="int8")
    error = np.abs(apply(rounded.model, rounded.params) - logits)
    assert error.max() > 1e-4 and error.mean() < 0.03 * np.abs(logits).mean()
    done = command("evaluate", f"--checkpoint={tmp_path / 'run'}", "--activations=int8", code=2)
    assert "--activations=int8 expects weights that are quantized to integers, NF4 or MXFP4" in done.stderr
    losses = [
        json.loads(command("evaluate", f"--checkpoint={tmp_path / 'int'}", "--json", f"--activations={a}").stdout)[
            "loss"
        ]
        for a in ("float", "int8")
    ]
    assert 0 < abs(losses[1] - losses[0]) < 0.02 * losses[0]


def test_steps_that_are_learned_do_not_decay(make):
    params = {"up": FakeQuant(jnp.ones((4, 4)), jnp.ones((1, 4)), None, None, "int8", quantized.IN)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optim._decay({"up": 0.5}).update(zero, optax.EmptyState(), params)
    np.testing.assert_array_equal(updates["up"].weight, 0.5)
    np.testing.assert_array_equal(updates["up"].step, 0)
