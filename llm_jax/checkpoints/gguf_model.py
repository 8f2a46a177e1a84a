"""Models in GGUF files, of the architectures in `gguf_config.ARCHITECTURES`; reading and writing."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax import tokenizers, trees, weights
from llm_jax.checkpoints import assemble, generation_config, gguf, gguf_blocks, gguf_rope, names
from llm_jax.checkpoints.checkpoint import (
    Checkpoint,
    Shardings,
    abstract_params,
    check_geometry,
    check_vocabulary,
    convert_layout,
)
from llm_jax.checkpoints.families import check_round_trip
from llm_jax.checkpoints.gguf_config import ARCHITECTURES, architecture, metadata, read_config
from llm_jax.errors import UserError
from llm_jax.kernels import blocks
from llm_jax.model import positions
from llm_jax.model.transformer import Transformer
from llm_jax.schema import ModelConfig
from llm_jax.tokenizers import PretrainedTokenizer, Tokenizer
from llm_jax.weights import QTensor


class Gguf(Checkpoint):
    """A .gguf file of an architecture in `ARCHITECTURES`."""

    form = "gguf"

    @functools.cached_property
    def file(self) -> gguf.GgufFile:
        return gguf.read(self.path)

    @functools.cached_property
    def _config(self) -> tuple[str, ModelConfig]:
        return read_config(self.file, str(self.path))

    @property
    def config(self) -> ModelConfig:
        return self._config[1]

    @property
    def family(self) -> str:
        return self._config[0]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = tokenizers.from_gguf(self.file.metadata)
        check_vocabulary(tokenizer, self.config, self.path)
        return tokenizer

    @property
    def generation_config_path(self) -> pathlib.Path:
        return self.path

    @property
    def generation_config(self) -> dict[str, Any]:
        return generation_config.from_gguf(self.file.metadata)

    def params(self, config: ModelConfig, shardings: Shardings, as_stored: bool = False) -> dict[str, Any]:
        check_geometry(self.config, config, self.name)
        layout = dataclasses.replace(config, scan_layers=config.scan_layers and not as_stored)
        abstract = abstract_params(Transformer(layout))
        params = load_params(self.path, self.file, self.config, abstract, shardings, as_stored)
        return convert_layout(params, config, shardings, as_stored) if as_stored else params


class _Tensors:
    """The tensors of a file, with the halves of heads in queries and keys not interleaved."""

    def __init__(self, label: str, file: gguf.GgufFile, heads: Mapping[str, int]):
        self.label, self.file, self.heads = label, file, heads
        self.shapes = {name: tensor.shape for name, tensor in file.tensors.items()}

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        tensor = self.file.tensors[name]
        if len(tensor.shape) == 1:
            return tensor.read()[0][slices[0]]
        return tensor.read(self._rows(name)[slices[0]])[:, slices[1]]

    def as_stored(self, spec: names.TensorSpec) -> QTensor | None:
        """A tensor with its codes, or None if no quantization scheme equals its format."""
        tensor = self.file.tensors[spec.name]
        if tensor.format not in gguf_blocks.READABLE or len(tensor.shape) != 2 or spec.part[1] > 1:
            return None
        return gguf_blocks.from_rows(tensor.format, tensor.rows(self._rows(spec.name)), spec.transposed)

    def _rows(self, name: str) -> np.ndarray:
        """The row of the file for every row of the parameter."""
        rows, heads = self.file.tensors[name].shape[0], self.heads.get(name.split(".")[-2])
        return _interleaved(rows, heads) if heads else np.arange(rows)


def _interleaved(rows: int, heads: int) -> np.ndarray:
    """The row of the file for every row of the parameter.

    In a head, the parameter has the first entries of all rotary pairs, then the second ones; the file has pair by pair.
    """
    return np.arange(rows).reshape(heads, -1, 2).transpose(0, 2, 1).reshape(-1)


def load_params(
    path: pathlib.Path,
    file: gguf.GgufFile,
    config: ModelConfig,
    abstract: Any,
    shardings: Shardings,
    as_stored: bool = False,
) -> dict[str, Any]:
    """The parameters of a file. Raises UserError: see `assemble.load`.

    Args:
      config: of the file's model.
      abstract: shapes and dtypes of the parameters, in any layout.
      shardings: abstract parameters -> their shardings.
      as_stored: return tensors in the formats `gguf_blocks.READABLE` as QTensors on the default device instead of
        expanding them; needs one entry per layer.
    """
    source = _Tensors(str(path), file, _heads(file.metadata["general.architecture"], config))
    encoder = ARCHITECTURES[file.metadata["general.architecture"]].encoder
    specs = assemble.specs(names.gguf("blk.0.attn_qkv.weight" in file.tensors, encoder), abstract)
    node = source.as_stored if as_stored else None
    return assemble.load(source, specs, abstract, shardings, lambda name: name == gguf_rope.TENSOR, node)


def _heads(arch: str, config: ModelConfig) -> dict[str, int]:
    return {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if ARCHITECTURES[arch].interleaved else {}


def save(
    path: pathlib.Path,
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    format: str,
    other_metadata: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Writes a file that llama.cpp loads.

    Args:
      params: one entry per layer. BERT's pooler is left out: such files have none.
      format: of matrices: F32, F16, BF16, Q8_0, Q4_0 or Q4_1. Rows that its blocks do not divide are written in F16,
        norms and biases in F32, and the embeddings and the head of a 4-bit file in Q8_0. Quantized weights that a
        block format holds without a change keep their codes.
      other_metadata: entries besides those of the model and the tokenizer.

    Returns:
      {tensor name: format}.

    Raises:
      UserError: the file exists, no architecture holds the model, or the tokenizer is of another kind.
    """
    if path.exists():
        raise UserError(f"--output={path} already exists; choose another path, or remove it")
    if format not in blocks.FORMATS or blocks.FORMATS[format].encode is None:
        raise UserError(f"--format={format} cannot be written; expected one of F32, F16, BF16, Q8_0, Q4_0, Q4_1")
    arch, json_config = architecture(config)
    encoder = ARCHITECTURES[arch].encoder
    flat = trees.flatten(weights.in_rows(params))
    flat = {path: weight for path, weight in flat.items() if not path.startswith("pooler/")}
    config = dataclasses.replace(config, pooler=False)
    parts = assemble.by_tensor(assemble.specs(names.gguf(ARCHITECTURES[arch].fused, encoder), trees.unflatten(flat)))
    heads = _heads(arch, config)
    kept_formats = {name: _kept_format([(spec, flat[path]) for spec, path in part]) for name, part in parts.items()}

    rotated = round(positions.head_dim(config) * config.position.partial_rotary_factor)
    rope_freqs = gguf_rope.factors(config.position, rotated) if config.position.scaling == "llama3" else None

    def values(name: str) -> np.ndarray:
        if name == gguf_rope.TENSOR:
            assert rope_freqs is not None
            return rope_freqs
        if kept_formats[name]:
            array = gguf_blocks.to_rows(flat[parts[name][0][1]])
        else:
            array = assemble.stored_tensor([(spec, weights.dense(flat[path])) for spec, path in parts[name]])
        if count := heads.get(name.split(".")[-2]):
            order = np.empty(array.shape[0], np.int64)
            order[_interleaved(array.shape[0], count)] = np.arange(array.shape[0])
            array = array[order]
        return array

    def chosen_format(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1:
            return "F32"
        if kept_formats[name]:
            return kept_formats[name]
        finer = format.startswith("Q4") and name in ("token_embd.weight", "output.weight")
        preferred = "Q8_0" if finer else format
        return preferred if shape[-1] % blocks.FORMATS[preferred].numbers == 0 else "F16"

    shapes = {name: assemble.stored_shape(part[0][0], flat[part[0][1]].shape) for name, part in parts.items()}
    if rope_freqs is not None:
        shapes[gguf_rope.TENSOR] = rope_freqs.shape
    tensors = {name: (shape, chosen_format(name, shape)) for name, shape in shapes.items()}
    entries = metadata(arch, json_config, config) | _vocabulary(tokenizer, config.vocab_size)
    entries |= other_metadata or {}
    described = {name: gguf.GgufTensor(shape, stored_as, path, 0) for name, (shape, stored_as) in tensors.items()}
    read_back = read_config(gguf.GgufFile(entries, described), "the file to be written", rope_freqs)[1]
    check_round_trip(f"a GGUF file of a {arch}", dataclasses.replace(config, head_dim=read_back.head_dim), read_back)
    gguf.write(path, entries, tensors, (values(name) for name in tensors))
    return {name: stored_as for name, (_, stored_as) in tensors.items()}


def _kept_format(parts: list[tuple[names.TensorSpec, Any]]) -> str:
    """The block format that holds a weight without a change, or ""."""
    (spec, weight), *others = parts
    if others or not isinstance(weight, weights.QTensor):
        return ""
    return gguf_blocks.block_format(weight, spec.transposed) or ""


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise UserError(
            f"GGUF files hold no vocabulary of tokenizer.kind={tokenizer.kind}; expected bpe or byte_bpe, or a "
            "pretrained one (hub, sentencepiece)"
        )
    return tokenizer.to_gguf(vocab_size)
