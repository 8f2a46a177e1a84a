"""Adapters of peft: logits, round trips and errors."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import checkpoints, lora, trees, weights
from llm_jax.checkpoints import peft_config, peft_export, peft_tensors
from llm_jax.checkpoints.checkpoint import on_default_device
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from tests.checkpoints import family_cases as cases
from tests.checkpoints.test_hf import GOLDEN as BASES
from tests.checkpoints.test_hf import read
from tests.lora.cases import config, made

GOLDEN = json.loads(pathlib.Path(__file__).with_name("peft_golden.json").read_text())
FIRST = ("plain", "rank-stabilized", "dora", "embeddings", "fused", "fused-dora", "tied-head")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: (its directory, kind, model, parameters)}"""
    found = {}
    for family in {"bert", *(golden["family"] for golden in GOLDEN.values())}:
        path = tmp_path_factory.mktemp("bases") / family
        path.mkdir()
        (path / "config.json").write_text(json.dumps(BASES[family]["config"]))
        save_file(cases.tensors(family, BASES[family]["shapes"]), path / "model.safetensors")
        found[family] = (path, *read(path))
    return found


def load(directory, family, config, base):
    """The adapters of a directory, over a base whose own tensors they do not replace."""
    return peft_tensors.adapters(peft_tensors.read(directory), family, config, base)


def written(directory: pathlib.Path, name: str, drop: str = "", **changes) -> pathlib.Path:
    directory.mkdir()
    said = {k: v for k, v in (GOLDEN[name]["config"] | changes).items() if k != drop}
    (directory / peft_config.CONFIG).write_text(json.dumps(said))
    save_file(cases.adapters(name, GOLDEN[name]["shapes"]), directory / peft_tensors.TENSORS)
    return directory


@functools.cache
def logits_of(config):
    """The jitted function (parameters, ids) -> logits of a model."""
    return jax.jit(lambda params, ids: Transformer(config).apply({"params": params}, ids))


def opened(bases, directory, base="llama"):
    return checkpoints.open(directory, base=str(bases[base][0]))


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_equal_those_of_peft(bases, tmp_path, name):
    golden = GOLDEN[name]
    checkpoint = opened(bases, written(tmp_path / "a", name), golden["family"])
    config = dataclasses.replace(checkpoint.config, scan_layers=False)
    params = checkpoint.params(config, on_default_device)
    assert lora_kinds(params) == ({"Decomposed"} if golden["config"]["use_dora"] else {"Adapted"})
    if name not in FIRST:  # the first ones are computed with their nodes, the others share compiled functions
        params = trees.map_weights(lambda _, w: weights.dense(w), params)
    ids = jnp.asarray(cases.ids(golden["family"]))[: len(golden["logits"])]
    got = logits_of(config)(params, ids)
    np.testing.assert_allclose(got, golden["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_adapters_of_an_encoder_are_read_with_and_without_its_prefix(bases, tmp_path, prefix):
    module = f"{prefix}encoder.layer.1.attention.self.value"
    directory = written(tmp_path / "a", "plain", target_modules=["value"])
    factors = {end: np.ones(shape, np.float32) for end, shape in {"A": (4, 32), "B": (32, 4)}.items()}
    tensors = {f"base_model.model.{module}.lora_{end}.weight": factor for end, factor in factors.items()}
    save_file(tensors, directory / peft_tensors.TENSORS)
    checkpoint = opened(bases, directory, "bert")
    assert checkpoint.config == checkpoint.base.config and checkpoint.family == "bert"
    config = dataclasses.replace(checkpoint.config, scan_layers=False)
    base, params = (one.params(config, on_default_device) for one in (checkpoint.base, checkpoint))
    changed = trees.flatten(trees.map_weights(lambda _, w: weights.dense(w), params))
    for path, weight in trees.flatten(base).items():
        update = 4 * 8 / 4 if path == "layers/1/attention/value" else 0  # rank 4, alpha 8
        np.testing.assert_allclose(changed[path], weight + update, rtol=1e-6)


def lora_kinds(params):
    return {weights.kind(w) for w in trees.flatten(params).values()} - {"array"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tied-head", {"tie_embeddings": False}),
        ("tied-embeddings", {"tie_embeddings": False}),
        ("saved-tied", {"tie_embeddings": False}),
        ("tied-both", {}),
        ("saved-tied-both", {}),
        ("tokens-tied", {}),
        ("tokens-tied-same", {}),
        ("tokens-tied-of-both", {"tie_embeddings": False}),
        ("resized", {"vocab_size": 67}),
        ("resized-tied", {"vocab_size": 67}),
    ],
)
def test_the_model_has_a_head_of_its_own_and_the_vocabulary_of_the_adapters(bases, tmp_path, name, changes):
    checkpoint = opened(bases, written(tmp_path / "a", name), GOLDEN[name]["family"])
    assert checkpoint.config == dataclasses.replace(checkpoint.base.config, **changes)


@pytest.mark.parametrize("name", ["plain", "rank-stabilized", "dora", "embeddings", "patterns"])
def test_adapters_of_peft_are_unchanged_after_a_round_trip(bases, tmp_path, name):
    _, kind, model, params = bases[GOLDEN[name]["family"]]
    source = written(tmp_path / "in", name)
    adapters = load(source, kind, model.config, params)
    stabilized = bool(GOLDEN[name]["config"]["use_rslora"])
    peft_export.save(tmp_path / "out", kind, model.config, adapters, params, rank_stabilized=stabilized)
    before, after = (load_file(path / peft_tensors.TENSORS) for path in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)
    again = load(tmp_path / "out", kind, model.config, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, adapters)


def test_padding_is_not_written_and_a_start_becomes_rank(bases, tiny, tmp_path):
    _, kind, model, params = bases["llama"]
    settings = config(tiny, rank=2, ranks=((r"layers/1/.*up", 5),))
    adapters = jax.jit(lambda p: lora.init(jax.random.key(0), p, settings))(params)
    peft_export.save(tmp_path / "out", kind, model.config, adapters, params)
    said = json.loads((tmp_path / "out" / peft_config.CONFIG).read_text())
    assert said["r"] == 2 and said["rank_pattern"] == {"model.layers.1.mlp.up_proj": 5}
    shapes = {k: v.shape for k, v in load_file(tmp_path / "out" / peft_tensors.TENSORS).items()}
    assert shapes["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"] == (5, 32)
    assert shapes["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] == (2, 32)
    pissa = made(params, config(tiny, rank=2, variant="pissa", targets=("attention",)))
    peft_export.save(tmp_path / "pissa", kind, model.config, pissa, params)
    again = load(tmp_path / "pissa", kind, model.config, params)
    for path, w in trees.flatten(lora.merge(lora.subtract_start(params, pissa), pissa)).items():
        np.testing.assert_allclose(trees.flatten(lora.merge(params, again))[path], w, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": "lora_alpha"}, "adapter_config.json: lora_alpha is None; expected a positive number"),
        ({"r": 3}, "has rank 4, but adapter_config.json says 3"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"bias": "some"}, "bias='some' is unknown; expected one of none, all, lora_only"),
        ({"target_parameters": ["mlp.experts"]}, r"target_parameters=\['mlp.experts'\] is unknown or not supported"),
        ({"use_qalora": True}, "use_qalora=True is unknown or not supported"),
        ({"new_projection": "hadamard"}, "new_projection=hadamard is unknown or not supported; the adapters may need"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base"),
        ({"rank_pattern": {"q_proj": "2"}}, "expected regular expressions and positive numbers"),
        ({"alpha_pattern": {"(q": 2}}, r"alpha_pattern: '\(q' is not a regular expression \(missing \)"),
        ({"rank_pattern": {r"(\w+\.?)+!": 2}}, "rank_pattern is .*; matching these expressions with 21 names takes"),
        ({"use_dora": True}, "has a, b; expected a, b, magnitude"),
    ],
    ids=str,
)
def test_unknown_keys_are_rejected_in_one_line(bases, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(peft_config, "_SECONDS", 0.5)
    _, kind, model, params = bases["llama"]
    directory = written(tmp_path / "a", "plain", **changes)
    with pytest.raises(UserError, match=message) as error:
        load(directory, kind, model.config, params)
    assert "\n" not in str(error.value) and "cannot be read" not in str(error.value)


def test_errors_of_an_adapter_config_do_not_blame_the_base(bases, tmp_path):
    checkpoint = opened(bases, written(tmp_path / "a", "plain", bias="some"))
    with pytest.raises(UserError, match="bias='some' is unknown") as error:
        _ = checkpoint.config
    assert str(error.value).startswith(f"{checkpoint.path / peft_config.CONFIG}: bias=")


def test_plain_patterns_match_the_end_of_a_name_as_in_peft(tmp_path):
    """Patterns without groups, which are matched in this process."""
    patterns = {
        r"^model\.layers\.\d\d\.self_attn\.q_proj": 2,
        r"layers\.\d\.mlp\.up_proj": 3,
        "l.yers.12.mlp.up_proj": 5,
    }
    values = {
        "model.layers.10.self_attn.q_proj": 2,
        "encoder.model.layers.1.self_attn.q_proj": 8,
        "model.layers.1.mlp.up_proj": 3,
        "model.layers.12.mlp.up_proj": 5,
        "model.layers.1.mlp.up_proj.more": 8,
        "model.xlayers.1.mlp.up_proj": 8,
    }
    config = {"r": 8, "rank_pattern": patterns}
    assert peft_config.pattern_values(tmp_path, config, "rank_pattern", list(values)) == list(values.values())


def test_keys_that_change_no_computation_are_accepted(bases, tmp_path):
    _, kind, model, params = bases["llama"]
    harmless = dict.fromkeys(peft_config._HARMLESS, "value") | {"new_feature": None, "other": False, "third": {}}
    changed = load(written(tmp_path / "a", "plain", **harmless), kind, model.config, params)
    expected = load(written(tmp_path / "b", "plain"), kind, model.config, params)
    jax.tree.map(np.testing.assert_array_equal, changed, expected)


@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        (r"\.(weight)$", r".default.\1"),
        (r"^base_model\.model\.", "base_model.model._orig_mod."),
        (r"^base_model\.model\.", ""),
    ],
)
def test_names_of_adapters_as_other_software_writes_them(bases, tmp_path, pattern, new, capsys):
    _, kind, model, params = bases["llama"]
    expected = load(written(tmp_path / "a", "plain"), kind, model.config, params)
    directory = written(tmp_path / "b", "plain")
    tensors = cases.adapters("plain", GOLDEN["plain"]["shapes"])
    save_file({re.sub(pattern, new, name): t for name, t in tensors.items()}, directory / peft_tensors.TENSORS)
    jax.tree.map(np.testing.assert_array_equal, load(directory, kind, model.config, params), expected)
    assert capsys.readouterr().err == ""
    two = tensors | {name.replace(".weight", ".second.weight"): t for name, t in tensors.items()}
    save_file(two, directory / peft_tensors.TENSORS)
    with pytest.raises(UserError, match="is a second factor of .*; expected one adapter"):
        load(directory, kind, model.config, params)


@pytest.mark.parametrize(
    ("name", "copy", "shape"),
    [
        ("tokens", "model.embed_tokens.token_adapter.trainable_tokens_original", (64, 32)),
        ("saved-head", "lm_head.original_module.weight", (64, 32)),
    ],
)
def test_tensors_that_the_adapters_replace_are_not_read(bases, tmp_path, name, copy, shape):
    path = written(tmp_path / "a", name) / peft_tensors.TENSORS

    def params():
        checkpoint = opened(bases, path.parent)
        return checkpoint.params(dataclasses.replace(checkpoint.config, scan_layers=False), on_default_device)

    expected = params()
    save_file(load_file(path) | {f"base_model.model.{copy}": np.full(shape, 7, np.float32)}, path)
    jax.tree.map(np.testing.assert_array_equal, params(), expected)


def test_listed_modules_without_factors_are_named(bases, tmp_path, capsys):
    _, kind, model, params = bases["llama"]
    directory = written(tmp_path / "a", "plain")
    tensors = cases.adapters("plain", GOLDEN["plain"]["shapes"])
    module = next(iter(tensors)).split(".lora_")[0]
    save_file({n: t for n, t in tensors.items() if not n.startswith(module)}, directory / peft_tensors.TENSORS)
    load(directory, kind, model.config, params)
    message = capsys.readouterr().err
    assert message.startswith(f"note: {directory}: adapter_config.json lists") and message.count("\n") == 1
    assert (
        f"no factors for 1 of these {len(tensors) // 2} modules ({module.removeprefix('base_model.model.')}" in message
    )


def test_damaged_and_foreign_directories_are_refused(bases, tmp_path):
    _, kind, model, params = bases["llama"]

    def said(directory, parameters=params):
        with pytest.raises(UserError) as error:
            load(directory, kind, model.config, parameters)
        return str(error.value)

    directory = written(tmp_path / "cut", "plain")
    tensors = directory / peft_tensors.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-50])
    assert "not a whole safetensors file" in said(directory)
    tensors.unlink()
    (directory / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin is pickled: it could run code" in said(directory)
    wide = trees.map_weights(lambda p, w: jnp.concatenate([w, w]) if p.endswith("mlp/down") else w, params)
    assert "another geometry" in said(written(tmp_path / "b", "plain"), wide)
    shapes = GOLDEN["plain"]["shapes"] | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": [4, 32]}
    directory = written(tmp_path / "d", "plain")
    save_file(cases.adapters("plain", shapes), directory / peft_tensors.TENSORS)
    assert "'model.layers.9.mlp.up_proj' belongs to no weight of this llama" in said(directory)


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "changes", "message"),
    [
        (
            "saved-head",
            "score.weight",
            (2, 32),
            {"modules_to_save": ["score"]},
            "'score.weight' belongs to no weight of",
        ),
        ("saved-head", "lm_head.weight", (64, 31), {}, r"'lm_head.weight' \(64, 31\) does not fit 'head/kernel'"),
        ("resized", "lm_head.weight", (66, 32), {}, "table has 67 rows, but the head 66; a changed vocabulary"),
        ("tokens", "model.embed_tokens.token_adapter.trainable_tokens_delta", (3, 32), {}, "they do not fit"),
        ("tokens", "", (), {"trainable_token_indices": [3, 64]}, r"trainable_token_indices=\[3, 64\] of a table"),
        ("plain", "model.layers.0.mlp.up_proj.lora_B.bias", (48,), {"lora_bias": True}, "adds a bias to .*up_proj"),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_refused(bases, tmp_path, name, tensor, shape, changes, message):
    directory = written(tmp_path / "a", name, **changes)
    if tensor:
        path = directory / peft_tensors.TENSORS
        save_file(load_file(path) | {f"base_model.model.{tensor}": np.ones(shape, np.float32)}, path)
    checkpoint = opened(bases, directory)
    with pytest.raises(UserError, match=message):
        checkpoint.params(dataclasses.replace(checkpoint.config, scan_layers=False), on_default_device)


def test_adapters_that_replace_weights_of_the_base_are_not_combined(bases, tmp_path):
    for name in ("saved-head", "tokens", "lora-bias"):
        checkpoint = opened(bases, written(tmp_path / name, name), GOLDEN[name]["family"])
        with pytest.raises(UserError, match="takes the place of a weight of the base"):
            checkpoint.separate()


@pytest.mark.parametrize(
    ("name", "end", "shape", "message"),
    [
        ("plain", "lora_A.weight", (4,), r"has a \(4,\) and b .*; expected matrices"),
        ("dora", "lora_magnitude_vector", (1,), "has 1 magnitudes for"),
    ],
)
def test_tensors_of_another_rank_or_too_few_lengths_are_refused(bases, tmp_path, name, end, shape, message):
    _, kind, model, params = bases[GOLDEN[name]["family"]]
    directory = written(tmp_path / "a", name)
    tensors = load_file(directory / peft_tensors.TENSORS)
    key = next(k for k in tensors if k.endswith(end))
    save_file(tensors | {key: np.ones(shape, np.float32)}, directory / peft_tensors.TENSORS)
    with pytest.raises(UserError, match=message):
        load(directory, kind, model.config, params)
