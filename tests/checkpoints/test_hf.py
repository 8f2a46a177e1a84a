"""Hugging Face families: logits of tiny models equal those of transformers; round trips; damaged directories."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import trees
from llm_jax.checkpoints import assemble, huggingface
from llm_jax.checkpoints.families import FAMILIES, hf_config, model_config, neutral
from llm_jax.errors import UserError
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.transformer import Transformer, init_cache
from tests.checkpoints import family_cases as cases

GOLDEN = json.loads(pathlib.Path(__file__).with_name("family_golden.json").read_text())


def write_directory(path, name):
    """Writes what transformers would have saved of the tiny model of a family, and returns its tensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(GOLDEN[name]["config"]))
    tensors = cases.tensors(name, GOLDEN[name]["shapes"])
    if "gpt_neox" in name:  # what transformers calls lm_head is embed_out in its files
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, path / "model.safetensors")
    return tensors


@pytest.fixture(params=GOLDEN)
def directory(request, tmp_path_factory):
    """A directory as transformers would have saved the tiny model of a family."""
    path = tmp_path_factory.mktemp(request.param) / request.param
    write_directory(path, request.param)
    return path


def read(path, **changes):
    kind, config = huggingface.read_config(path)
    model = Transformer(dataclasses.replace(config, **changes))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return (
        kind,
        model,
        huggingface.load_params(path, kind, model.config, lambda tree: jax.tree.map(lambda _: device, tree)),
    )


def test_logits_equal_those_of_transformers(directory):
    name = directory.name
    golden = GOLDEN[name]
    _, model, params = read(directory)
    real = cases.MASK.astype(bool)
    ids, count = jnp.asarray(cases.ids(name)), jnp.arange(cases.LENGTH)[None].repeat(2, 0)
    where = TokenMetadata(count, jnp.asarray(cases.MASK))

    @jax.jit
    def run(params, ids, where):
        x, _ = model.apply({"params": params}, ids, where, method="features")
        if name == "bert":
            return {"features": x, "pooled": model.apply({"params": params}, x, method="pooled")}
        return {"logits": model.apply({"params": params}, x, method="logits")}

    for key, value in run(params, ids, where).items():
        got, expected = np.asarray(value), np.asarray(golden[key])
        if key != "pooled":
            got, expected = got[real], expected[real]
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)
    if name == "bert":
        return
    left = TokenMetadata(jnp.maximum(count - 3, 0), (count >= 3).astype(int))  # the shorter row, padded on the left
    moved = run(params, jnp.roll(ids, 3, 1), left)["logits"][1, 3:]
    np.testing.assert_allclose(moved, np.asarray(golden["logits"])[1, :9], atol=1e-5, rtol=1e-5)
    cache = init_cache(model.config, 2, cases.LENGTH)
    step = jax.jit(model.apply)
    for part in (slice(i, i + 1) for i in range(cases.LENGTH)):
        tokens = jax.tree.map(lambda a, part=part: a[:, part], where)
        logits, cache = step({"params": params}, ids[:, part], tokens, cache)
        if name == "phi3-longrope-long" and part.stop < cases.LENGTH:
            continue  # these lengths have the short factors, the golden values have the long ones
        got, expected = np.asarray(logits)[real[:, part]], np.asarray(golden["logits"])[:, part][real[:, part]]
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_a_round_trip_restores_config_and_parameters(directory, tmp_path):
    kind, model, params = read(directory)
    huggingface.save(tmp_path / "out", kind, model.config, params, {})
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_allclose(after[name], before[name], atol=1e-7 if "gemma" in kind else 0, rtol=0)
    again, model2, params2 = read(tmp_path / "out")
    assert (again, model2.config) == (kind, model.config)
    jax.tree.map(np.testing.assert_array_equal, params2, params)


@pytest.mark.parametrize(
    "directory", ["llama", "qwen2-sliding", "gemma3", "bert", "gpt2-inverse", "smollm3"], indirect=True
)
def test_scanned_parameters_are_the_same_model(directory):
    from llm_jax.model.stages import layout

    _, model, params = read(directory)
    scanned = Transformer(dataclasses.replace(model.config, scan_layers=True))
    ids = jnp.asarray(cases.ids("x"))
    features = lambda m, p: jax.jit(lambda p: m.apply({"params": p}, ids, method="features")[0])(p)  # noqa: E731
    _, _, stacked = read(directory, scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, stacked, trees.restage(params, layout(scanned.config)))
    np.testing.assert_allclose(features(scanned, stacked), features(model, params), atol=2e-5)


@pytest.mark.parametrize("directory", ["llama", "gemma3", "gpt2", "phi3", "gpt_neox", "bert"], indirect=True)
def test_each_shard_is_a_slice_of_the_parameter(directory, monkeypatch):
    kind, model, params = read(directory)
    source = huggingface._Files(directory)
    wanted = assemble.specs(FAMILIES[kind].tensor_names(model.config), params)
    source.rename(FAMILIES[kind].prefix, {spec.name for spec in wanted.values()})
    monkeypatch.setattr(assemble, "_CHUNK_BYTES", 500)  # several reads for one shard
    for path, leaf in trees.flatten(params).items():
        spans = [range(size // 4, size // 4 * 3) for size in leaf.shape]
        out = np.empty(tuple(map(len, spans)), np.float32)
        assemble._fill(out, source, wanted[path], spans, leaf.shape[-1])
        np.testing.assert_array_equal(out, leaf[tuple(slice(s.start, s.stop) for s in spans)])


@pytest.fixture
def llama(tmp_path):
    return tmp_path / "llama", write_directory(tmp_path / "llama", "llama")


def test_every_wrong_tensor_is_named(llama):
    path, tensors = llama
    del tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["lm_head.weight"] = np.zeros((3, 3), np.float32)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UserError) as error:
        read(path)
    said = str(error.value).splitlines()[1:]
    assert said == [
        "- model.norm.weight (for final_norm/scale)",
        "+ model.layers.7.mlp.up_proj.weight (2, 2)",
        "! lm_head.weight is (3, 3), expected (64, 32) for head/kernel",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]), "not a whole"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "is pickled: it could run code"),
        (lambda p: (p / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda p: (p / "config.json").write_text("[]"), "config.json: cannot be read .not an object"),
        (lambda p: edit(p, model_type="mamba"), "model_type is 'mamba'; expected one of llama, mistral"),
        (lambda p: edit(p, hidden_size=None), "'model.width' is None; expected int"),
        (lambda p: edit(p, hidden_act="xielu"), "the activation is 'xielu'; expected one of silu"),
        (lambda p: edit(p, rope_parameters={"rope_type": "xrope"}), "rope_type is 'xrope'; expected one of"),
        (lambda p: edit(p, rope_parameters={"rope_type": "longrope"}), "'short_factor' is missing"),
        (lambda p: edit(p, num_attention_heads=5), "^/.*: model.num_kv_heads=.* does not divide"),
        (lambda p: index(p, "../model.safetensors"), "names the file '../model.safetensors'"),
        (lambda p: index(p, "other.safetensors"), "other.safetensors: named in model.safetensors.index.json"),
        (lambda p: (index(p, ""), (p / "model.safetensors.index.json").write_text("[]")), "not an index of safetens"),
    ],
)
def test_damaged_or_hostile_directories_end_in_one_clear_error(llama, change, message):
    path, _ = llama
    change(path)
    with pytest.raises(UserError, match=message):
        read(path)


MIXTURES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
    *("deepseek_v4", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared", "granitemoehybrid", "phimoe", "gpt_oss"),
    *("llama4", "llama4_text", "dbrx", "jamba", "jetmoe", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "minimax"),
    *("minimax_m2", "lfm2_moe", "bailing_moe", "kimi_k25", "kimi_linear", "longcat_flash", "nemotron_h", "afmoe"),
)


def test_mixtures_of_experts_are_refused_as_such():
    """By the name of the family, and by the keys that published files have, wherever they are."""
    llama = GOLDEN["llama"]["config"]
    counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    configs = [{"model_type": name} for name in MIXTURES]
    configs += [{"model_type": name, key: 8} for key in counts for name in ("llama", "new_one")]
    configs += [{"model_type": "new_one", section: {counts[0]: 8}} for section in ("text_config", "ffn_config")]
    for config in configs:
        with pytest.raises(UserError, match=f"model_type is '{config['model_type']}', a mixture of experts") as error:
            model_config(llama | config)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="model_type is 'granitemoehybrid'; expected one of llama"):
        model_config({"model_type": "granitemoehybrid", "num_local_experts": 0})  # a dense one
    for count in (0, 1):  # dense
        model_config(llama | dict.fromkeys(counts, count))


def edit(path, **changes):
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | changes))


def index(path, name):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))


def test_mutated_headers_never_end_in_anything_but_a_clear_error(llama):
    path, _ = llama
    file = path / "model.safetensors"
    whole = file.read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for place in draw.integers(0, 3000, draw.integers(1, 4)):
            damaged[place] = draw.integers(0, 256)
        file.write_bytes(damaged)
        with contextlib.suppress(UserError):
            huggingface._Files(path)


def test_shards_are_read_as_one(llama):
    path, tensors = llama
    _, _, expected = read(path)
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, path / file)
    listed = {"weight_map": {n: file for file, part in files.items() for n in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(listed))
    jax.tree.map(np.testing.assert_array_equal, read(path)[2], expected)


def test_shards_without_an_index_are_read_if_none_is_missing(llama):
    path, tensors = llama
    _, _, expected = read(path)
    (path / "model.safetensors").unlink()
    for i in range(3):
        save_file({n: tensors[n] for n in sorted(tensors)[i::3]}, path / f"model-0000{i + 1}-of-00003.safetensors")
    jax.tree.map(np.testing.assert_array_equal, read(path)[2], expected)
    (path / "model-00002-of-00003.safetensors").rename(path / "model-00002-of-00004.safetensors")
    with pytest.raises(UserError, match="shards of several models, .*-of-00003.safetensors, .*-of-00004"):
        read(path)
    (path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors: missing, one of 1 of 3 shards"):
        read(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("bert", {"is_decoder": True}, "is_decoder is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "'factor' is missing"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 4}, "use_sliding_window is not supported"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "expected a positive number"),
    ],
)
def test_settings_that_would_change_the_numbers_are_refused(name, change, message):
    with pytest.raises(UserError, match=message):
        model_config(GOLDEN[name]["config"] | change)


def test_rotary_settings_by_layer_type_count_if_they_are_the_same():
    """transformers 5 writes rope_parameters for every layer type of some models."""
    same, other = ({"rope_theta": base, "rope_type": "default"} for base in (5e5, 1e4))
    nested = {"full_attention": same, "sliding_attention": same}
    assert model_config(GOLDEN["llama"]["config"] | {"rope_parameters": nested})[1].position.base == 5e5
    with pytest.raises(UserError, match="rope_parameters that differ by layer type are supported for gemma3_text only"):
        model_config(GOLDEN["llama"]["config"] | {"rope_parameters": nested | {"sliding_attention": other}})


def test_missing_keys_of_config_json_have_the_default_of_the_family():
    without = lambda name, *keys: {k: v for k, v in GOLDEN[name]["config"].items() if k not in keys}  # noqa: E731
    gemma = model_config(without("gemma2", "final_logit_softcapping", "attn_logit_softcapping"))[1]
    assert (gemma.logit_softcap, gemma.attention_softcap) == (30.0, 50.0)
    assert model_config(without("mistral", "sliding_window", "layer_types"))[1].window == 4096
    assert model_config(GOLDEN["mistral"]["config"] | {"sliding_window": None})[1].layer_pattern == ("global",)
    assert model_config(without("phi", "hidden_act"))[1].activation == "gelu"
    smollm3 = model_config({**without("smollm3", "no_rope_layers", "rope_parameters"), "num_hidden_layers": 8})[1]
    assert (smollm3.layer_pattern, smollm3.position.base) == (("global", "global", "global", "nope"), 2e6)
    neox = model_config(without("gpt_neox", "rope_parameters", "attention_bias") | {"rotary_emb_base": 5e4})[1]
    assert (neox.position.base, neox.position.partial_rotary_factor, neox.bias) == (5e4, 0.25, True)
    assert model_config(without("starcoder2", "use_bias", "tie_word_embeddings"))[1].bias
    starcoder2 = model_config(without("starcoder2", "hidden_act", "num_key_value_heads", "norm_epsilon"))[1]
    assert (starcoder2.activation, starcoder2.num_kv_heads, starcoder2.norm_eps) == ("gelu", 2, 1e-5)
    assert model_config(without("olmo2", "rms_norm_eps"))[1].norm_eps == 1e-5
    assert model_config(without("granite", "attention_multiplier"))[1].attention_scale == 1.0


def test_tensors_are_written_in_the_dtype_that_config_json_names(llama, tmp_path):
    kind, model, params = read(llama[0])
    precision = dataclasses.replace(model.config.precision, params="bfloat16")
    huggingface.save(tmp_path / "out", kind, dataclasses.replace(model.config, precision=precision), params, {})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(array.dtype) for array in written.values()} == {"bfloat16"}


def test_a_family_refuses_a_model_that_it_cannot_hold():
    _, gemma = model_config(GOLDEN["gemma2"]["config"])
    for key in ("attention_softcap", "attention_scale", "logit_softcap"):
        with pytest.raises(UserError, match=f"llama cannot hold model.{key}"):
            hf_config("llama", dataclasses.replace(neutral(), **{key: getattr(gemma, key)}))
    _, config = model_config(GOLDEN["llama"]["config"])
    with pytest.raises(UserError, match="llama cannot hold model.qk_norm=True"):
        hf_config("llama", dataclasses.replace(config, qk_norm=True))
    # One model has one spelling: biases everywhere, however they are said, and the default scale as a number.
    both = dataclasses.replace(config, attention_bias=True, mlp_bias=True, attention_scale=8**-0.5)
    written = hf_config("llama", both)
    assert (written["attention_bias"], written["mlp_bias"]) == (True, True)
    with pytest.raises(UserError, match="qwen2 cannot hold model"):
        hf_config("qwen2", both)
    assert set(FAMILIES) == {golden["config"]["model_type"] for golden in GOLDEN.values()}
