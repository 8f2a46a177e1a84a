"""GGUF files: what is written is read back, and no damage ends in anything but one clear error."""

import contextlib
import dataclasses
import itertools
import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as library

from llm_jax import checkpoints, trees, weights
from llm_jax.checkpoints import gguf, gguf_model
from llm_jax.checkpoints.families import neutral
from llm_jax.errors import UserError
from llm_jax.kernels import blocks
from llm_jax.model import rope
from llm_jax.model.transformer import Transformer
from llm_jax.quant import post_training
from llm_jax.tokenizers.hub import HubTokenizer


@pytest.fixture(scope="module")
def vocabulary():
    """A byte-level byte-pair tokenizer with a special token and a chat template."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Digits(individual_digits=True),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the model reads the text and the text reads 1234"] * 9, trainer)
    return HubTokenizer(made.to_str(), {"eos_token": "<end>", "chat_template": "{{ messages[0]['content'] }}<end>"})


ROPE = neutral().position
GEMMA = {
    "norm_placement": "both",
    "scale_embeddings": True,
    "activation": "gelu",
    "attention_scale": 32**-0.5,
    "logit_softcap": 4.0,
    "layer_pattern": ("local", "global"),
    "window": 6,
    "tie_embeddings": True,
}
PLAIN = {"mlp": "plain", "norm": "layer", "bias": True, "activation": "gelu", "num_kv_heads": 4, "head_dim": 0}
CHANGES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "head_dim": 0},
    "qwen3": {"qk_norm": True},
    "gemma2": GEMMA | {"attention_softcap": 3.0},
    "gemma3": GEMMA | {"qk_norm": True, "position": dataclasses.replace(ROPE, base=1e6, local_base=1e4)},
    "phi2": PLAIN
    | {"parallel_residual": True, "head_bias": True, "position": dataclasses.replace(ROPE, partial_rotary_factor=0.5)},
    "gpt2": PLAIN | {"tie_embeddings": True, "position": dataclasses.replace(ROPE, kind="learned", max_length=1024)},
    "bert": PLAIN
    | {
        "activation": "gelu_exact",
        "norm_placement": "post",
        "embed_norm": True,
        "type_vocab_size": 2,
        "causal": False,
        "tie_embeddings": True,
        "position": dataclasses.replace(ROPE, kind="learned", max_length=64),
    },
}


def small(arch, vocab_size, **changes):
    """(config, parameters) of a tiny model that an architecture of ggml holds."""
    shape = {"width": 64, "head_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 96}
    config = dataclasses.replace(neutral(), vocab_size=vocab_size, **shape | CHANGES[arch] | changes)
    abstract = checkpoints.abstract_params(Transformer(config))
    draw = np.random.RandomState(0)
    return config, jax.tree.map(lambda w: jnp.asarray(draw.standard_normal(w.shape).astype(np.float32)), abstract)


@pytest.fixture(scope="module", params=gguf_model.ARCHITECTURES)
def written(request, vocabulary, tmp_path_factory):
    """(path, config, parameters) of a file in F32."""
    config, params = small(request.param, vocabulary.vocab_size + 3)
    path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    gguf_model.save(path, config, params, vocabulary, "F32")
    return path, config, params


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
def test_formats_keep_what_they_can(vocabulary, tmp_path, kind, error):
    config, params = small("llama", vocabulary.vocab_size)
    formats = gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, kind)
    assert formats["blk.0.attn_q.weight"] == kind and formats["blk.1.ffn_norm.weight"] == "F32"
    assert formats["token_embd.weight"] == ("Q8_0" if kind.startswith("Q4") else kind)
    _, again, _ = checkpoints.load(tmp_path / "m.gguf")
    for path, weight in trees.flatten(params).items():
        got = trees.flatten(again)[path]
        assert float(abs(got - weight).max()) <= error * float(abs(weight).max()), path


@pytest.mark.parametrize(("scheme", "kind"), [("int8:32", "Q8_0"), ("int4", "Q4_0"), ("int4_affine", "Q4_1")])
def test_codes_go_into_blocks_and_come_back_as_they_are(vocabulary, tmp_path, scheme, kind):
    config, params = small("llama", vocabulary.vocab_size)
    codes = post_training.quantize_params(params, post_training.rules(scheme, "int8:32"), "here")
    formats = gguf_model.save(tmp_path / "m.gguf", config, codes, vocabulary, "F16")
    assert formats["blk.0.attn_q.weight"] == kind and formats["token_embd.weight"] == "Q8_0"
    kept = checkpoints.load(tmp_path / "m.gguf", as_stored=True).params
    assert trees.describe(kept) == trees.describe(codes)
    jax.tree.map(np.testing.assert_array_equal, kept, codes)
    expanded = trees.flatten(checkpoints.load(tmp_path / "m.gguf").params)
    for path, weight in trees.flatten(codes).items():
        np.testing.assert_allclose(expanded[path], weights.dense(weight), rtol=1e-6, atol=1e-7)


def test_layers_in_other_formats_come_one_by_one(vocabulary, tmp_path):
    config, params = small("llama", vocabulary.vocab_size)
    chosen = post_training.rules("int4", "int8:32", ((r"layers/0/mlp/.*", "int8:32"),))
    gguf_model.save(
        tmp_path / "m.gguf", config, post_training.quantize_params(params, chosen, "here"), vocabulary, "F16"
    )
    model, kept, _ = checkpoints.load(tmp_path / "m.gguf", scan_layers=True, as_stored=True)
    assert not model.config.scan_layers and kept["layers"]["0"]["mlp"]["up"].scheme == "int8:32"


def test_codes_that_no_block_holds_are_expanded(vocabulary, tmp_path):
    config, params = small("llama", vocabulary.vocab_size)
    codes = post_training.quantize_params(params, post_training.rules("nf4:32", "int8"), "here")
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
    ],
)
def test_what_an_architecture_cannot_say_is_not_written(vocabulary, tmp_path, arch, change, message):
    config, params = small(arch, vocabulary.vocab_size, **change)
    with pytest.raises(UserError, match=message):
        gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    assert list(tmp_path.iterdir()) == []


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


def llama3(factor=8.0, length=8192, low=1.0, high=4.0):
    return dataclasses.replace(
        ROPE,
        base=500000.0,
        scaling="llama3",
        scaling_factor=factor,
        original_length=length,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def llama31_factors(width, base, factor, length, low, high):
    """rope_freqs.weight as llama.cpp's converter writes it."""
    wavelengths = [2 * math.pi * base ** (i / width) for i in range(0, width, 2)]
    smooth = [(length / w - low) / (high - low) for w in wavelengths]
    turns = zip(wavelengths, smooth, strict=True)
    return [1.0 if w < length / high else factor if w > length / low else 1 / ((1 - s) / factor + s) for w, s in turns]


@pytest.mark.parametrize("position", [llama3(), llama3(32.0), llama3(16.0, 4096, 1.5, 8.0), llama3(2.0, 40)])
@pytest.mark.parametrize("head_dim", [128, 32])
def test_rope_freqs_are_the_llama3_scaling(vocabulary, tmp_path, position, head_dim):
    config, params = small("llama", vocabulary.vocab_size, position=position, head_dim=head_dim, num_layers=1)
    gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F16")
    file = gguf.read(tmp_path / "m.gguf")
    p = position
    expected = llama31_factors(
        head_dim, p.base, p.scaling_factor, p.original_length, p.low_freq_factor, p.high_freq_factor
    )
    tensor = file.tensors["rope_freqs.weight"]
    assert tensor.format == "F32" and tensor.shape == (head_dim // 2,)
    np.testing.assert_allclose(tensor.read()[0], expected, rtol=1e-6)
    assert "llama.rope.scaling.type" not in file.metadata  # which would scale once more
    again = checkpoints.load(tmp_path / "m.gguf")
    assert again.model.config.position == position
    jax.tree.map(np.testing.assert_array_equal, again.params["head"], jax.tree.map(np.float16, params["head"]))


def read_position(file, freqs, **changes):
    file = gguf.GgufFile(file.metadata | {f"llama.rope.{k}": v for k, v in changes.items()}, file.tensors)
    freqs = None if freqs is None else np.array(freqs, np.float32)
    return gguf_model.read_config(file, "file", freqs)[1].position


@pytest.fixture(scope="module")
def plain(vocabulary, tmp_path_factory):
    """The content of a file of a Llama with heads of 32."""
    config, params = small("llama", vocabulary.vocab_size)
    path = tmp_path_factory.mktemp("plain") / "m.gguf"
    gguf_model.save(path, config, params, vocabulary, "F32")
    return gguf.read(path)


@pytest.mark.parametrize(
    "options",
    # Without the original length, as llama.cpp's converter writes them; a few pairs between the bounds, or none.
    [(8.0, 8192, 1.0, 4.0), (8.0, 1000, 1.0, 4.0), (4.0, 300, 2.0, 3.0), (8.0, 100, 1.0, 1.01), (3.0, 60, 0.5, 20.0)],
)
def test_rope_freqs_of_others_give_their_frequencies(plain, options):
    expected = llama31_factors(32, 10000.0, *options)
    position = read_position(plain, expected)
    unscaled = rope.frequencies(dataclasses.replace(position, scaling="none"), 32, None)
    np.testing.assert_allclose(rope.frequencies(position, 32, None), unscaled / np.float32(expected), rtol=2e-5)


def test_rope_freqs_that_are_no_scaling_are_refused(plain):
    assert read_position(plain, [1.0] * 16).scaling == "none"
    for freqs, message in (
        ([1.0, 8.0] * 8, "rope_freqs.weight is not the llama3 scaling"),
        ([0.5] * 16, "expected at least 1"),
        ([1.0] * 15 + [8.0] * 5, "rope_freqs.weight has 20 values for heads of 32"),
    ):
        with pytest.raises(UserError, match=message):
            read_position(plain, freqs)
    with pytest.raises(UserError, match="beside rope scaling 'linear'"):
        read_position(plain, [1.0] * 12 + [8.0] * 4, **{"scaling.factor": 2.0})
    with pytest.raises(UserError, match="rope_freqs.weight in a qwen3 is not supported"):
        qwen = {k.replace("llama", "qwen3"): v for k, v in plain.metadata.items()} | {"general.architecture": "qwen3"}
        gguf_model.read_config(gguf.GgufFile(qwen, plain.tensors), "file", np.ones(16, np.float32))


@pytest.mark.parametrize(
    ("keys", "scaling", "factor"),
    [
        ({"scaling.factor": 4.0}, "linear", 4.0),  # without a type, as in llama.cpp
        ({"scale_linear": 4.0}, "linear", 4.0),  # the key of older files
        ({"scaling.type": "none", "scaling.factor": 4.0}, "none", 1.0),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, "none", 1.0),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, "none", 1.0),
        ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}, "yarn", 4.0),
    ],
)
def test_rope_scaling_is_read_as_llama_cpp_reads_it(plain, keys, scaling, factor):
    position = read_position(plain, None, **keys)
    assert (position.scaling, position.scaling_factor) == (scaling, factor)


def test_keys_that_change_nothing_are_accepted_with_that_value_only(plain):
    expected = gguf_model.read_config(plain, "file")[1]
    for key, neutral_value, other in (
        ("rope.scaling.attn_factor", 1.0, 1.5),
        ("rope.scaling.yarn_beta_fast", 32.0, 16.0),
        ("expert_count", 0, 8),
        ("expert_used_count", 0, 2),
        ("tensor_data_layout", "Meta AI original pth", "transposed"),
        ("attention.causal", True, False),
        ("logit_scale", 1.0, 0.5),
        ("attention.head_count_kv", [2, 2], [2, 1]),
    ):
        changed = gguf.GgufFile(plain.metadata | {f"llama.{key}": neutral_value}, plain.tensors)
        assert gguf_model.read_config(changed, "file")[1] == expected, key
        with pytest.raises(UserError, match=f"llama.{key}=.* is not supported|num_kv_heads"):
            gguf_model.read_config(gguf.GgufFile(plain.metadata | {f"llama.{key}": other}, plain.tensors), "file")
    pooled = gguf.GgufFile(plain.metadata | {"llama.pooling_type": 3}, plain.tensors)
    assert gguf_model.read_config(pooled, "file")[1] == expected


def split(file, directory, count=3):
    """Writes a file in parts, as llama-gguf-split does; their paths."""
    names, paths = list(file.tensors), []
    for i in range(count):
        part = {name: file.tensors[name] for name in names[i::count]}
        keys = {"split.no": np.uint16(i), "split.count": np.uint16(count), "split.tensors.count": np.int32(len(names))}
        paths.append(directory / f"m-{i + 1:05d}-of-{count:05d}.gguf")
        described = {name: (t.shape, t.format) for name, t in part.items()}
        values = (t.read().reshape(t.shape) for t in part.values())
        gguf.write(paths[-1], (file.metadata if i == 0 else {}) | keys, described, values)
    return paths


def test_a_split_model_is_read_through_its_first_part(plain, tmp_path):
    paths = split(plain, tmp_path)
    whole = gguf.read(paths[0])
    assert whole.metadata == plain.metadata and whole.tensors.keys() == plain.tensors.keys()
    for name, tensor in plain.tensors.items():
        np.testing.assert_array_equal(whole.tensors[name].read(), tensor.read())
    params = checkpoints.load(paths[0]).params
    np.testing.assert_array_equal(params["final_norm"]["scale"], plain.tensors["output_norm.weight"].read()[0])
    with pytest.raises(UserError, match=r"part 2 of 3; open the first one, m-00001-of-00003\.gguf"):
        gguf.read(paths[1])
    paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match="one of 3 parts; expected a name that ends in -00001-of-00003.gguf"):
        gguf.read(tmp_path / "renamed.gguf")


def test_missing_and_mixed_parts_are_named(plain, tmp_path):
    paths = split(plain, tmp_path)
    content = paths[2].read_bytes()
    paths[2].unlink()
    with pytest.raises(UserError, match=r"1 of 3 parts are missing: m-00003-of-00003\.gguf$"):
        gguf.read(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(UserError, match="m-00003-of-00003.gguf: not part 3 of 3 of m-00001-of-00003.gguf"):
        gguf.read(paths[0])
    paths[2].write_bytes(content)
    names = list(plain.tensors)
    keys = {"split.no": 2, "split.count": 3, "split.tensors.count": len(names)}
    described = {name: (plain.tensors[name].shape, "F32") for name in (names[0], *names[2::3])}
    values = (plain.tensors[name].read().reshape(shape) for name, (shape, _) in described.items())
    gguf.write(tmp_path / "other", keys, described, values)
    (tmp_path / "other").replace(paths[2])
    with pytest.raises(UserError, match=f"the tensor '{names[0]}' is in another part, too"):
        gguf.read(paths[0])
    described.pop(names[0]), described.pop(names[2])
    paths[2].unlink()
    gguf.write(
        paths[2], keys, described, (plain.tensors[name].read().reshape(shape) for name, (shape, _) in described.items())
    )
    with pytest.raises(
        UserError, match=f"its parts have {len(names) - 1} tensors; split.tensors.count is {len(names)}"
    ):
        gguf.read(paths[0])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"])
def test_blocks_that_are_only_read_are_the_weights_of_a_model(plain, tmp_path, kind):
    block, draw = blocks.FORMATS[kind], np.random.RandomState(0)
    shape = (plain.tensors["token_embd.weight"].shape[0], 256)
    rows = draw.randint(0, 60, (shape[0], 256 // block.numbers * block.size)).astype(np.uint8)
    gguf.write(tmp_path / "m.gguf", {"general.architecture": "llama"}, {"token_embd.weight": (shape, kind)}, [rows])
    tensor = gguf.read(tmp_path / "m.gguf").tensors["token_embd.weight"]
    assert (tensor.shape, tensor.format) == (shape, kind)
    np.testing.assert_array_equal(tensor.read(slice(1, 3)), blocks.decode(kind, rows)[1:3])


def test_a_type_that_is_not_read_is_named(header):
    with pytest.raises(UserError, match=r"is of type 34 \(TQ1_0\); expected one of F32, F16"):
        gguf.read(header(counts=(1, 0), tensors=tensor(code=34)))


def test_what_exists_is_not_overwritten(written, vocabulary):
    path, config, params = written
    with pytest.raises(UserError, match="exists; give another"):
        gguf_model.save(path, config, params, vocabulary, "F32")


@pytest.fixture
def header(tmp_path):
    """header(metadata bytes, tensor bytes, counts) -> the path of a file made of them."""

    def make(pairs=b"", tensors=b"", counts=(0, 0), magic=b"GGUF", version=3, rest=b"\0" * 64):
        path = tmp_path / "made.gguf"
        path.write_bytes(magic + struct.pack("<IQQ", version, *counts) + pairs + tensors + rest)
        return path

    return make


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name="t", dims=(32,), code=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"magic": b"GGML"}, "does not begin with 'GGUF'"),
        ({"version": 1}, "GGUF version 1; expected 2 or 3"),
        ({"counts": (2**60, 0)}, "tensors and 0 metadata keys cannot be in"),
        ({"counts": (0, 2**62)}, "metadata keys cannot be in"),
        ({"counts": (0, 1), "pairs": struct.pack("<Q", 2**61)}, "a key of 2,305,843,009,213,693,952 bytes goes past"),
        ({"counts": (0, 1), "pairs": text("k") + struct.pack("<I", 77)}, "a value of type 77, which is unknown"),
        ({"counts": (0, 1), "pairs": text("k") + struct.pack("<IIQ", 9, 4, 2**61)}, "an array of .* goes past the end"),
        ({"counts": (0, 1), "pairs": text("k") + struct.pack("<IIQ", 9, 8, 2**59)}, "an array of .* goes past the end"),
        ({"counts": (0, 1), "pairs": text("k") + struct.pack("<IIQIQIQ", 9, 9, 1, 9, 1, 9, 1)}, "nested too deep"),
        ({"counts": (0, 2), "pairs": 2 * (text("k") + struct.pack("<IB", 0, 1))}, "the key 'k' appears twice"),
        ({"counts": (0, 1), "pairs": text("general.alignment") + struct.pack("<II", 4, 3)}, "expected a power of two"),
        ({"counts": (2, 0), "tensors": tensor() * 2}, "the tensor 't' appears twice"),
        ({"counts": (1, 0), "tensors": tensor(dims=(2**40, 2**40))}, "goes past the end of the file"),
        ({"counts": (1, 0), "tensors": tensor(dims=(1,) * 9)}, "has 9 dimensions"),
        ({"counts": (1, 0), "tensors": tensor(dims=(0,))}, "do not fit blocks"),
        ({"counts": (1, 0), "tensors": tensor(dims=(31,), code=2)}, "do not fit blocks"),
        ({"counts": (1, 0), "tensors": tensor(code=99)}, "is of type 99; expected one of F32, F16"),
        ({"counts": (1, 0), "tensors": tensor(offset=2**62)}, "goes past the end of the file"),
        ({"counts": (1, 0), "tensors": tensor(offset=7)}, "do not fit blocks"),
    ],
)
def test_headers_that_lie_are_refused(header, made, message):
    with pytest.raises(UserError, match=message):
        gguf.read(header(**made))


def test_an_empty_file_and_a_missing_one_are_refused(tmp_path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="not a GGUF file"):
        gguf.read(tmp_path / "empty.gguf")
    with pytest.raises(UserError, match="cannot be read"):
        gguf.read(tmp_path / "none.gguf")


def test_mutated_and_truncated_files_end_in_clear_errors(written, tmp_path):
    whole = written[0].read_bytes()
    draw, path = np.random.default_rng(0), tmp_path / "damaged.gguf"
    for _ in range(100):
        damaged = bytearray(whole[: draw.integers(1, len(whole))] if draw.random() < 0.3 else whole)
        for place in draw.integers(0, min(len(damaged), 12000), draw.integers(1, 6)):
            damaged[place] = draw.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            file = gguf.read(path)
            gguf_model.read_config(file, str(path))
            HubTokenizer.from_gguf(file.metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "general.architecture is 'mamba'; expected one of llama, qwen2, qwen3, gemma2",
        ),
        ({"llama.block_count": 3}, r"(?s)- blk.2.attn_k.weight"),
        ({"llama.block_count": "two"}, "'model.num_layers' is 'two'"),
        ({"llama.attention.head_count": 5}, "does not divide"),
        ({"tokenizer.ggml.model": "t5"}, "is 't5'; expected 'gpt2'"),
        ({"tokenizer.ggml.model": "llama"}, "scores and token_type are needed for a vocabulary of the kind 'llama'"),
        ({"tokenizer.ggml.pre": "other"}, "pre is 'other'; expected one of"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "a merge of tokens that the vocabulary lacks"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "or a token occurs twice"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
    ],
)
def test_what_a_sound_file_says_wrongly_is_named(vocabulary, tmp_path, change, message):
    config, params = small("llama", vocabulary.vocab_size)
    gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    file = gguf.read(tmp_path / "m.gguf")
    tensors = {name: (t.shape, t.format) for name, t in file.tensors.items()}
    values = (t.read().reshape(t.shape) for t in file.tensors.values())
    gguf.write(tmp_path / "n.gguf", file.metadata | change, tensors, values)
    with pytest.raises(UserError, match=message):
        checkpoints.load(tmp_path / "n.gguf")


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
def test_a_model_that_a_file_cannot_hold_is_not_written(vocabulary, tmp_path, change, message):
    config, _ = small("llama", vocabulary.vocab_size)
    config = dataclasses.replace(config, **change)
    params = jax.tree.map(lambda w: np.zeros(w.shape, w.dtype), checkpoints.abstract_params(Transformer(config)))
    with pytest.raises(UserError, match=message):
        gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.scaling.alpha": 4.0}, "llama.rope.scaling.alpha=4.0 is not supported"),
        ({"llama.attention.causal": False}, "llama.attention.causal=False is not supported"),
        ({"llama.attention.layer_norm_rms_epsilon": "abc"}, "the metadata are inconsistent"),
        ({"general.architecture": ["llama"]}, "general.architecture is"),
        ({"tokenizer.ggml.pre": ["a"]}, "tokenizer.ggml.pre is"),
        ({"tokenizer.ggml.model": ["a"]}, "tokenizer.ggml.model is"),
        ({"tokenizer.ggml.merges": [1, 2]}, "the vocabulary in the metadata is malformed"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens that the vocabulary lacks"),
        ({"tokenizer.ggml.token_type": 5}, "the vocabulary in the metadata is malformed"),
    ],
)
def test_metadata_that_are_not_known_or_of_another_type_are_refused(vocabulary, tmp_path, change, message):
    config, params = small("llama", vocabulary.vocab_size)
    gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    file = gguf.read(tmp_path / "m.gguf")
    changed = gguf.GgufFile(file.metadata | change, file.tensors)
    with pytest.raises(UserError, match=message):
        gguf_model.read_config(changed, "file")
        HubTokenizer.from_gguf(changed.metadata)


def test_a_part_of_the_head_that_is_turned_is_read(vocabulary, tmp_path):
    config, params = small("llama", vocabulary.vocab_size)
    gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    file = gguf.read(tmp_path / "m.gguf")
    half = gguf.GgufFile(file.metadata | {"llama.rope.dimension_count": 16}, file.tensors)
    assert gguf_model.read_config(half, "file")[1].position.partial_rotary_factor == 0.5


def test_other_names_of_a_splitting_and_none_at_all(vocabulary):
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
