"""The metadata of GGUF files <-> configurations, for the architectures of ggml in `ARCHITECTURES`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax.checkpoints import gguf, gguf_rope
from llm_jax.checkpoints.families import hf_config, model_config
from llm_jax.errors import UserError
from llm_jax.model import positions, stages
from llm_jax.schema import ModelConfig

# Metadata key, below the architecture's name -> key of Hugging Face's config.json.
_LLAMA = {
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
    key: hf_key
    for key, hf_key in _LLAMA.items()
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
_BERT = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "context_length": "max_position_embeddings",
}
_GEMMA = _LLAMA | {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
_GEMMA3 = _GEMMA | {"rope.freq_base_swa": "rope_local_base_freq"}
_OLMO2 = {key: hf_key for key, hf_key in _LLAMA.items() if key != "attention.key_length"}
_GRANITE = _OLMO2 | {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_STARCODER2 = _PHI | {"attention.layer_norm_epsilon": "norm_epsilon"}
_NEOX = {key: hf_key for key, hf_key in _PHI.items() if key != "attention.head_count_kv"} | {
    "use_parallel_residual": "use_parallel_residual"
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of ggml (llama.cpp's src/models).

    Attributes:
      family: the Hugging Face model_type of the same architecture.
      keys: metadata key, below the architecture's name -> key of config.json.
      interleaved: queries and keys are stored with the two halves of a head interleaved.
      free_heads: head_dim may differ from width / num_heads.
      fused: queries, keys and values are written as one tensor. (Both forms are read.)
      global_every: every n-th layer attends to the whole text, the others to a window. 0: no windows.
      rope_freqs: llama.cpp divides frequencies by the tensor rope_freqs.weight (the llama3 scaling).
      encoder: BERT, whose files have no pooler.
      tied: the head may be the embedding table.
      defaults: keys of config.json that files do not state, as llama.cpp knows one value only.
      scaled_layers: the number of layers of the one model that scales scores by (width / num_heads) ** -0.5.
    """

    family: str
    keys: Mapping[str, str]
    interleaved: bool = False
    free_heads: bool = True
    fused: bool = False
    global_every: int = 0
    rope_freqs: bool = False
    encoder: bool = False
    scaled_layers: int = 0
    tied: bool = True
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture("llama", _LLAMA, interleaved=True, rope_freqs=True),
    "qwen2": Architecture("qwen2", _LLAMA, free_heads=False),
    "qwen3": Architecture("qwen3", _LLAMA),
    "gemma2": Architecture("gemma2", _GEMMA, global_every=2, scaled_layers=46),
    "gemma3": Architecture("gemma3_text", _GEMMA3, global_every=6, scaled_layers=62),
    "phi2": Architecture("phi", _PHI, free_heads=False),
    "gpt2": Architecture("gpt2", _GPT2, free_heads=False, fused=True),
    "bert": Architecture("bert", _BERT, free_heads=False, encoder=True),
    "smollm3": Architecture("smollm3", _LLAMA, interleaved=True),
    "olmo2": Architecture("olmo2", _OLMO2, free_heads=False, tied=False),
    "granite": Architecture("granite", _GRANITE, interleaved=True, free_heads=False),
    "starcoder2": Architecture("starcoder2", _STARCODER2, free_heads=False),
    "gptneox": Architecture(
        "gpt_neox", _NEOX, free_heads=False, fused=True, tied=False, defaults={"hidden_act": "gelu_new"}
    ),
}
_PATTERN = "attention.sliding_window_pattern"
# Keys that are read elsewhere, or that do not affect the computation.
_OTHER_KEYS = (
    "vocab_size",
    "attention.value_length",
    "attention.head_count_kv",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "pooling_type",
)
# Keys that are accepted with these values only, with which they do not affect the computation.
_NEUTRAL_KEYS: dict[str, tuple[Any, ...]] = {
    "tensor_data_layout": ("Meta AI original pth",),  # the layout of the heads; all files have this value
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "logit_scale": (0.0, 1.0),  # 0: none
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def read_config(file: gguf.GgufFile, label: str, rope_freqs: np.ndarray | None = None) -> tuple[str, ModelConfig]:
    """(family, configuration of the model) of a file.

    Args:
      label: the name of the file in error messages.
      rope_freqs: the content of the tensor rope_freqs.weight where it is not in the file yet: float32 (F,), for a
        rotated width of 2 F.

    Raises:
      UserError: something is missing, unknown or not supported.
    """
    try:
        if rope_freqs is None and gguf_rope.TENSOR in file.tensors:
            rope_freqs = file.tensors[gguf_rope.TENSOR].read().reshape(-1)
        return _read_config(file, label, rope_freqs)
    except KeyError as error:
        raise UserError(f"{label}: the metadata key {error} is missing") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{label}: the metadata are inconsistent ({error})") from error


def _read_config(file: gguf.GgufFile, label: str, rope_freqs: np.ndarray | None) -> tuple[str, ModelConfig]:
    metadata = {key: _same_in_all_layers(value) for key, value in file.metadata.items()}
    arch = metadata.get("general.architecture")
    if (content := metadata.get("general.type", "model")) != "model":
        raise UserError(f"{label}: general.type is {content!r}; expected the file of a whole model")
    if isinstance(experts := metadata.get(f"{arch}.expert_count"), int) and experts > 0:
        raise UserError(f"{label}: {arch}.expert_count={experts}: a mixture of experts is not supported")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UserError(f"{label}: general.architecture is {arch!r}; expected one of {', '.join(ARCHITECTURES)}")
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise UserError(f"{label}: the tensor token_embd.weight is missing")
    a = ARCHITECTURES[arch]
    c: dict[str, Any] = {
        hf_key: metadata[f"{arch}.{key}"] for key, hf_key in a.keys.items() if f"{arch}.{key}" in metadata
    }
    c |= {key: _shortest(value) for key, value in c.items() if isinstance(value, float)}
    known = {f"{arch}.{key}" for key in (*a.keys, *_OTHER_KEYS, *([_PATTERN] if a.global_every else []))}
    if metadata.get(f"{arch}.attention.causal", not a.encoder) == a.encoder:
        raise UserError(f"{label}: {arch}.attention.causal={a.encoder} is not supported")
    known |= {f"{arch}.attention.causal"}
    known |= {f"{arch}.{key}" for key, values in _NEUTRAL_KEYS.items() if metadata.get(f"{arch}.{key}") in values}
    if unknown := [key for key in metadata if key.startswith(f"{arch}.") and key not in known]:
        raise UserError(f"{label}: {unknown[0]}={metadata[unknown[0]]!r} is not supported")
    heads, layers = metadata[f"{arch}.attention.head_count"], metadata[f"{arch}.block_count"]
    width = c.get("head_dim") or metadata[f"{arch}.embedding_length"] // heads
    if metadata.get(f"{arch}.attention.head_count_kv", heads) != heads and "num_key_value_heads" not in a.keys.values():
        raise UserError(f"{label}: fewer key-value heads than heads are not supported in a {arch}")
    if metadata.get(f"{arch}.attention.value_length", width) != width:
        raise UserError(f"{label}: values of another width than keys are not supported")
    if "rope.freq_base" in a.keys:
        c = {
            "rope_theta": 10000.0,
            "partial_rotary_factor": metadata.get(f"{arch}.rope.dimension_count", width) / width,
        } | c
    c |= a.defaults
    if a.encoder:
        c |= {"hidden_act": "gelu", "type_vocab_size": file.tensors["token_types.weight"].shape[0]}
    if a.global_every:
        c |= _windows(a, c, metadata.get(f"{arch}.{_PATTERN}", a.global_every), layers)
        c["query_pre_attn_scalar"] = c["hidden_size"] // heads if layers == a.scaled_layers else width
    c |= {
        "model_type": a.family,
        "vocab_size": table.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if rope_freqs is not None and not a.rope_freqs:
        raise UserError(f"{label}: {gguf_rope.TENSOR} in a {arch} is not supported")
    try:
        c["rope_scaling"] = gguf_rope.read_scaling(metadata, arch, rope_freqs, float(c.get("rope_theta", 1e4)))
        if rope_freqs is not None and 2 * len(rope_freqs) != round(width * c["partial_rotary_factor"]):
            raise UserError(f"{gguf_rope.TENSOR} has {len(rope_freqs)} values for heads of {width}")
        family, config = model_config(c)
        return family, dataclasses.replace(config, pooler=config.pooler and not a.encoder)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error


def _windows(a: Architecture, c: Mapping[str, Any], pattern: Any, layers: int) -> dict[str, Any]:
    """The keys of config.json about sliding windows.

    Args:
      a: the architecture.
      c: the keys so far.
      pattern: the period of layers without a window, or a list of whether each layer has one.
    """
    window = c.get("sliding_window", 4096 if a.family == "gemma2" else None)
    slides = pattern if isinstance(pattern, list) else [not pattern or (i + 1) % pattern != 0 for i in range(layers)]
    kinds = ["sliding_attention" if window and local else "full_attention" for local in slides]
    return {"layer_types": kinds, "sliding_window": window}


def architecture(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """(name, keys of config.json) of the first architecture that holds a model.

    Raises:
      UserError: no architecture can hold it; the message has the reason for each.
    """
    reasons = []
    for arch, a in ARCHITECTURES.items():
        try:
            return arch, hf_config(a.family, dataclasses.replace(config, pooler=config.pooler or a.encoder))
        except UserError as error:
            reasons.append(str(error).split(";")[0])
    raise UserError("no supported GGUF architecture holds this model: " + "; ".join(reasons))


def metadata(arch: str, json_config: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The metadata of a file, without those of its tokenizer: the inverse of `read_config`.

    Args:
      arch, json_config: from `architecture`.

    Raises:
      UserError: the architecture cannot express the configuration.
    """
    p, a = config.position, ARCHITECTURES[arch]
    local = "local" in config.layer_pattern
    scalings = ("none", "linear", "yarn", *(("llama3",) if a.rope_freqs else ()))
    if p.scaling not in scalings or (local and not a.global_every):
        raise UserError(f"rope scaling {p.scaling} and sliding windows are not written to GGUF files of a {arch}")
    head_dim = positions.head_dim(config)
    if not a.free_heads and head_dim * config.num_heads != config.width:
        raise UserError(
            f"a GGUF file of a {arch} cannot hold model.head_dim={head_dim}; its heads are {config.width} / "
            f"{config.num_heads} wide (model.width / model.num_heads)"
        )
    if config.tie_embeddings and not a.tied:
        raise UserError(f"a GGUF file of a {arch} needs an output head; model.tie_embeddings=True has none of its own")
    result = {
        f"{arch}.{key}": json_config[hf_key] for key, hf_key in a.keys.items() if json_config.get(hf_key) is not None
    }
    # llama.cpp expects floats here; config.json has integers for whole numbers.
    result |= {key: float(value) for key, value in result.items() if key.endswith(("_scale", ".scale"))}
    result |= {f"{arch}.feed_forward_length": config.mlp_dim, f"{arch}.vocab_size": config.vocab_size}
    if a.encoder:
        result |= {f"{arch}.attention.causal": False, "tokenizer.ggml.token_type_count": config.type_vocab_size}
    if a.free_heads:
        result |= {f"{arch}.attention.key_length": head_dim, f"{arch}.attention.value_length": head_dim}
    if p.kind == "rope":
        result[f"{arch}.rope.dimension_count"] = round(head_dim * p.partial_rotary_factor)
        result[f"{arch}.rope.freq_base"] = p.base
    if a.global_every:
        kinds = stages.layer_kinds(config)
        every = kinds.index("global") + 1 if "global" in kinds else 0
        if kinds != ["global" if (i + 1) % a.global_every == 0 else "local" for i in range(len(kinds))] and local:
            result[f"{arch}.{_PATTERN}"] = every
    if p.scaling in ("linear", "yarn"):
        result |= {f"{arch}.rope.scaling.type": p.scaling, f"{arch}.rope.scaling.factor": p.scaling_factor}
    if p.scaling != "none" and p.original_length:
        result[f"{arch}.rope.scaling.original_context_length"] = p.original_length
    return {"general.architecture": arch, "general.name": arch, "general.alignment": 32} | result


def _same_in_all_layers(value: Any) -> Any:
    """One value for a list of equal numbers, which some files have for every layer."""
    numbers = isinstance(value, list) and value and all(type(v) in (int, float) and v == value[0] for v in value)
    return value[0] if numbers else value


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to the same float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
