"""Attention layers of transformers and their settings here: what make_layer_golden.py and the tests share.

Weights and inputs come from one frozen generator, so that the golden file holds outputs only.
"""

import numpy as np

WIDTH, HEADS, KV_HEADS, LENGTH, ORIGINAL = 32, 4, 2, 24, 16
YARN = {"scaling_factor": 4.0, "original_length": ORIGINAL, "beta_fast": 2.0, "beta_slow": 0.25}
LLAMA3 = {"scaling_factor": 4.0, "original_length": ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Name -> (changes of the model's config, changes of model.position).
CASES = {
    "llama": ({"num_kv_heads": KV_HEADS}, {"kind": "rope"}),
    "llama-linear": ({"num_kv_heads": KV_HEADS}, {"kind": "rope", "scaling": "linear", "scaling_factor": 4.0}),
    "llama-dynamic": (
        {"num_kv_heads": KV_HEADS},
        {"kind": "rope", "scaling": "dynamic", "scaling_factor": 4.0, "original_length": ORIGINAL},
    ),
    "llama-yarn": ({"num_kv_heads": KV_HEADS}, {"kind": "rope", "scaling": "yarn", **YARN}),
    "llama-llama3": ({"num_kv_heads": KV_HEADS}, {"kind": "rope", "scaling": "llama3", **LLAMA3}),
    "phi": ({"bias": True}, {"kind": "rope", "partial_rotary_factor": 0.5}),
    "bloom": ({"bias": True}, {"kind": "alibi"}),
    "t5-decoder": ({}, {"kind": "t5", "num_buckets": 8, "max_distance": 20}),
    "t5-encoder": ({"causal": False}, {"kind": "t5", "num_buckets": 8, "max_distance": 20}),
}

# A whole one-layer model, because learned positions stand before the layers.
GPT2 = ({"mlp": "plain", "mlp_dim": 64, "activation": "gelu", "norm": "layer", "bias": True}, {"kind": "learned"})
GPT2_VOCAB = 50


def draws(name: str) -> np.random.RandomState:
    return np.random.RandomState(sum(map(ord, name)))


def attention(draw: np.random.RandomState, kv_heads: int, bias: bool) -> dict[str, np.ndarray]:
    """Weights by our names and in our orientation, (in, out)."""
    h = WIDTH // HEADS
    widths = {"query": WIDTH, "key": kv_heads * h, "value": kv_heads * h, "out": WIDTH}
    made = {name: draw.standard_normal((WIDTH, out)).astype(np.float32) * 0.3 for name, out in widths.items()}
    if bias:
        made |= {f"{name}_bias": draw.standard_normal(out).astype(np.float32) * 0.3 for name, out in widths.items()}
    return made


def layer(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(weights, T5's table of biases (buckets, heads), input (1, LENGTH, WIDTH)) of a case."""
    changes, _ = CASES[name]
    draw = draws(name)
    weights = attention(draw, changes.get("num_kv_heads", HEADS), changes.get("bias", False))
    table = draw.standard_normal((8, HEADS)).astype(np.float32)
    return weights, table, draw.standard_normal((1, LENGTH, WIDTH)).astype(np.float32)


def gpt2() -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """(weights by module, token ids (1, LENGTH)) of the GPT-2 case."""
    draw = draws("gpt2")

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32) * 0.3

    def norm() -> dict[str, np.ndarray]:
        return {"scale": 1 + normal(WIDTH), "bias": normal(WIDTH)}

    weights = {
        "embed": {"table": normal(GPT2_VOCAB, WIDTH), "position_table": normal(LENGTH, WIDTH)},
        "attention": attention(draw, HEADS, True),
        "mlp": {"up": normal(WIDTH, 64), "up_bias": normal(64), "down": normal(64, WIDTH), "down_bias": normal(WIDTH)},
        "attention_norm": norm(),
        "mlp_norm": norm(),
        "final_norm": norm(),
    }
    return weights, draw.randint(0, GPT2_VOCAB, (1, LENGTH))
