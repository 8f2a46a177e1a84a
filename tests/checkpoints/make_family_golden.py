"""Writes family_golden.json: config, tensor shapes and logits of a tiny model of every family, by transformers.

pip install torch transformers && python tests/checkpoints/make_family_golden.py
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
}
CLASSES = {"bert": transformers.BertModel}


def main() -> None:
    found = {}
    for name, config in MODELS.items():
        config._attn_implementation = "eager"
        make = CLASSES.get(name) or transformers.AutoModelForCausalLM.from_config
        model = make(config).eval()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) and name != "bert" else set()
        tensors = cases.tensors(name, {k: v for k, v in shapes.items() if k not in tied})
        state = {key: torch.tensor(value) for key, value in tensors.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= tied, (missing, unexpected)
        ids = torch.tensor(cases.ids(name))
        mask = torch.tensor(cases.MASK)  # padding on the right
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask)
        result = {"logits": out.logits} if name != "bert" else {"features": out[0], "pooled": out[1]}
        said = json.loads(config.to_json_string(use_diff=False))
        kept = {k: v for k, v in said.items() if not k.startswith("_") and k != "transformers_version"}
        found[name] = {
            "config": kept,
            "shapes": {k: list(v) for k, v in shapes.items() if k not in tied},
            **{key: value.double().numpy().round(7).tolist() for key, value in result.items()},
            "transformers": transformers.__version__,
        }
    path = pathlib.Path(__file__).with_name("family_golden.json")
    path.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in found.items()) + "\n}\n")


if __name__ == "__main__":
    main()
