"""Writing and reading GGUF files: round trips of models, codes, metadata and vocabularies."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import tokenizers as library

from llm_jax import checkpoints, trees, weights
from llm_jax.checkpoints import gguf, gguf_model
from llm_jax.checkpoints.families import neutral
from llm_jax.errors import UserError
from llm_jax.kernels import blocks
from llm_jax.model.transformer import Transformer
from llm_jax.quant import post_training
from llm_jax.tokenizers.hub import HubTokenizer
from tests.checkpoints.gguf_cases import small


def test_a_model_comes_out_as_it_went_in(written, vocabulary):
    path, config, params = written
    model, again, tokenizer = checkpoints.load(path)
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    text = "the model 12 é😀<end>"
    assert tokenizer.encode(text) == vocabulary.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos == vocabulary.eos and tokenizer.special["chat_template"] == vocabulary.special["chat_template"]
    assert tokenizer.encode_chat("<end>") == [tokenizer.eos]


@pytest.mark.parametrize(("kind", "error"), [("F16", 2e-3), ("Q8_0", 0.02), ("Q4_0", 0.25), ("Q4_1", 0.2)])
def test_each_format_has_its_round_trip_error(vocabulary, tmp_path, kind, error):
    config, params = small("llama", vocabulary.vocab_size)
    formats = gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, kind)
    assert formats["blk.0.attn_q.weight"] == kind and formats["blk.1.ffn_norm.weight"] == "F32"
    assert formats["token_embd.weight"] == ("Q8_0" if kind.startswith("Q4") else kind)
    _, again, _ = checkpoints.load(tmp_path / "m.gguf")
    for path, weight in trees.flatten(params).items():
        got = trees.flatten(again)[path]
        assert float(abs(got - weight).max()) <= error * float(abs(weight).max()), path


@pytest.mark.parametrize(("scheme", "kind"), [("int8:32", "Q8_0"), ("int4", "Q4_0"), ("int4_affine", "Q4_1")])
def test_codes_are_unchanged_after_writing_and_reading_blocks(vocabulary, tmp_path, scheme, kind):
    config, params = small("llama", vocabulary.vocab_size)
    codes = post_training.quantize_params(params, post_training.rules(scheme, "int8:32"), "here")
    formats = gguf_model.save(tmp_path / "m.gguf", config, codes, vocabulary, "F16")
    assert formats["blk.0.attn_q.weight"] == kind and formats["token_embd.weight"] == "Q8_0"
    loaded = checkpoints.load(tmp_path / "m.gguf", as_stored=True).params
    assert gguf_model.save(tmp_path / "again.gguf", config, loaded, vocabulary, "F16") == formats
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    kept = weights.in_rows(loaded)
    assert trees.describe(kept) == trees.describe(codes)
    jax.tree.map(np.testing.assert_array_equal, kept, codes)
    rounded = weights.with_activations(codes, "int8")  # the activations of products do not change the blocks
    assert gguf_model.save(tmp_path / "a8.gguf", config, rounded, vocabulary, "F16") == formats
    expanded = trees.flatten(checkpoints.load(tmp_path / "m.gguf").params)
    for path, weight in trees.flatten(codes).items():
        np.testing.assert_allclose(expanded[path], weights.dense(weight), rtol=1e-6, atol=1e-7)


def test_layers_with_different_formats_are_read_separately(vocabulary, tmp_path):
    config, params = small("llama", vocabulary.vocab_size)
    chosen = post_training.rules("int4", "int8:32", ((r"layers/0/mlp/.*", "int8:32"),))
    gguf_model.save(
        tmp_path / "m.gguf", config, post_training.quantize_params(params, chosen, "here"), vocabulary, "F16"
    )
    model, kept, _ = checkpoints.load(tmp_path / "m.gguf", scan_layers=True, as_stored=True)
    assert not model.config.scan_layers and kept["layers"]["0"]["mlp"]["up"].scheme == "int8:32"


HALF = """
class Half:
    def encode(self, w): return {"codes": w.astype("float16")}
    def decode(self, parts): return parts["codes"].astype("float32")
"""


@pytest.mark.parametrize("scheme", ["nf4:32", "half.py:Half"])
def test_codes_that_no_block_holds_are_expanded(vocabulary, tmp_path, own_cache, monkeypatch, scheme):
    (tmp_path / "half.py").write_text(HALF)
    monkeypatch.syspath_prepend(tmp_path)
    config, params = small("llama", vocabulary.vocab_size)
    codes = post_training.quantize_params(params, post_training.rules(scheme, "int8"), "here")
    assert set(gguf_model.save(tmp_path / "m.gguf", config, codes, vocabulary, "F32").values()) == {"F32"}
    again = trees.flatten(checkpoints.load(tmp_path / "m.gguf", as_stored=True).params)
    for path, weight in trees.flatten(codes).items():
        np.testing.assert_allclose(again[path], weights.dense(weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("qwen2", {"head_dim": 32}, "qwen2 cannot hold model.head_dim=32; its heads are 64 / 4 wide"),
        ("gemma2", {"attention_scale": 0.5}, "gemma2 cannot hold model.attention_scale=0.5"),
        ("gemma2", {"attention_softcap": 0.0}, "cannot hold model.attention_softcap=0.0 .it would be 50.0."),
        ("gemma3", {"num_layers": 4, "layer_pattern": ("global", "local")}, "cannot hold model.layer_pattern"),
        ("qwen2", {"layer_pattern": ("local",)}, "sliding windows are not written to GGUF files of a qwen2"),
        ("gpt2", {"num_kv_heads": 2}, "gpt2 cannot hold model.num_kv_heads=2"),
        (
            "olmo2",
            {"tie_embeddings": True},
            "olmo2 needs an output head; model.tie_embeddings=True has none of its own",
        ),
        ("gptneox", {"activation": "gelu_exact"}, "gptneox cannot hold model.activation='gelu_exact'"),
        ("smollm3", {"layer_pattern": ("global", "nope")}, "smollm3 cannot hold model.layer_pattern"),
    ],
)
def test_options_that_an_architecture_lacks_are_rejected(vocabulary, tmp_path, arch, change, message):
    config, params = small(arch, vocabulary.vocab_size, **change)
    with pytest.raises(UserError, match=message):
        gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    assert list(tmp_path.iterdir()) == []


def test_whole_numbers_of_scales_are_written_as_floats(vocabulary, tmp_path):
    """llama.cpp refuses integers."""
    config, params = small("granite", vocabulary.vocab_size)
    gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    metadata = gguf.read(tmp_path / "m.gguf").metadata
    scales = {key: metadata[f"granite.{key}"] for key in ("embedding_scale", "logit_scale", "attention.scale")}
    assert scales == {"embedding_scale": 6.0, "logit_scale": 4.0, "attention.scale": 0.25}
    assert all(isinstance(scale, float) for scale in scales.values())


def test_windows_by_layer_are_read(vocabulary, tmp_path):
    config, params = small("gemma3", vocabulary.vocab_size, num_layers=3, layer_pattern=("local", "local", "global"))
    gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    file = gguf.read(tmp_path / "m.gguf")
    key = "gemma3.attention.sliding_window_pattern"
    assert file.metadata[key] == 3
    for pattern, expected in (
        ([True, True, False], ("local", "local", "global")),
        (2, ("local", "global")),
        (0, ("local",)),
    ):
        read = gguf_model.read_config(gguf.GgufFile(file.metadata | {key: pattern}, file.tensors), "file")[1]
        assert read.layer_pattern == expected
    without = {k: v for k, v in file.metadata.items() if not k.endswith("sliding_window")}
    assert gguf_model.read_config(gguf.GgufFile(without, file.tensors), "file")[1].layer_pattern == ("global",)


def test_a_fused_tensor_is_three_of_ours(vocabulary, tmp_path):
    config, params = small("phi2", vocabulary.vocab_size)
    gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    file = gguf.read(tmp_path / "m.gguf")
    arrays = {name: t.read().reshape(t.shape) for name, t in file.tensors.items()}
    for layer, end in itertools.product(range(2), ("weight", "bias")):
        parts = [arrays.pop(f"blk.{layer}.attn_{n}.{end}") for n in "qkv"]
        arrays[f"blk.{layer}.attn_qkv.{end}"] = np.concatenate(parts)
    tensors = {name: (array.shape, "F32") for name, array in arrays.items()}
    gguf.write(tmp_path / "fused.gguf", file.metadata, tensors, arrays.values())
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load(tmp_path / "fused.gguf").params, params)


def test_the_pooler_of_bert_is_left_out(vocabulary, tmp_path):
    config, params = small("bert", vocabulary.vocab_size, pooler=True)
    gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    model, again, _ = checkpoints.load(tmp_path / "m.gguf")
    assert model.config == dataclasses.replace(config, pooler=False)
    jax.tree.map(np.testing.assert_array_equal, again, {k: v for k, v in params.items() if k != "pooler"})
    file = gguf.read(tmp_path / "m.gguf")
    assert file.metadata["bert.attention.causal"] is False and file.metadata["tokenizer.ggml.token_type_count"] == 2


def test_keys_that_change_nothing_are_accepted_with_that_value_only(plain):
    expected = gguf_model.read_config(plain, "file")[1]
    for key, neutral_value, other in (
        ("rope.scaling.attn_factor", 1.0, 1.5),
        ("rope.scaling.yarn_attn_factor", 1.0, 1.5),
        ("rope.scaling.yarn_ext_factor", -1.0, 0.5),
        ("rope.scaling.yarn_ext_factor", 1.0, 0.0),
        ("rope.scaling.yarn_beta_fast", 32.0, 16.0),
        ("rope.scaling.yarn_beta_slow", 1.0, 2.0),
        ("rope.scaling.yarn_log_multiplier", 0.0, 0.1),
        ("attention.clamp_kqv", 0.0, 8.0),
        ("attention.max_alibi_bias", 0.0, 8.0),
        ("expert_count", 0, 8),
        ("expert_used_count", 0, 2),
        ("expert_shared_count", 0, 1),
        ("leading_dense_block_count", 0, 1),
        ("nextn_predict_layers", 0, 1),
        ("embedding_scale", 1.0, 12.0),
        ("residual_scale", 1.0, 0.2),
        ("logit_scale", 0.0, 0.5),
        ("tensor_data_layout", "Meta AI original pth", "transposed"),
        ("attention.causal", True, False),
        ("logit_scale", 1.0, 0.5),
        ("attention.head_count_kv", [2, 2], [2, 1]),
    ):
        changed = gguf.GgufFile(plain.metadata | {f"llama.{key}": neutral_value}, plain.tensors)
        assert gguf_model.read_config(changed, "file")[1] == expected, key
        with pytest.raises(UserError, match=f"llama.{key}=.* is not supported|num_kv_heads"):
            gguf_model.read_config(gguf.GgufFile(plain.metadata | {f"llama.{key}": other}, plain.tensors), "file")
    mixture = gguf.GgufFile({"general.architecture": "qwen3moe", "qwen3moe.expert_count": 128}, {})
    with pytest.raises(UserError, match="file: qwen3moe.expert_count=128: a mixture of experts is not supported"):
        gguf_model.read_config(mixture, "file")
    adapter = gguf.GgufFile(plain.metadata | {"general.type": "adapter"}, plain.tensors)
    with pytest.raises(UserError, match="file: general.type is 'adapter'; expected the file of a whole model"):
        gguf_model.read_config(adapter, "file")
    pooled = gguf.GgufFile(plain.metadata | {"llama.pooling_type": 3}, plain.tensors)
    assert gguf_model.read_config(pooled, "file")[1] == expected


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"])
def test_blocks_that_are_only_read_are_the_weights_of_a_model(plain, tmp_path, kind):
    block, draw = blocks.FORMATS[kind], np.random.RandomState(0)
    shape = (plain.tensors["token_embd.weight"].shape[0], 256)
    rows = draw.randint(0, 60, (shape[0], 256 // block.numbers * block.size)).astype(np.uint8)
    gguf.write(tmp_path / "m.gguf", {"general.architecture": "llama"}, {"token_embd.weight": (shape, kind)}, [rows])
    tensor = gguf.read(tmp_path / "m.gguf").tensors["token_embd.weight"]
    assert (tensor.shape, tensor.format) == (shape, kind)
    np.testing.assert_array_equal(tensor.read(slice(1, 3)), blocks.decode(kind, rows)[1:3])


def test_an_existing_file_is_not_overwritten(written, vocabulary):
    path, config, params = written
    with pytest.raises(UserError, match="already exists; choose another path"):
        gguf_model.save(path, config, params, vocabulary, "F32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "cannot hold model.activation"),
        ({"bias": True}, "cannot hold model.bias"),
        ({"attention_softcap": 5.0}, "cannot hold model.attention_softcap"),
        (
            {
                "position": dataclasses.replace(
                    neutral().position, scaling="yarn", scaling_factor=2.0, original_length=8, beta_fast=16.0
                )
            },
            "beta_fast",
        ),
        ({"position": dataclasses.replace(neutral().position, kind="alibi")}, "cannot hold model.position.kind"),
    ],
)
def test_a_model_that_gguf_cannot_represent_is_rejected(vocabulary, tmp_path, change, message):
    config, _ = small("llama", vocabulary.vocab_size)
    config = dataclasses.replace(config, **change)
    params = jax.tree.map(lambda w: np.zeros(w.shape, w.dtype), checkpoints.abstract_params(Transformer(config)))
    with pytest.raises(UserError, match=message):
        gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    assert list(tmp_path.iterdir()) == []


def test_aliases_of_pre_tokenizers_and_a_missing_name(vocabulary):
    said = vocabulary.to_gguf(vocabulary.vocab_size)
    key, text = "tokenizer.ggml.pre", "ab12.34  (text)...\n"

    def pieces(**changes):
        kept = {k: v for k, v in said.items() if k != key}
        tokenizer = HubTokenizer.from_gguf(kept | changes)
        return [tokenizer.piece(i) for i in tokenizer.encode(text)], tokenizer.to_gguf(tokenizer.vocab_size)[key]

    assert said[key] == "smollm" and pieces(**{key: "starcoder"}) == pieces(**{key: "smollm"})
    assert pieces(**{key: "phi-2"}) == pieces(**{key: "gpt-2"}) and pieces()[1] == "default"
    assert pieces() == pieces(**{key: "default"})


def test_vocabularies_that_would_change_are_not_written(vocabulary):
    said = json.loads(vocabulary.files()["tokenizer.json"])
    for change in ({"normalizer": {"type": "Lowercase"}}, {"model": said["model"] | {"ignore_merges": True}}):
        with pytest.raises(UserError, match="expected byte-level BPE"):
            HubTokenizer(json.dumps(said | change), {}).to_gguf(300)


def test_bos_is_what_the_post_processor_adds(vocabulary):
    made = library.Tokenizer.from_str(vocabulary.files()["tokenizer.json"].decode())
    made.post_processor = library.processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    said = json.dumps({"bos_token": "<end>"}).encode()
    with_it = HubTokenizer.from_pretrained({"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": said})
    without = HubTokenizer.from_pretrained(vocabulary.files() | {"tokenizer_config.json": said})
    assert with_it.bos == 0 and without.bos is None


def test_metadata_of_every_type_survives(tmp_path):
    said = {"s": "é", "b": True, "i": -5, "u": 7, "f": 0.5, "list": ["a", ""], "numbers": [1, -2], "none": []}
    gguf.write(tmp_path / "m.gguf", said, {}, [])
    assert json.dumps(gguf.read(tmp_path / "m.gguf").metadata) == json.dumps(said)
