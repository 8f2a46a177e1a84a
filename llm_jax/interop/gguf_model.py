"""Models in GGUF files: ggml's llama, qwen2 and qwen3 architectures, in and out."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax import trees, weights
from llm_jax.config import ModelConfig
from llm_jax.errors import UserError
from llm_jax.interop import assemble, gguf, gguf_blocks, names
from llm_jax.interop.families import model_config, refuse_difference, their_config
from llm_jax.kernels import blocks
from llm_jax.model import positions
from llm_jax.quantized import QTensor
from llm_jax.tokenizers import Foreign

# Architecture -> whether queries and keys are stored with the halves of a head interleaved.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}
# Keys below the architecture's name -> keys of a Hugging Face config.json.
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
# Keys that are read otherwise, or that say nothing about the numbers.
_OTHER_KEYS = (
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)


def read_config(file: gguf.File, what: str) -> tuple[str, ModelConfig]:
    """(architecture, the model's config) of a file. Raises UserError for what is missing or not known."""
    try:
        return _read_config(file, what)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what}: its metadata make no sense ({error})") from error


def _read_config(file: gguf.File, what: str) -> tuple[str, ModelConfig]:
    said = file.metadata
    arch = said.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UserError(f"{what}: general.architecture is {arch!r}; expected one of {', '.join(ARCHITECTURES)}")
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise UserError(f"{what}: the tensor token_embd.weight is missing")
    c: dict[str, Any] = {theirs: said[f"{arch}.{key}"] for key, theirs in _KEYS.items() if f"{arch}.{key}" in said}
    for key in ("rms_norm_eps", "rope_theta"):
        if key in c:
            c[key] = _shortest(c[key])
    known = {f"{arch}.{key}" for key in (*_KEYS, *_OTHER_KEYS)}
    if unknown := [key for key in said if key.startswith(f"{arch}.") and key not in known]:
        raise UserError(f"{what}: {unknown[0]}={said[unknown[0]]!r} is not known here")
    width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    if said.get(f"{arch}.attention.value_length", width) != width:
        raise UserError(f"{what}: values of another width than keys are not supported")
    c["partial_rotary_factor"] = said.get(f"{arch}.rope.dimension_count", width) / width
    c |= {"model_type": arch, "vocab_size": table.shape[0], "tie_word_embeddings": "output.weight" not in file.tensors}
    scaling = said.get(f"{arch}.rope.scaling.type", "none")
    if scaling in ("linear", "yarn"):
        c["rope_scaling"] = {
            "rope_type": scaling,
            "factor": said.get(f"{arch}.rope.scaling.factor", 1.0),
            "original_max_position_embeddings": said.get(f"{arch}.rope.scaling.original_context_length"),
        }
    elif scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise UserError(f"{what}: rope scaling {scaling!r} (or rope_freqs.weight) is not read from GGUF files")
    try:
        return arch, model_config(c)[1]
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


class _Tensors:
    """The tensors of a file, with the rows of queries and keys in our order."""

    def __init__(self, what: str, file: gguf.File, heads: Mapping[str, int]):
        self.what, self.file, self.heads = what, file, heads
        self.shapes = {name: tensor.shape for name, tensor in file.tensors.items()}

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        tensor = self.file.tensors[name]
        if len(tensor.shape) == 1:
            return tensor.read()[0][slices[0]]
        return tensor.read(self._rows(name)[slices[0]])[:, slices[1]]

    def as_stored(self, their: names.Their) -> QTensor | None:
        """A tensor with its codes, or None where no scheme of ours corresponds."""
        tensor = self.file.tensors[their.name]
        if tensor.format not in gguf_blocks.SCHEMES or len(tensor.shape) != 2:
            return None
        return gguf_blocks.from_rows(tensor.format, tensor.rows(self._rows(their.name)), their.turned)

    def _rows(self, name: str) -> np.ndarray:
        """Our row -> their row."""
        rows, heads = self.file.tensors[name].shape[0], self.heads.get(name.split(".")[-2])
        return _interleaved(rows, heads) if heads else np.arange(rows)


def _interleaved(rows: int, heads: int) -> np.ndarray:
    """Our row -> their row: in a head, ours are the first of all pairs, then the second; theirs pair by pair."""
    return np.arange(rows).reshape(heads, -1, 2).transpose(0, 2, 1).reshape(-1)


def load_params(
    path: pathlib.Path, file: gguf.File, config: ModelConfig, abstract: Any, shardings: Any, as_stored: bool = False
) -> Any:
    """The parameters of a file, expanded. Raises UserError: see `assemble.load`.

    Args:
      as_stored: tensors in Q8_0, Q4_0 and Q4_1 are not expanded but come as QTensors, on one device.
    """
    source = _Tensors(str(path), file, _heads(file.metadata["general.architecture"], config))
    wanted = assemble.names(names.GGUF, abstract)
    node = source.as_stored if as_stored else None
    return assemble.load(source, wanted, abstract, shardings, lambda name: False, node)


def _heads(arch: str, config: ModelConfig) -> dict[str, int]:
    return {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if ARCHITECTURES[arch] else {}


def save(path: pathlib.Path, config: ModelConfig, params: Any, tokenizer: Any, kind: str) -> dict[str, str]:
    """Writes a file that llama.cpp loads; returns {tensor: format}.

    Args:
      params: one entry per layer.
      kind: the format of matrices, "F32", "F16", "Q8_0", "Q4_0" or "Q4_1"; rows that its blocks do not
        divide stay F16, norms and biases F32, and the embeddings of a 4-bit file Q8_0. Weights whose codes
        a block format holds as they are keep them.

    Raises:
      UserError: the file exists, no architecture holds the model, or the tokenizer is not of its kind.
    """
    if path.exists():
        raise UserError(f"--output={path} exists; give another, or remove it")
    if kind not in blocks.FORMATS or blocks.FORMATS[kind].encode is None:
        raise UserError(f"--format={kind} cannot be written; expected one of F32, F16, BF16, Q8_0, Q4_0, Q4_1")
    arch, said = _architecture(config)
    parts = assemble.by_tensor(assemble.names(names.GGUF, params))
    flat = trees.flatten(params)
    heads = _heads(arch, config)
    kept = {name: _as_stored([(their, flat[ours]) for their, ours in of]) for name, of in parts.items()}

    def values(name: str) -> np.ndarray:
        if kept[name]:
            array = gguf_blocks.to_rows(flat[parts[name][0][1]])
        else:
            array = assemble.theirs([(their, weights.dense(flat[ours])) for their, ours in parts[name]])
        if count := heads.get(name.split(".")[-2]):
            order = np.empty(array.shape[0], np.int64)
            order[_interleaved(array.shape[0], count)] = np.arange(array.shape[0])
            array = array[order]
        return array

    def stored(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1:
            return "F32"
        if kept[name]:
            return kept[name]
        wanted = "Q8_0" if kind.startswith("Q4") and name in ("token_embd.weight", "output.weight") else kind
        return wanted if shape[-1] % blocks.FORMATS[wanted].numbers == 0 else "F16"

    shapes = {name: _shape(of, flat) for name, of in parts.items()}
    tensors = {name: (shape, stored(name, shape)) for name, shape in shapes.items()}
    metadata = _metadata(arch, said, config) | _vocabulary(tokenizer, config.vocab_size)
    described = {name: gguf.Tensor(shape, stored_as, path, 0) for name, (shape, stored_as) in tensors.items()}
    again = read_config(gguf.File(metadata, described), "what would be written")[1]
    refuse_difference(f"a GGUF file of a {arch}", dataclasses.replace(config, head_width=again.head_width), again)
    gguf.write(path, metadata, tensors, (values(name) for name in tensors))
    return {name: stored_as for name, (_, stored_as) in tensors.items()}


def _as_stored(parts: list[tuple[names.Their, Any]]) -> str:
    """The block format that holds a weight as it is, or ""."""
    (their, weight), *others = parts
    if others or not isinstance(weight, QTensor):
        return ""
    return gguf_blocks.corresponding(weight, their.turned) or ""


def _shape(parts: list[Any], flat: Mapping[str, Any]) -> tuple[int, ...]:
    their, ours = parts[0]
    shape = flat[ours].shape
    return shape[::-1] if their.turned else shape


def _architecture(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    reasons = []
    for arch in ARCHITECTURES:
        try:
            return arch, their_config(arch, config)
        except UserError as error:
            reasons.append(str(error))
    raise UserError("no GGUF architecture written here holds this model: " + "; ".join(reasons))


def _metadata(arch: str, said: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    p = config.position
    if p.scaling not in ("none", "linear", "yarn") or "local" in config.layer_pattern:
        raise UserError(f"rope scaling {p.scaling} and sliding windows are not written to GGUF files")
    width = positions.head_width(config)
    found = {f"{arch}.{key}": said[theirs] for key, theirs in _KEYS.items() if theirs in said}
    found |= {f"{arch}.rope.dimension_count": width, f"{arch}.vocab_size": config.vocab_size}
    found |= {f"{arch}.attention.key_length": width, f"{arch}.attention.value_length": width}
    if p.scaling != "none":
        found |= {f"{arch}.rope.scaling.type": p.scaling, f"{arch}.rope.scaling.factor": p.factor}
        if p.original_length:
            found[f"{arch}.rope.scaling.original_context_length"] = p.original_length
    return {"general.architecture": arch, "general.name": arch, "general.alignment": 32} | found


def _vocabulary(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    if not isinstance(tokenizer, Foreign):
        raise UserError(f"GGUF files hold vocabularies of tokenizer.kind=hub or sentencepiece, not {tokenizer.kind}")
    return tokenizer.to_gguf(vocab_size)


def _shortest(value: float) -> float:
    """The number that was meant by a float32 of a file: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
