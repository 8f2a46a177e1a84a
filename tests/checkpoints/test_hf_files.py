"""Variants of Hugging Face directories: other tensor names, contradictory settings, leftover files, downloads."""

import dataclasses
import fnmatch
import json
import sys
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import tokenizers
from llm_jax.checkpoints import assemble, gguf, huggingface, location, opening, peft_tensors
from llm_jax.checkpoints.checkpoint import on_default_device
from llm_jax.checkpoints.names import TensorSpec
from llm_jax.errors import UserError
from tests.checkpoints.test_hf import edit, read, write_directory


@pytest.fixture
def saved(tmp_path):
    """saved(family, change) writes a directory; `change` edits its tensors in place."""

    def write(name, change=lambda tensors: None, **settings):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}-{name}"
        tensors = write_directory(path, name)
        change(tensors)
        save_file(tensors, path / "model.safetensors")
        edit(path, **settings)
        return path

    return write


def other_head(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1


def same_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()


def no_head(tensors):
    del tensors["lm_head.weight"]


def remove(*ends):
    def change(tensors):
        for name in [n for n in tensors if n.endswith(ends)]:
            del tensors[name]

    return change


BIASES = ("bias", "attention_bias", "mlp_bias", "qkv_bias")
ATTENTION = tuple(f"self_attn.{n}_proj.bias" for n in "qkvo")


@pytest.mark.parametrize(
    ("name", "change", "settings", "expected", "noted"),
    [
        ("llama", other_head, {"tie_word_embeddings": True}, {"tie_embeddings": False}, ["tie_word_embeddings"]),
        ("llama", same_head, {"tie_word_embeddings": True}, {"tie_embeddings": True}, []),
        ("llama", no_head, {}, {"tie_embeddings": True}, ["tie_word_embeddings"]),
        ("gpt_neox", remove("embed_out.weight"), {}, {"tie_embeddings": True}, ["tie_word_embeddings"]),
        (
            "llama-attention-bias",
            lambda tensors: None,
            {"attention_bias": False},
            {"attention_bias": True},
            ["attention_bias"],
        ),
        ("llama-attention-bias", remove("o_proj.bias"), {}, {"qkv_bias": True}, ["attention_bias"]),
        ("llama-attention-bias", lambda t: None, {"mlp_bias": True}, {"attention_bias": True}, ["mlp_bias"]),
        ("llama-mlp-bias", lambda t: None, {"attention_bias": True}, {"mlp_bias": True}, ["attention_bias"]),
        ("qwen3-bias", remove(*ATTENTION), {}, {}, ["attention_bias"]),
        (
            "phi-qk-norm",
            lambda t: None,
            {"qk_layernorm": False},
            {"qk_norm": True, "bias": True},
            ["norms of queries and keys"],
        ),
        ("bert", remove("pooler.dense.weight", "pooler.dense.bias"), {}, {"pooler": False, "bias": True}, []),
    ],
)
def test_where_a_flag_contradicts_the_tensors_the_tensors_count(saved, capsys, name, change, settings, expected, noted):
    path = saved(name, change, **settings)
    _, model, params = read(path)  # raises if a tensor is missing or unexpected
    expected = (dict.fromkeys(BIASES, False) if name != "gpt_neox" else {}) | expected
    assert {option: getattr(model.config, option) for option in expected} == expected
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(" about ")[1].split(";")[0] for note in notes] == noted
    assert all(note.startswith(f"note: {path}: config.json contradicts the tensors") for note in notes)
    assert ("head" in params) == (not model.config.tie_embeddings)
    if name in ("llama", "bert", "gpt_neox"):  # the others would be of another family
        huggingface.save(path.parent / "again", name, model.config, params, {})
        assert read(path.parent / "again")[1].config == model.config


def test_the_head_in_the_file_is_the_head_of_the_model(saved):
    kernel = read(saved("llama", other_head, tie_word_embeddings=True))[2]["head"]["kernel"]
    np.testing.assert_array_equal(kernel, read(saved("llama"))[2]["head"]["kernel"] + 1)


def test_a_feature_of_some_layers_only_is_refused(saved):
    with pytest.raises(UserError, match=r"- model.layers.1.self_attn.q_proj.bias"):
        read(saved("llama-attention-bias", remove("layers.1.self_attn.q_proj.bias")))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert"])
def test_other_names_are_read(saved, name):
    """Without the prefix of models that have a head, or with it; norms as in bert-base-uncased as published."""
    prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox.", "bert": "bert."}.get(name, "model.")

    def rename(tensors):
        for key in list(tensors):
            other = key.removeprefix(prefix) if key.startswith(prefix) else prefix * (name == "bert") + key
            other = other.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[other.replace("embed_out", "lm_head")] = tensors.pop(key)

    jax.tree.map(np.testing.assert_array_equal, read(saved(name, rename))[2], read(saved(name))[2])


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrappers_of_torch_in_names_are_left_out(saved, wrapper, capsys):
    def wrap(tensors):
        for key in list(tensors):
            tensors[wrapper + key.replace("layers.1.", "layers.1._orig_mod.")] = tensors.pop(key)

    jax.tree.map(np.testing.assert_array_equal, read(saved("llama", wrap))[2], read(saved("llama"))[2])
    assert "contradicts" not in capsys.readouterr().err


def test_layer_types_of_another_number_of_layers(saved):
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = huggingface.read_config(saved("mistral", num_hidden_layers=2, sliding_window=4, layer_types=kinds))[1]
    assert config.layer_pattern == ("local", "global")  # the third is of no layer
    with pytest.raises(UserError, match="layer_types has 1 entries; expected one for each of the 2 layers"):
        huggingface.read_config(saved("mistral", num_hidden_layers=2, sliding_window=4, layer_types=kinds[:1]))


def test_quantized_and_empty_tensors_are_refused_by_what_they_are(saved):
    def gptq(tensors):
        tensors["model.layers.0.mlp.up_proj.qweight"] = np.zeros((4, 48), np.int32)

    def scaled(tensors):
        tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = np.ones((1, 1), np.float32)

    def empty(tensors):
        tensors["model.norm.weight"] = np.zeros(0, np.float32)

    def mlx(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 4), np.uint32)
        tensors["model.layers.0.mlp.up_proj.scales"] = np.ones((48, 1), np.float16)

    for change, key, setting, named, detail in (
        (gptq, "quantization_config", {"quant_method": "gptq"}, "quant_method='gptq'", "qweight' is of type I32"),
        (scaled, "quantization_config", {"quant_method": "fp8"}, "quant_method='fp8'", "weight_scale_inv"),
        (mlx, "quantization", {"group_size": 64, "bits": 4}, "{'group_size': 64, 'bits': 4}", "is of type U32"),
    ):
        path = saved("llama", change, **{key: setting})
        with pytest.raises(UserError, match=f"quantization_config of {named}.*{detail}.*--base=PATH") as error:
            checkpoint = opening.open(path)
            checkpoint.params(checkpoint.config, on_default_device)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"model.norm.weight is \(0,\).* \(empty: .* were not gathered"):
        read(saved("llama", empty))


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


class _InMemory:
    """A source of `assemble` with one tensor."""

    label = "memory"

    def __init__(self, values):
        self.values, self.shapes = values, {"w": values.shape}

    def read(self, name, slices):
        return self.values[slices]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_bytes", [64, 2**20])  # some rows at a time, or all
@pytest.mark.parametrize("part", [0, 1])
def test_a_value_that_is_not_finite_is_found_at_every_place_of_its_part(monkeypatch, dtype, chunk_bytes, part):
    """Two groups of two parts, as of GPT-NeoX's queries and keys."""
    monkeypatch.setattr(assemble, "_CHUNK_BYTES", chunk_bytes)
    largest = float(ml_dtypes.finfo(dtype).max) if dtype is not np.float64 else 1e30
    spec = TensorSpec("w", part=(part, 2), groups=2)
    for place in np.ndindex(7, 12):
        for value in (np.nan, -np.nan, np.inf, -np.inf, largest, -largest):
            stored = np.ones((7, 12), dtype)
            stored[place] = value
            finite = assemble._fill(np.empty((7, 6), np.float32), _InMemory(stored), spec, [range(7), range(6)], 6)
            assert finite == (np.isfinite(value) or place[1] // 3 % 2 != part), (place, value)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
@pytest.mark.parametrize("scan", [True, False])
def test_weights_that_are_not_finite_are_named(saved, capsys, layer, place, scan):
    """In one file, and in the shards of several."""
    broken = f"model.layers.{layer}.mlp.up_proj.weight"

    def change(tensors):
        tensors[broken] = tensors[broken].astype(ml_dtypes.bfloat16)
        tensors[broken][place] = np.nan

    path = saved("llama", change)
    message = f"1 tensors have values that are NaN or infinite, so that outputs may be NaN: {broken}\n"
    huggingface_params(path, scan)
    assert message in capsys.readouterr().err
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for i in range(2):
        part = {name: tensors[name] for name in sorted(tensors)[i::2]}
        save_file(part, path / f"model-0000{i + 1}-of-00002.safetensors")
    huggingface_params(path, scan)
    assert message in capsys.readouterr().err


def huggingface_params(path, scan):
    kind, config = huggingface.read_config(path)
    return huggingface.load_params(path, kind, dataclasses.replace(config, scan_layers=scan), on_default_device)


def test_a_tensor_under_two_names_is_refused(saved):
    def twice(tensors):
        tensors["norm.weight"] = tensors["model.norm.weight"]

    with pytest.raises(UserError, match="'model.norm.weight' is stored under two names"):
        read(saved("llama", twice))


def test_a_whole_file_counts_and_an_index_that_was_left_beside_it_does_not(saved):
    path = saved("llama")
    shards = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(shards))
    jax.tree.map(np.testing.assert_array_equal, read(path)[2], read(saved("llama"))[2])


def test_the_hub_is_asked_for_weights_and_for_every_file_of_a_tokenizer(monkeypatch):
    wanted = {
        *("config.json", "generation_config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *(
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
            "merges.txt",
            "vocab.txt",
            "tokenizer.model",
        ),
        *("spiece.model", "sentencepiece.bpe.model", "adapter_config.json", "adapter_model.safetensors"),
    }
    unwanted = {
        *("pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", "README.md", "tf_model.h5"),
        *("onnx/model.onnx", "original/params.json", "LICENSE", "coreml/model.mlmodel", "flax_model.msgpack"),
    }
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        fits = lambda file, patterns: any(fnmatch.fnmatch(file, pattern) for pattern in patterns)  # noqa: E731
        asked.append({f for f in wanted | unwanted if fits(f, allow_patterns) and not fits(f, ignore_patterns)})
        return "/"

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    location.resolve("hf:org/name")
    assert asked == [wanted]


def test_a_pointer_of_git_lfs_is_named_as_one(saved, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 134\n"
    directory = saved("llama")
    (directory / "adapter_model.safetensors").write_text(pointer)
    (directory / "tokenizer.json").write_text(pointer)
    (directory / "model.gguf").write_text(pointer)
    (directory / "model.safetensors").write_text(pointer)
    for name, read_file in (
        ("model.safetensors", lambda: read(directory)),
        ("adapter_model.safetensors", lambda: peft_tensors._read_file(directory)),
        ("tokenizer.json", lambda: tokenizers.from_directory(directory)),
        ("model.gguf", lambda: gguf.read(directory / "model.gguf")),
    ):
        with pytest.raises(UserError, match=f"{directory / name}: a pointer of Git LFS, .* run `git lfs pull`"):
            read_file()


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (["model-00001-of-00002.safetensors"], "", "no config.json beside model-00001-of-00002.safetensors; a Hugging"),
        (["adapter_model.safetensors"], "", "no adapter_config.json beside adapter_model.safetensors; a Hugging Face"),
        (["model.safetensors"], "model.safetensors", "a file of a Hugging Face directory; give the directory, .*/x$"),
        (["config.json"], "config.json", "a file of a Hugging Face directory; give the directory, .*/x$"),
        (["checkpoints/3/record.json"], "checkpoints", "holds the checkpoints of a run; give the run, .*/x, or one of"),
        (["model.safetensors", "checkpoints/x"], "", "no finished checkpoint here; expected a run"),
        (["notes.txt"], "", "no finished checkpoint here; expected a run or one of its checkpoints, a Hugging Face or"),
        (["a/checkpoints/3/record.json", "b/checkpoints/x"], "", "a directory of runs; give one of them: .*/x/a$"),
        ([f"{name}/checkpoints/3/x" for name in "abcde"], "", "(/x/[a-e].*){3} or one of 2 others$"),
        (["checkpoints/3/record.json", "checkpoints/3/params/x"], "checkpoints/3/params", "give the .*/checkpoints/3$"),
        (["config.json", "checkpoints/x"], "checkpoints", "the run .*/x has no finished checkpoint; the command that"),
    ],
)
def test_a_part_of_a_checkpoint_is_answered_with_what_is_missing(tmp_path, files, name, message):
    for file in files:
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / file).write_text("{}")
    with pytest.raises(UserError, match=message):
        opening.open(tmp_path / "x" / name)
