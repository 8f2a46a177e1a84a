"""Functions for config.json that several Hugging Face families share.

`config_llama` and `config_gpt` have a `read_*` function and its inverse `write_*` for every family. A `read_*` function
returns changes to `families.neutral()`, with keys such as "width" and "position.base". For a missing key it uses the
default of the family's class in transformers, and it refuses settings that the model does not support.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.checkpoints import config_rope
from llm_jax.errors import UserError
from llm_jax.model import stages
from llm_jax.schema import ModelConfig

# Name in config.json -> model.activation. The first name of an activation is the one that is written.
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
# Entry of layer_types -> entry of model.layer_pattern.
LAYERS = {"full_attention": "global", "sliding_attention": "local"}
_LAYER_TYPES = {kind: name for name, kind in LAYERS.items()} | {"nope": "full_attention"}


def period(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that gives `kinds` when it is repeated."""
    return next(
        tuple(kinds[:p]) for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds))
    )


def pattern(c: Mapping[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Pattern and window of sliding layers: from `layer_types` if config.json has it, else from `kinds`."""
    layer_types, layers = c.get("layer_types"), len(kinds)
    if layer_types and len(layer_types) < layers:
        raise UserError(
            f"config.json: layer_types has {len(layer_types)} entries; expected one for each of the {layers} layers of "
            "num_hidden_layers"
        )
    try:  # published files have entries for layers that the model lacks (heads that predict several tokens)
        kinds = [LAYERS[kind] for kind in layer_types[:layers]] if layer_types else kinds
    except KeyError as error:
        raise UserError(f"config.json: layer_types has {error}; expected {' or '.join(LAYERS)}") from error
    window = c.get("sliding_window")
    return {"layer_pattern": period(kinds)} | ({"window": window} if "local" in kinds else {})


def biases(attention: bool, mlp: bool) -> dict[str, bool]:
    """The options of the model for biases in all matrices of attention, and in all matrices of the MLP."""
    return {
        "bias": attention and mlp,
        "attention_bias": attention and not mlp,
        "mlp_bias": mlp and not attention,
        "qkv_bias": False,
    }


def has_attention_bias(m: ModelConfig) -> bool:
    return m.bias or m.attention_bias


def has_mlp_bias(m: ModelConfig) -> bool:
    return m.bias or m.mlp_bias


def common(m: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that most families have."""
    layer_types = [_LAYER_TYPES[kind] for kind in stages.layer_kinds(m)]
    return {
        "hidden_size": m.width,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "intermediate_size": m.mlp_dim,
        "hidden_act": activation_name(m),
        "rms_norm_eps": m.norm_eps,
        "layer_types": layer_types,
        "sliding_window": m.window if "sliding_attention" in layer_types else None,
        "max_position_embeddings": m.position.max_length,
        **({"head_dim": m.head_dim} if m.head_dim else {}),
        **config_rope.write(m),
    }


def activation_name(m: ModelConfig) -> str:
    return next(name for name, activation in ACTIVATION_NAMES.items() if activation == m.activation)


def gelu_new(m: ModelConfig) -> str:
    """The name of the activation in GPT-2 and Phi, which call the tanh approximation gelu_new."""
    return "gelu_new" if m.activation == "gelu" else activation_name(m)


def integer(value: float) -> int | float:
    """Converts a whole number to int, because transformers checks the types in config.json."""
    return int(value) if value == int(value) else value
