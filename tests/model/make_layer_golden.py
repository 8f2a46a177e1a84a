"""Writes layer_golden.npz: what transformers' own layers make of the inputs of layer_cases.py.

pip install torch transformers && python tests/model/make_layer_golden.py
"""

import pathlib

import layer_cases as cases
import numpy as np
import torch
import transformers
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.phi.modeling_phi import PhiAttention, PhiRotaryEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

MASK = torch.triu(torch.full((cases.LENGTH, cases.LENGTH), -1e9), 1)[None, None]
ROPE = {
    "llama": {"rope_type": "default"},
    "llama-linear": {"rope_type": "linear", "factor": 4.0},
    "llama-dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama-yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": cases.ORIGINAL,
        "beta_fast": 2.0,
        "beta_slow": 0.25,
    },
    "llama-llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": cases.ORIGINAL,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def fill(module: torch.nn.Module, values: dict[str, np.ndarray]) -> None:
    state = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in values.items()}
    assert module.load_state_dict(state, strict=True)


def named(weights: dict[str, np.ndarray], names: dict[str, str]) -> dict[str, np.ndarray]:
    """Our weights by torch's names, matrices turned to (out, in)."""
    found = {f"{names[k]}.weight": w.T for k, w in weights.items() if not k.endswith("_bias")}
    return found | {f"{names[k[:-5]]}.bias": w for k, w in weights.items() if k.endswith("_bias")}


def rotary(name: str, weights: dict[str, np.ndarray], x: torch.Tensor) -> torch.Tensor:
    common = {
        "hidden_size": cases.WIDTH,
        "num_attention_heads": cases.HEADS,
        "max_position_embeddings": cases.ORIGINAL,
        "attn_implementation": "eager",
    }
    if name == "phi":
        parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        config = transformers.PhiConfig(**common, rope_parameters=parameters)
        module, embedding, out = PhiAttention(config, 0), PhiRotaryEmbedding(config), "dense"
    else:
        parameters = ROPE[name] | {"rope_theta": 10000.0}
        config = transformers.LlamaConfig(**common, num_key_value_heads=cases.KV_HEADS, rope_parameters=parameters)
        module, embedding, out = LlamaAttention(config, 0), LlamaRotaryEmbedding(config), "o_proj"
    fill(module, named(weights, {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": out}))
    return module.eval()(x, embedding(x, torch.arange(cases.LENGTH)[None]), MASK)[0]


def bloom(weights: dict[str, np.ndarray], x: torch.Tensor) -> torch.Tensor:
    config = transformers.BloomConfig(hidden_size=cases.WIDTH, n_head=cases.HEADS)
    module = BloomAttention(config, 0)

    def fused(suffix: str) -> np.ndarray:  # (heads, three, head width) rows
        parts = [weights[n + suffix].T.reshape(cases.HEADS, -1, *weights[n + suffix].shape[:-1]) for n in QKV]
        return np.stack(parts, 1).reshape(-1, *weights["query" + suffix].shape[:-1])

    values = {"query_key_value.weight": fused(""), "query_key_value.bias": fused("_bias").reshape(-1)}
    values |= {"dense.weight": weights["out"].T, "dense.bias": weights["out_bias"]}
    fill(module, values)
    alibi = build_alibi_tensor(torch.ones(1, cases.LENGTH), cases.HEADS, torch.float32)
    return module.eval()(x, torch.zeros_like(x), alibi, MASK)[0]


QKV = ("query", "key", "value")


def t5(name: str, weights: dict[str, np.ndarray], table: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    decoder = name == "t5-decoder"
    config = transformers.T5Config(
        d_model=cases.WIDTH,
        d_kv=cases.WIDTH // cases.HEADS,
        num_heads=cases.HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        is_decoder=decoder,
    )
    config._attn_implementation = "eager"
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    # T5 does not divide the scores by sqrt(head width); here it is divided out of the queries.
    scaled = weights | {"query": weights["query"] / np.float32((cases.WIDTH // cases.HEADS) ** 0.5)}
    values = named(scaled, {"query": "q", "key": "k", "value": "v", "out": "o"})
    fill(module, values | {"relative_attention_bias.weight": table})
    return module.eval()(x, MASK if decoder else None)[0]


def gpt2() -> torch.Tensor:
    weights, ids = cases.gpt2()
    config = transformers.GPT2Config(
        vocab_size=cases.GPT2_VOCAB,
        n_positions=cases.LENGTH,
        n_embd=cases.WIDTH,
        n_layer=1,
        n_head=cases.HEADS,
        n_inner=64,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    a, m, e = weights["attention"], weights["mlp"], weights["embed"]
    block = "transformer.h.0."
    values = {
        "transformer.wte.weight": e["table"],
        "transformer.wpe.weight": e["position_table"],
        "lm_head.weight": e["table"],
        block + "attn.c_attn.weight": np.concatenate([a[n] for n in QKV], 1),
        block + "attn.c_attn.bias": np.concatenate([a[n + "_bias"] for n in QKV]),
        block + "attn.c_proj.weight": a["out"],
        block + "attn.c_proj.bias": a["out_bias"],
        block + "mlp.c_fc.weight": m["up"],
        block + "mlp.c_fc.bias": m["up_bias"],
        block + "mlp.c_proj.weight": m["down"],
        block + "mlp.c_proj.bias": m["down_bias"],
    }
    norms = {"attention_norm": block + "ln_1", "mlp_norm": block + "ln_2", "final_norm": "transformer.ln_f"}
    for ours, theirs in norms.items():
        values |= {f"{theirs}.weight": weights[ours]["scale"], f"{theirs}.bias": weights[ours]["bias"]}
    fill(model, values)
    return model(torch.tensor(ids)).logits


def main() -> None:
    found = {"gpt2": gpt2()}
    for name in cases.CASES:
        weights, table, x = cases.layer(name)
        x = torch.tensor(x)
        family = name.split("-")[0]
        if family == "t5":
            found[name] = t5(name, weights, table, x)
        else:
            found[name] = bloom(weights, x) if family == "bloom" else rotary(name, weights, x)
    arrays = {name: value.detach().numpy() for name, value in found.items()}
    np.savez_compressed(pathlib.Path(__file__).with_name("layer_golden.npz"), **arrays)


if __name__ == "__main__":
    main()
