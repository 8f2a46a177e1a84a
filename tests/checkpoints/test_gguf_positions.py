"""Positions in GGUF files: the llama3 scaling as rope_freqs.weight, other scalings, and partly rotated heads."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from llm_jax import checkpoints
from llm_jax.checkpoints import gguf, gguf_model
from llm_jax.errors import UserError
from llm_jax.model import rope
from tests.checkpoints.gguf_cases import llama3, small


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


@pytest.mark.parametrize(
    "options",
    # Without the original length, as llama.cpp's converter writes them; a few pairs between the bounds, or none.
    [(8.0, 8192, 1.0, 4.0), (8.0, 1000, 1.0, 4.0), (4.0, 300, 2.0, 3.0), (8.0, 100, 1.0, 1.01), (3.0, 60, 0.5, 20.0)],
)
def test_rope_freqs_of_other_software_give_their_frequencies(plain, options):
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
    with pytest.raises(UserError, match="together with rope scaling 'linear'"):
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


def test_partial_rotation_of_heads_is_read(vocabulary, tmp_path):
    config, params = small("llama", vocabulary.vocab_size)
    gguf_model.save(tmp_path / "m.gguf", config, params, vocabulary, "F32")
    file = gguf.read(tmp_path / "m.gguf")
    half = gguf.GgufFile(file.metadata | {"llama.rope.dimension_count": 16}, file.tensors)
    assert gguf_model.read_config(half, "file")[1].position.partial_rotary_factor == 0.5
