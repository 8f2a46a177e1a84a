"""config.json of the families with LayerNorm and plain MLPs; see `config_json`."""

from collections.abc import Mapping
from typing import Any

from llm_jax.checkpoints import config_rope
from llm_jax.checkpoints.config_json import (
    activation_name,
    biases,
    common,
    gelu_new,
    has_attention_bias,
    pattern,
)
from llm_jax.checkpoints.config_llama import read_llama
from llm_jax.errors import UserError
from llm_jax.schema import ModelConfig


def read_gpt2(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": c["n_embd"],
        "num_layers": c["n_layer"],
        "num_heads": c["n_head"],
        "num_kv_heads": c["n_head"],
        "mlp": "plain",
        "mlp_dim": c.get("n_inner") or 4 * c["n_embd"],
        "activation": c.get("activation_function", "gelu_new"),
        "norm": "layer",
        "norm_eps": float(c.get("layer_norm_epsilon", 1e-5)),
        "bias": True,
        "attention_scale": 0.0 if c.get("scale_attn_weights", True) else 1.0,
        "scale_attention_by_depth": bool(c.get("scale_attn_by_inverse_layer_idx")),
        "position.kind": "learned",
        "position.max_length": c["n_positions"],
    }


def read_phi(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **read_llama({"hidden_act": "gelu_new", **c}),
        "mlp": "plain",
        "norm": "layer",
        "norm_eps": float(c.get("layer_norm_eps", 1e-5)),
        "parallel_residual": True,
        **biases(True, True),
        "qk_norm": bool(c.get("qk_layernorm")),
        "qk_norm_kind": "layer" if c.get("qk_layernorm") else "rms",
        "head_bias": True,
        "position.partial_rotary_factor": 0.5,
        **config_rope.read(c),
    }


def read_starcoder2(c: Mapping[str, Any]) -> dict[str, Any]:
    bias, kind = bool(c.get("use_bias", True)), "local" if c.get("sliding_window") else "global"
    return {
        **read_llama({"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2, **c}),
        **pattern(c, [kind] * c["num_hidden_layers"]),
        **biases(bias, bias),
        "mlp": "plain",
        "norm": "layer",
        "norm_eps": float(c.get("norm_epsilon", 1e-5)),
    }


def read_gpt_neox(c: Mapping[str, Any]) -> dict[str, Any]:
    rope = {"rope_theta": c.get("rotary_emb_base", 10000.0), "partial_rotary_factor": c.get("rotary_pct", 0.25)}
    parallel = bool(c.get("use_parallel_residual", True))
    return {
        **read_llama({"hidden_act": "gelu", **rope, **c, "num_key_value_heads": c["num_attention_heads"]}),
        **biases(bool(c.get("attention_bias", True)), True),
        "mlp": "plain",
        "norm": "layer",
        "norm_eps": float(c.get("layer_norm_eps", 1e-5)),
        "parallel_residual": parallel,
        "parallel_norms": parallel,
    }


def read_bert(c: Mapping[str, Any]) -> dict[str, Any]:
    if c.get("position_embedding_type", "absolute") != "absolute":
        raise UserError("config.json: only position_embedding_type=absolute is supported")
    if c.get("is_decoder"):
        raise UserError("config.json: a bert with is_decoder is not supported")
    return {
        "width": c["hidden_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "num_kv_heads": c["num_attention_heads"],
        "mlp": "plain",
        "mlp_dim": c["intermediate_size"],
        "activation": c["hidden_act"],
        "norm": "layer",
        "norm_eps": float(c["layer_norm_eps"]),
        "norm_placement": "post",
        "embed_norm": True,
        "type_vocab_size": c["type_vocab_size"],
        "pooler": True,
        "bias": True,
        "causal": False,
        "tie_embeddings": True,
        "position.kind": "learned",
        "position.max_length": c["max_position_embeddings"],
    }


def write_gpt2(m: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": m.width,
        "n_layer": m.num_layers,
        "n_head": m.num_heads,
        "n_inner": None if m.mlp_dim == 4 * m.width else m.mlp_dim,
        "n_positions": m.position.max_length,
        "activation_function": gelu_new(m),
        "layer_norm_epsilon": m.norm_eps,
        "scale_attn_weights": m.attention_scale != 1.0,
        "scale_attn_by_inverse_layer_idx": m.scale_attention_by_depth,
    }


def write_phi(m: ModelConfig) -> dict[str, Any]:
    return common(m) | {
        "hidden_act": gelu_new(m),
        "partial_rotary_factor": m.position.partial_rotary_factor,
        "layer_norm_eps": m.norm_eps,
        "qk_layernorm": m.qk_norm,
    }


def write_starcoder2(m: ModelConfig) -> dict[str, Any]:
    written = common(m)
    del written["layer_types"], written["rms_norm_eps"]
    return written | {"norm_epsilon": m.norm_eps, "use_bias": m.bias}


def write_gpt_neox(m: ModelConfig) -> dict[str, Any]:
    written = common(m)
    for key in ("layer_types", "rms_norm_eps", "num_key_value_heads", "sliding_window"):
        del written[key]
    return written | {
        "layer_norm_eps": m.norm_eps,
        "rotary_emb_base": written.pop("rope_theta"),
        "rotary_pct": m.position.partial_rotary_factor,
        "use_parallel_residual": m.parallel_residual,
        "attention_bias": has_attention_bias(m),
    }


def write_bert(m: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": m.width,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "intermediate_size": m.mlp_dim,
        "hidden_act": activation_name(m),
        "layer_norm_eps": m.norm_eps,
        "type_vocab_size": m.type_vocab_size,
        "max_position_embeddings": m.position.max_length,
    }
