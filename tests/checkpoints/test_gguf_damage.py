"""Damaged, inconsistent and split GGUF files: each ends in one clear error."""

import contextlib
import struct

import numpy as np
import pytest

from llm_jax import checkpoints
from llm_jax.checkpoints import gguf, gguf_model
from llm_jax.errors import UserError
from llm_jax.tokenizers.hub import HubTokenizer
from tests.checkpoints.gguf_cases import small


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
def test_inconsistent_headers_are_rejected(header, made, message):
    with pytest.raises(UserError, match=message):
        gguf.read(header(**made))


def test_a_type_that_is_not_read_is_named(header):
    with pytest.raises(UserError, match=r"is of type 34 \(TQ1_0\); expected one of F32, F16"):
        gguf.read(header(counts=(1, 0), tensors=tensor(code=34)))


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
        ({"tokenizer.ggml.model": "rwkv"}, "is 'rwkv'; expected 'gpt2'"),
        ({"tokenizer.ggml.model": "t5"}, "scores and token_type are needed for a vocabulary of the kind 't5'"),
        ({"tokenizer.ggml.model": "llama"}, "scores and token_type are needed for a vocabulary of the kind 'llama'"),
        ({"tokenizer.ggml.pre": "other"}, "pre is 'other'; expected one of"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "a merge of tokens that the vocabulary lacks"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "or a token occurs twice"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
    ],
)
def test_wrong_metadata_in_an_intact_file_is_named(vocabulary, tmp_path, change, message):
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
    with pytest.raises(UserError, match=f"the tensor '{names[0]}' is also in another part"):
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
