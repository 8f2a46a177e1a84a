"""Models in GGUF files, in and out: those of ggml's architectures that are named in `ARCHITECTURES`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax import trees, weights
from llm_jax.checkpoints import assemble, gguf, gguf_blocks, names
from llm_jax.checkpoints.families import model_config, refuse_difference, their_config
from llm_jax.errors import UserError
from llm_jax.kernels import blocks
from llm_jax.model import positions, stages
from llm_jax.schema import ModelConfig
from llm_jax.tokenizers import Foreign
from llm_jax.weights import QTensor

_SIZES = {
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
_PHI = {"attention.layer_norm_epsilon": "layer_norm_eps"} | {
    key: theirs
    for key, theirs in _SIZES.items()
    if key not in ("attention.layer_norm_rms_epsilon", "attention.key_length")
}
_GPT2 = {
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "context_length": "n_positions",
}
_GEMMA = _SIZES | {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One of ggml's architectures (llama.cpp's src/models).

    Attributes:
      kind: the family of Hugging Face whose config.json says the same.
      keys: below the architecture's name in the metadata -> in that config.json.
      interleaved: queries and keys are stored with the halves of a head interleaved.
      free_heads: the width of a head may be another than width / heads.
      fused: queries, keys and values are written as one tensor. (Either form is read.)
      every: which layers see all of the text where others see a window: each n-th. 0: no windows.
      largest: the number of layers of the one model whose scores are scaled by the width / heads.
    """

    kind: str
    keys: Mapping[str, str]
    interleaved: bool = False
    free_heads: bool = True
    fused: bool = False
    every: int = 0
    largest: int = 0


ARCHITECTURES = {
    "llama": Architecture("llama", _SIZES, interleaved=True),
    "qwen2": Architecture("qwen2", _SIZES, free_heads=False),
    "qwen3": Architecture("qwen3", _SIZES),
    "gemma2": Architecture("gemma2", _GEMMA, every=2, largest=46),
    "gemma3": Architecture("gemma3_text", _GEMMA | {"rope.freq_base_swa": "rope_local_base_freq"}, every=6, largest=62),
    "phi2": Architecture("phi", _PHI, free_heads=False),
    "gpt2": Architecture("gpt2", _GPT2, free_heads=False, fused=True),
}
_PATTERN = "attention.sliding_window_pattern"
# Keys that are read otherwise, or that say nothing about the numbers.
_OTHER_KEYS = (
    "vocab_size",
    "attention.value_length",
    "attention.head_count_kv",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)


def read_config(file: gguf.File, what: str) -> tuple[str, ModelConfig]:
    """(family, the model's config) of a file. Raises UserError for what is missing or not known."""
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
    a = ARCHITECTURES[arch]
    c: dict[str, Any] = {theirs: said[f"{arch}.{key}"] for key, theirs in a.keys.items() if f"{arch}.{key}" in said}
    c |= {key: _shortest(value) for key, value in c.items() if isinstance(value, float)}
    known = {f"{arch}.{key}" for key in (*a.keys, *_OTHER_KEYS, *([_PATTERN] if a.every else []))}
    if unknown := [key for key in said if key.startswith(f"{arch}.") and key not in known]:
        raise UserError(f"{what}: {unknown[0]}={said[unknown[0]]!r} is not known here")
    heads, layers = said[f"{arch}.attention.head_count"], said[f"{arch}.block_count"]
    width = c.get("head_dim") or said[f"{arch}.embedding_length"] // heads
    if said.get(f"{arch}.attention.head_count_kv", heads) != heads and "num_key_value_heads" not in a.keys.values():
        raise UserError(f"{what}: fewer key-value heads than heads are not supported in a {arch}")
    if said.get(f"{arch}.attention.value_length", width) != width:
        raise UserError(f"{what}: values of another width than keys are not supported")
    if "rope.freq_base" in a.keys:
        c = {
            "rope_theta": 10000.0,
            "partial_rotary_factor": said.get(f"{arch}.rope.dimension_count", width) / width,
        } | c
    if a.every:
        c |= _windows(a, c, said.get(f"{arch}.{_PATTERN}", a.every), layers)
        c["query_pre_attn_scalar"] = c["hidden_size"] // heads if layers == a.largest else width
    c |= {
        "model_type": a.kind,
        "vocab_size": table.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
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
        return model_config(c)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _windows(a: Architecture, c: Mapping[str, Any], pattern: Any, layers: int) -> dict[str, Any]:
    """What config.json would say of sliding windows; `pattern` is a period, or whether each layer has one."""
    window = c.get("sliding_window", 4096 if a.kind == "gemma2" else None)
    slides = pattern if isinstance(pattern, list) else [not pattern or (i + 1) % pattern != 0 for i in range(layers)]
    kinds = ["sliding_attention" if window and local else "full_attention" for local in slides]
    return {"layer_types": kinds, "sliding_window": window}


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
        if tensor.format not in gguf_blocks.SCHEMES or len(tensor.shape) != 2 or their.part[1] > 1:
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
    wanted = assemble.names(names.gguf(fused="blk.0.attn_qkv.weight" in file.tensors), abstract)
    node = source.as_stored if as_stored else None
    return assemble.load(source, wanted, abstract, shardings, lambda name: False, node)


def _heads(arch: str, config: ModelConfig) -> dict[str, int]:
    return {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if ARCHITECTURES[arch].interleaved else {}


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
    parts = assemble.by_tensor(assemble.names(names.gguf(ARCHITECTURES[arch].fused), params))
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

    shapes = {name: assemble.their_shape(of[0][0], flat[of[0][1]].shape) for name, of in parts.items()}
    tensors = {name: (shape, stored(name, shape)) for name, shape in shapes.items()}
    metadata = _metadata(arch, said, config) | _vocabulary(tokenizer, config.vocab_size)
    described = {name: gguf.Tensor(shape, stored_as, path, 0) for name, (shape, stored_as) in tensors.items()}
    again = read_config(gguf.File(metadata, described), "what would be written")[1]
    refuse_difference(f"a GGUF file of a {arch}", dataclasses.replace(config, head_dim=again.head_dim), again)
    gguf.write(path, metadata, tensors, (values(name) for name in tensors))
    return {name: stored_as for name, (_, stored_as) in tensors.items()}


def _as_stored(parts: list[tuple[names.Their, Any]]) -> str:
    """The block format that holds a weight as it is, or ""."""
    (their, weight), *others = parts
    if others or not isinstance(weight, QTensor):
        return ""
    return gguf_blocks.corresponding(weight, their.turned) or ""


def _architecture(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    reasons = []
    for arch in ARCHITECTURES:
        try:
            return arch, their_config(ARCHITECTURES[arch].kind, config)
        except UserError as error:
            reasons.append(str(error).split(";")[0])
    raise UserError("no GGUF architecture written here holds this model: " + "; ".join(reasons))


def _metadata(arch: str, said: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    p, a = config.position, ARCHITECTURES[arch]
    local = "local" in config.layer_pattern
    if p.scaling not in ("none", "linear", "yarn") or (local and not a.every):
        raise UserError(f"rope scaling {p.scaling} and sliding windows are not written to GGUF files of a {arch}")
    width = positions.head_dim(config)
    if not a.free_heads and width * config.num_heads != config.width:
        raise UserError(
            f"a GGUF file of a {arch} cannot hold model.head_dim={width}; its heads are {config.width} / "
            f"{config.num_heads} wide (model.width / model.num_heads)"
        )
    found = {f"{arch}.{key}": said[theirs] for key, theirs in a.keys.items() if said.get(theirs) is not None}
    found |= {f"{arch}.feed_forward_length": config.mlp_dim, f"{arch}.vocab_size": config.vocab_size}
    if a.free_heads:
        found |= {f"{arch}.attention.key_length": width, f"{arch}.attention.value_length": width}
    if p.kind == "rope":
        found[f"{arch}.rope.dimension_count"] = round(width * p.partial_rotary_factor)
    if a.every:
        kinds = stages.layer_kinds(config)
        every = kinds.index("global") + 1 if "global" in kinds else 0
        if kinds != ["global" if (i + 1) % a.every == 0 else "local" for i in range(len(kinds))] and local:
            found[f"{arch}.{_PATTERN}"] = every
    if p.scaling != "none":
        found |= {f"{arch}.rope.scaling.type": p.scaling, f"{arch}.rope.scaling.factor": p.scaling_factor}
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
