"""Tiny models of every architecture of ggml that GGUF files are written for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import checkpoints
from llm_jax.checkpoints.families import neutral
from llm_jax.model.transformer import Transformer

ROPE = neutral().position
GEMMA = {
    "norm_placement": "both",
    "scale_embeddings": True,
    "activation": "gelu",
    "attention_scale": 32**-0.5,
    "logit_softcap": 4.0,
    "layer_pattern": ("local", "global"),
    "window": 6,
    "tie_embeddings": True,
}
PLAIN = {"mlp": "plain", "norm": "layer", "bias": True, "activation": "gelu", "num_kv_heads": 4, "head_dim": 0}
CHANGES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "head_dim": 0},
    "qwen3": {"qk_norm": True},
    "gemma2": GEMMA | {"attention_softcap": 3.0},
    "gemma3": GEMMA | {"qk_norm": True, "position": dataclasses.replace(ROPE, base=1e6, local_base=1e4)},
    "phi2": PLAIN
    | {"parallel_residual": True, "head_bias": True, "position": dataclasses.replace(ROPE, partial_rotary_factor=0.5)},
    "gpt2": PLAIN | {"tie_embeddings": True, "position": dataclasses.replace(ROPE, kind="learned", max_length=1024)},
    "bert": PLAIN
    | {
        "activation": "gelu_exact",
        "norm_placement": "post",
        "embed_norm": True,
        "type_vocab_size": 2,
        "causal": False,
        "tie_embeddings": True,
        "position": dataclasses.replace(ROPE, kind="learned", max_length=64),
    },
    "smollm3": {"num_layers": 4, "layer_pattern": ("global", "global", "global", "nope")},
    "olmo2": {"head_dim": 0, "norm_placement": "output", "qk_norm": True, "qk_norm_axis": "width"},
    "granite": {
        "head_dim": 0,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.4,
        "attention_scale": 0.25,
        "logits_scaling": 4.0,
    },
    "starcoder2": PLAIN | {"num_kv_heads": 2, "tie_embeddings": True},
    "gptneox": PLAIN
    | {
        "parallel_residual": True,
        "parallel_norms": True,
        "position": dataclasses.replace(ROPE, base=5000.0, partial_rotary_factor=0.25),
    },
}


def small(arch, vocab_size, **changes):
    """(config, parameters) of a tiny model that an architecture of ggml holds."""
    shape = {"width": 64, "head_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 96}
    config = dataclasses.replace(neutral(), vocab_size=vocab_size, **shape | CHANGES[arch] | changes)
    abstract = checkpoints.abstract_params(Transformer(config))
    draw = np.random.RandomState(0)
    return config, jax.tree.map(lambda w: jnp.asarray(draw.standard_normal(w.shape).astype(np.float32)), abstract)


def llama3(factor=8.0, length=8192, low=1.0, high=4.0):
    return dataclasses.replace(
        ROPE,
        base=500000.0,
        scaling="llama3",
        scaling_factor=factor,
        original_length=length,
        low_freq_factor=low,
        high_freq_factor=high,
    )
