"""config.json of the families with RMSNorm and gated MLPs; see `config_json`."""

from collections.abc import Mapping
from typing import Any

from llm_jax.checkpoints import config_rope
from llm_jax.checkpoints.config_json import biases, common, has_attention_bias, has_mlp_bias, integer, pattern, period
from llm_jax.errors import UserError
from llm_jax.model import positions, stages
from llm_jax.schema import ModelConfig

# The padding id of the class may be past the end of the vocabulary, where transformers cannot build its embeddings.
_NO_PADDING = {"pad_token_id": None}


def read_llama(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": c["hidden_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "num_kv_heads": c.get("num_key_value_heads") or c["num_attention_heads"],
        "head_dim": c.get("head_dim") or 0,
        "mlp_dim": c["intermediate_size"],
        "activation": c.get("hidden_act") or c.get("hidden_activation") or "silu",
        "norm_eps": float(c.get("rms_norm_eps", 1e-6)),
        "position.max_length": c.get("max_position_embeddings", 2048),
        **biases(bool(c.get("attention_bias")), bool(c.get("mlp_bias"))),
        **config_rope.read(c),
    }


def read_mistral(c: Mapping[str, Any]) -> dict[str, Any]:
    c = {"sliding_window": 4096, **c}
    kind = "local" if c["sliding_window"] else "global"
    return read_llama(c) | pattern(c, [kind] * c["num_hidden_layers"])


def read_qwen2(c: Mapping[str, Any]) -> dict[str, Any]:
    layers, full = c["num_hidden_layers"], c.get("max_window_layers", c["num_hidden_layers"])
    slides = bool(c.get("use_sliding_window")) and bool(c.get("sliding_window"))
    kinds = ["local" if slides and i >= full else "global" for i in range(layers)]
    return read_llama(c) | pattern(c, kinds) | {**biases(False, False), "qkv_bias": True}


def read_qwen3(c: Mapping[str, Any]) -> dict[str, Any]:
    changes = biases(bool(c.get("attention_bias")), False)
    return read_qwen2(c) | changes | {"qk_norm": True, "head_dim": c.get("head_dim") or 128}


def read_smollm3(c: Mapping[str, Any]) -> dict[str, Any]:
    if c.get("use_sliding_window") and c.get("sliding_window"):
        raise UserError("config.json: a smollm3 with use_sliding_window is not supported")
    layers, every = c["num_hidden_layers"], c.get("no_rope_layer_interval") or 4
    rotary = c.get("no_rope_layers") or [(i + 1) % every for i in range(layers)]  # 0: a layer without positions
    if len(rotary) < layers:
        raise UserError(
            f"config.json: no_rope_layers has {len(rotary)} entries; expected one for each of {layers} layers"
        )
    kinds = ["global" if entry else "nope" for entry in rotary[:layers]]
    return read_llama({"rope_theta": 2e6, "num_key_value_heads": 4} | dict(c)) | {"layer_pattern": period(kinds)}


def read_olmo2(c: Mapping[str, Any]) -> dict[str, Any]:
    return read_llama({"rms_norm_eps": 1e-5} | dict(c)) | {
        **biases(bool(c.get("attention_bias")), False),
        "norm_placement": "output",
        "qk_norm": True,
        "qk_norm_axis": "width",
    }


def read_granite(c: Mapping[str, Any]) -> dict[str, Any]:
    return read_llama(c) | {
        "embedding_multiplier": float(c.get("embedding_multiplier", 1.0)),
        "residual_multiplier": float(c.get("residual_multiplier", 1.0)),
        "attention_scale": float(c.get("attention_multiplier", 1.0)),
        "logits_scaling": float(c.get("logits_scaling", 1.0)),
    }


def read_phi3(c: Mapping[str, Any]) -> dict[str, Any]:
    c = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, **c}
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    if rope.get("rope_type", rope.get("type")) == "yarn":  # the name of longrope in early files
        rope["rope_type"] = "longrope"
    kind = "local" if c.get("sliding_window") else "global"
    changes = read_llama(c | {"rope_parameters": rope}) | pattern(c, [kind] * c["num_hidden_layers"])
    return changes | biases(False, False)


def _gemma(c: Mapping[str, Any]) -> dict[str, Any]:
    if (scalar := c.get("query_pre_attn_scalar", 256)) <= 0:
        raise UserError(f"config.json: query_pre_attn_scalar is {scalar}; expected a positive number")
    if c.get("use_bidirectional_attention"):
        raise UserError("config.json: use_bidirectional_attention is not supported")
    return read_llama(c) | {
        "activation": c.get("hidden_activation") or "gelu_pytorch_tanh",
        "head_dim": c.get("head_dim") or 256,
        "scale_embeddings": True,
        "norm_placement": "both",
        "attention_scale": float(scalar) ** -0.5,
        "logit_softcap": float(c.get("final_logit_softcapping") or 0.0),
        "attention_softcap": float(c.get("attn_logit_softcapping") or 0.0),
    }


def read_gemma2(c: Mapping[str, Any]) -> dict[str, Any]:
    kinds = ["local" if i % 2 == 0 else "global" for i in range(c["num_hidden_layers"])]
    c = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window": 4096, **c}
    return _gemma(c) | pattern(c, kinds)


def read_gemma3(c: Mapping[str, Any]) -> dict[str, Any]:
    every = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
    kinds = ["global" if (i + 1) % every == 0 else "local" for i in range(c["num_hidden_layers"])]
    rope = c.get("rope_parameters") or {}
    if "full_attention" in rope:
        full = config_rope.read(c, rope["full_attention"])
        local = rope["sliding_attention"]["rope_theta"]
        if rope["sliding_attention"].get("rope_type", "default") != "default":
            raise UserError("config.json: scaled rope in sliding layers is not supported")
    else:
        full, local = config_rope.read({"rope_theta": 1e6} | dict(c)), c.get("rope_local_base_freq", 10000.0)
    return (
        _gemma({**c, "rope_parameters": {}, "rope_scaling": {}})
        | pattern(c, kinds)
        | full
        | {
            "qk_norm": True,
            "position.local_base": float(local),
        }
    )


def write_llama(m: ModelConfig) -> dict[str, Any]:
    return common(m) | {"attention_bias": has_attention_bias(m), "mlp_bias": has_mlp_bias(m)}


def write_qwen(m: ModelConfig) -> dict[str, Any]:
    slides = "local" in m.layer_pattern
    return common(m) | {"use_sliding_window": slides, "attention_bias": has_attention_bias(m)}


def write_mistral(m: ModelConfig) -> dict[str, Any]:
    written = common(m)
    del written["layer_types"]  # MistralConfig has no such key
    return written


def write_smollm3(m: ModelConfig) -> dict[str, Any]:
    rotary = [int(kind != "nope") for kind in stages.layer_kinds(m)]
    return write_llama(m) | {"no_rope_layers": rotary, "use_sliding_window": False, **_NO_PADDING}


def write_olmo2(m: ModelConfig) -> dict[str, Any]:
    return common(m) | {"attention_bias": has_attention_bias(m)}


def write_granite(m: ModelConfig) -> dict[str, Any]:
    return write_llama(m) | {
        "embedding_multiplier": integer(m.embedding_multiplier),
        "residual_multiplier": integer(m.residual_multiplier),
        "attention_multiplier": integer(m.attention_scale or positions.head_dim(m) ** -0.5),
        "logits_scaling": integer(m.logits_scaling),
    }


def write_phi3(m: ModelConfig) -> dict[str, Any]:
    p, written = m.position, common(m)
    del written["layer_types"]
    written |= {"partial_rotary_factor": p.partial_rotary_factor, **_NO_PADDING}
    if p.scaling == "longrope":
        # Only the keys of the published files: early versions of transformers reject others.
        scaling = written["rope_scaling"]
        del scaling["original_max_position_embeddings"]
        if scaling["factor"] == p.max_length / p.original_length:
            del scaling["factor"]
        scaling["type"] = scaling.pop("rope_type")
        written["original_max_position_embeddings"] = p.original_length
    return written


def write_gemma(m: ModelConfig) -> dict[str, Any]:
    written = common(m)
    if m.position.local_base:
        written |= {"rope_local_base_freq": m.position.local_base}
    return written | {
        "hidden_activation": written.pop("hidden_act"),
        "query_pre_attn_scalar": integer(round((m.attention_scale or 1.0) ** -2, 6)),
        "final_logit_softcapping": m.logit_softcap or None,
        "attn_logit_softcapping": m.attention_softcap or None,
        "attention_bias": False,
    }
