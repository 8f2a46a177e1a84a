"""config.json of the families of Hugging Face: `read_*` and its inverse `write_*`.

A `read_*` function returns changes to `families.neutral()`, with keys such as "width" and "position.base". For a
missing key it uses the default of the family's class in transformers, and it refuses settings that the model does not
support.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.errors import UserError
from llm_jax.model import stages
from llm_jax.schema import ModelConfig

# Name in config.json -> model.activation; of several names the first is written.
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
# Entry of layer_types -> entry of model.layer_pattern.
LAYERS = {"full_attention": "global", "sliding_attention": "local"}


def _period(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern of which `kinds` is a repetition."""
    return next(
        tuple(kinds[:p]) for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds))
    )


def _pattern(c: Mapping[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Pattern and window of sliding layers: from `layer_types` if config.json has it, else from `kinds`."""
    layer_types = c.get("layer_types")
    try:
        kinds = [LAYERS[kind] for kind in layer_types] if layer_types else kinds
    except KeyError as error:
        raise UserError(f"config.json: layer_types has {error}; expected {' or '.join(LAYERS)}") from error
    window = c.get("sliding_window")
    return {"layer_pattern": _period(kinds)} | ({"window": window} if "local" in kinds else {})


def _rope(c: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The rotary settings of config.json: from rope_theta and rope_scaling, or from rope_parameters."""
    rope = dict(parameters or c.get("rope_parameters") or c.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    changes = {"position.kind": "rope", "position.base": float(base)}
    fraction = rope.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    if fraction is not None:
        changes["position.partial_rotary_factor"] = float(fraction)
    original = rope.get("original_max_position_embeddings") or c.get("max_position_embeddings")
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"scaling": "linear"},
        "dynamic": {"scaling": "dynamic", "original_length": c.get("max_position_embeddings")},
        "yarn": {
            "scaling": "yarn",
            "original_length": original,
            "beta_fast": float(rope.get("beta_fast") or 32.0),
            "beta_slow": float(rope.get("beta_slow") or 1.0),
        },
        "llama3": {
            "scaling": "llama3",
            "original_length": original,
            "low_freq_factor": float(rope.get("low_freq_factor", 1.0)),
            "high_freq_factor": float(rope.get("high_freq_factor", 4.0)),
        },
    }
    if kind not in settings:
        raise UserError(f"config.json: rope_type is {kind!r}; expected one of {', '.join(settings)}")
    if kind != "default":
        changes["position.scaling_factor"] = float(rope["factor"])
    refused = [k for k in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(k) is not None]
    if kind == "yarn" and (refused or rope.get("truncate") is False):
        raise UserError(f"config.json: yarn with {', '.join(refused) or 'truncate: false'} is not supported")
    if kind == "dynamic" and original != c.get("max_position_embeddings"):
        raise UserError("config.json: dynamic rope with an original length of its own is not supported")
    return changes | {f"position.{key}": value for key, value in settings[kind].items()}


def _written_rope(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `_rope`, as rope_theta and rope_scaling, which every version of transformers reads."""
    p = m.position
    changes: dict[str, Any] = {"rope_theta": p.base}
    if p.scaling == "none":
        return changes
    scaling: dict[str, Any] = {"rope_type": p.scaling, "factor": p.scaling_factor}
    if p.scaling == "dynamic":
        changes["max_position_embeddings"] = p.original_length
    if p.scaling in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = p.original_length
    if p.scaling == "yarn":
        scaling |= {"beta_fast": p.beta_fast, "beta_slow": p.beta_slow}
    if p.scaling == "llama3":
        scaling |= {"low_freq_factor": p.low_freq_factor, "high_freq_factor": p.high_freq_factor}
    if p.scaling == "ntk":
        raise UserError("model.position.scaling=ntk has no name in Hugging Face's config.json; it cannot be written")
    return changes | {"rope_scaling": scaling}


def read_llama(c: Mapping[str, Any]) -> dict[str, Any]:
    if bool(c.get("attention_bias")) != bool(c.get("mlp_bias")):
        raise UserError("config.json: attention_bias without mlp_bias (or the reverse) is not supported")
    return {
        "width": c["hidden_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "num_kv_heads": c.get("num_key_value_heads") or c["num_attention_heads"],
        "head_dim": c.get("head_dim") or 0,
        "mlp_dim": c["intermediate_size"],
        "activation": c.get("hidden_act") or c.get("hidden_activation") or "silu",
        "norm_eps": float(c.get("rms_norm_eps", 1e-6)),
        "bias": bool(c.get("attention_bias")),
        "position.max_length": c.get("max_position_embeddings", 2048),
        **_rope(c),
    }


def read_mistral(c: Mapping[str, Any]) -> dict[str, Any]:
    c = {"sliding_window": 4096, **c}
    kind = "local" if c["sliding_window"] else "global"
    return read_llama(c) | _pattern(c, [kind] * c["num_hidden_layers"])


def read_qwen2(c: Mapping[str, Any]) -> dict[str, Any]:
    layers, full = c["num_hidden_layers"], c.get("max_window_layers", c["num_hidden_layers"])
    slides = bool(c.get("use_sliding_window")) and bool(c.get("sliding_window"))
    kinds = ["local" if slides and i >= full else "global" for i in range(layers)]
    return read_llama(c) | _pattern(c, kinds) | {"qkv_bias": True}


def read_qwen3(c: Mapping[str, Any]) -> dict[str, Any]:
    return read_qwen2(c) | {"qkv_bias": False, "qk_norm": True, "head_dim": c.get("head_dim") or 128}


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
    return _gemma(c) | _pattern(c, kinds)


def read_gemma3(c: Mapping[str, Any]) -> dict[str, Any]:
    every = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
    kinds = ["global" if (i + 1) % every == 0 else "local" for i in range(c["num_hidden_layers"])]
    rope = c.get("rope_parameters") or {}
    if "full_attention" in rope:
        full = _rope(c, rope["full_attention"])
        local = rope["sliding_attention"]["rope_theta"]
        if rope["sliding_attention"].get("rope_type", "default") != "default":
            raise UserError("config.json: scaled rope in sliding layers is not supported")
    else:
        full, local = _rope({"rope_theta": 1e6} | dict(c)), c.get("rope_local_base_freq", 10000.0)
    return (
        _gemma({**c, "rope_parameters": {}, "rope_scaling": {}})
        | _pattern(c, kinds)
        | full
        | {
            "qk_norm": True,
            "position.local_base": float(local),
        }
    )


def read_phi(c: Mapping[str, Any]) -> dict[str, Any]:
    if c.get("qk_layernorm"):
        raise UserError("config.json: phi with qk_layernorm is not supported")
    return {
        **read_llama({"hidden_act": "gelu_new", **c}),
        "mlp": "plain",
        "norm": "layer",
        "norm_eps": float(c.get("layer_norm_eps", 1e-5)),
        "parallel_residual": True,
        "bias": True,
        "head_bias": True,
        "position.partial_rotary_factor": 0.5,
        **_rope(c),
    }


def read_gpt2(c: Mapping[str, Any]) -> dict[str, Any]:
    if c.get("scale_attn_by_inverse_layer_idx") or not c.get("scale_attn_weights", True):
        raise UserError("config.json: attention scores not scaled by 1 / sqrt(head_dim) are not supported")
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
        "position.kind": "learned",
        "position.max_length": c["n_positions"],
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


def _common(m: ModelConfig) -> dict[str, Any]:
    names = {kind: name for name, kind in LAYERS.items()}
    kinds = [names[kind] for kind in stages.layer_kinds(m)]
    return {
        "hidden_size": m.width,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "intermediate_size": m.mlp_dim,
        "hidden_act": _activation_name(m),
        "rms_norm_eps": m.norm_eps,
        "layer_types": kinds,
        "sliding_window": m.window if "sliding_attention" in kinds else None,
        "max_position_embeddings": m.position.max_length,
        **({"head_dim": m.head_dim} if m.head_dim else {}),
        **_written_rope(m),
    }


def _activation_name(m: ModelConfig) -> str:
    return next(name for name, activation in ACTIVATION_NAMES.items() if activation == m.activation)


def write_llama(m: ModelConfig) -> dict[str, Any]:
    return _common(m) | {"attention_bias": m.bias, "mlp_bias": m.bias}


def write_qwen(m: ModelConfig) -> dict[str, Any]:
    slides = "local" in m.layer_pattern
    return _common(m) | {"use_sliding_window": slides, "attention_bias": False}


def write_gemma(m: ModelConfig) -> dict[str, Any]:
    common = _common(m)
    if m.position.local_base:
        common |= {"rope_local_base_freq": m.position.local_base}
    return common | {
        "hidden_activation": common.pop("hidden_act"),
        "query_pre_attn_scalar": _integer(round((m.attention_scale or 1.0) ** -2, 6)),
        "final_logit_softcapping": m.logit_softcap or None,
        "attn_logit_softcapping": m.attention_softcap or None,
        "attention_bias": False,
    }


def _integer(value: float) -> int | float:
    """As an int if it is one, because transformers checks the types in config.json."""
    return int(value) if value == int(value) else value


def write_mistral(m: ModelConfig) -> dict[str, Any]:
    common = _common(m)
    del common["layer_types"]  # MistralConfig has no such key
    return common


def _gelu_new(m: ModelConfig) -> str:
    """The name of the activation in GPT-2 and Phi, which call the tanh approximation gelu_new."""
    return "gelu_new" if m.activation == "gelu" else _activation_name(m)


def write_phi(m: ModelConfig) -> dict[str, Any]:
    return _common(m) | {
        "hidden_act": _gelu_new(m),
        "partial_rotary_factor": m.position.partial_rotary_factor,
        "layer_norm_eps": m.norm_eps,
    }


def write_gpt2(m: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": m.width,
        "n_layer": m.num_layers,
        "n_head": m.num_heads,
        "n_inner": None if m.mlp_dim == 4 * m.width else m.mlp_dim,
        "n_positions": m.position.max_length,
        "activation_function": _gelu_new(m),
        "layer_norm_epsilon": m.norm_eps,
    }


def write_bert(m: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": m.width,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "intermediate_size": m.mlp_dim,
        "hidden_act": _activation_name(m),
        "layer_norm_eps": m.norm_eps,
        "type_vocab_size": m.type_vocab_size,
        "max_position_embeddings": m.position.max_length,
    }
