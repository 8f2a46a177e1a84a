"""Writes family_golden.json: config, tensor shapes and logits of a tiny model of every family, by transformers.

pip install torch transformers && python tests/checkpoints/make_family_golden.py [NAME ...]
"""

import json
import pathlib
import sys

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import family_cases as cases

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 5e5,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 0.7,
    "truncate": False,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "rope_theta": 1e4,
}
MSCALE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.5,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "rope_theta": 1e4,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 1.5, 3.0, 4.0]}
GEMMA = GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}
MODELS = {
    "gpt2": transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama3": transformers.LlamaConfig(**GROUPED, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=6),
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "qwen2-sliding": transformers.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
    "gemma3": transformers.Gemma3TextConfig(
        **GEMMA,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "phi": transformers.PhiConfig(**COMMON),
    "bert": transformers.BertConfig(**COMMON),
    "llama-attention-bias": transformers.LlamaConfig(**GROUPED, attention_bias=True, rope_parameters=YARN),
    "llama-mlp-bias": transformers.LlamaConfig(**GROUPED, mlp_bias=True, rope_parameters=MSCALE),
    "qwen3-bias": transformers.Qwen3Config(**GROUPED, head_dim=16, attention_bias=True),
    "phi-qk-norm": transformers.PhiConfig(**COMMON, qk_layernorm=True),
    "phi-tied": transformers.PhiConfig(**COMMON, tie_word_embeddings=True),
    "gpt2-inverse": transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        scale_attn_by_inverse_layer_idx=True,
        scale_attn_weights=False,
    ),
    "smollm3": transformers.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1]),
    "olmo2": transformers.Olmo2Config(**GROUPED),
    "granite": transformers.GraniteConfig(
        **GROUPED, embedding_multiplier=6.0, attention_multiplier=0.25, residual_multiplier=0.4, logits_scaling=4.0
    ),
    "starcoder2": transformers.Starcoder2Config(**GROUPED, sliding_window=6),
    "gpt_neox": transformers.GPTNeoXConfig(**COMMON, rotary_pct=0.5, hidden_act="gelu_fast"),
    "gpt_neox-sequential": transformers.GPTNeoXConfig(**COMMON, use_parallel_residual=False, attention_bias=False),
    "phi3": transformers.Phi3Config(**GROUPED, sliding_window=6),
    "phi3-longrope-short": transformers.Phi3Config(
        **GROUPED, original_max_position_embeddings=16, rope_scaling=LONGROPE
    ),
    "phi3-longrope-long": transformers.Phi3Config(**GROUPED, original_max_position_embeddings=8, rope_scaling=LONGROPE),
}
CLASSES = {"bert": transformers.BertModel}


def main() -> None:
    path = pathlib.Path(__file__).with_name("family_golden.json")
    golden = json.loads(path.read_text()) if path.exists() else {}
    for name, config in MODELS.items():
        if name in sys.argv[1:] or not sys.argv[1:]:
            golden[name] = outputs(name, config)
    path.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(golden[k])}' for k in MODELS) + "\n}\n")


def outputs(name: str, config: transformers.PretrainedConfig) -> dict[str, object]:
    """Config, tensor shapes and outputs of a model, as JSON values."""
    config._attn_implementation = "eager"
    model = (CLASSES.get(name) or transformers.AutoModelForCausalLM.from_config)(config).eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) and name != "bert" else set()
    tensors = cases.tensors(name, {k: v for k, v in shapes.items() if k not in tied})
    state = {key: torch.tensor(value) for key, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    mask = torch.tensor(cases.MASK)  # padding on the right
    with torch.no_grad():
        out = model(input_ids=torch.tensor(cases.ids(name)), attention_mask=mask)
    result = {"logits": out.logits} if name != "bert" else {"features": out[0], "pooled": out[1]}
    settings = json.loads(config.to_json_string(use_diff=False))
    return {
        "config": {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"},
        "shapes": {k: list(v) for k, v in shapes.items() if k not in tied},
        **{key: value.double().numpy().round(7).tolist() for key, value in result.items()},
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
