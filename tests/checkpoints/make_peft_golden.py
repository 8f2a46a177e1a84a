"""Writes peft_golden.json: adapter_config.json, tensor shapes and logits of adapters of tiny models, by peft.

pip install torch transformers peft && python tests/checkpoints/make_peft_golden.py
"""

import copy
import json
import pathlib
import sys
import tempfile

import peft
import safetensors.numpy
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import family_cases as cases
from make_family_golden import MODELS
from transformers import AutoModelForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST = ("plain", "rank-stabilized", "dora", "embeddings", "fused", "fused-dora")  # logits of both rows
QUERIES = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
# name -> (family, settings of LoraConfig, and "resize": tokens that the base is resized to)
ADAPTERS = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ALL}),
    "rank-stabilized": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "dora": ("llama", {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ALL}),
    "embeddings": ("llama", {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "o_proj"]}),
    "fused": ("gpt2", {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "fused-dora": (
        "gpt2",
        {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    # Fused projections in the layouts of Phi-3 (with fewer key-value heads) and of GPT-NeoX (head by head).
    "phi3-fused": ("phi3", {"r": 3, "lora_alpha": 6, "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    "phi3-fused-dora": (
        "phi3",
        {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["qkv_proj", "gate_up_proj"]},
    ),
    "neox-fused": (
        "gpt_neox",
        {"r": 3, "lora_alpha": 6, "bias": "all", "target_modules": ["query_key_value", "dense"]},
    ),
    "neox-fused-bias": (
        "gpt_neox",
        {"r": 2, "lora_alpha": 4, "lora_bias": True, "target_modules": ["query_key_value"]},
    ),
    "neox-head": (
        "gpt_neox",
        {"r": 2, "lora_alpha": 4, "target_modules": ["query_key_value"], "modules_to_save": ["embed_in", "lm_head"]},
    ),
    # Beside what follows, the embeddings are saved as peft decides.
    "head": ("llama", {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head", "q_proj"]}),
    "head-dora": ("llama", {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["lm_head"]}),
    "embeddings-copied": ("llama", {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "o_proj"]}),
    "tied-head": ("llama3", {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head", "q_proj"]}),
    "tied-embeddings": ("llama3", {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "tied-both": (
        "llama3",
        {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "fused-embeddings": ("gpt2", {"r": 2, "lora_alpha": 4, "target_modules": ["wte", "c_fc"], "fan_in_fan_out": True}),
    "saved-head": ("llama", QUERIES | {"modules_to_save": ["lm_head"]}),
    "saved-both": ("llama", QUERIES | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved-norms": ("gemma2", QUERIES | {"modules_to_save": ["input_layernorm"]}),
    "saved-tied": ("llama3", QUERIES | {"modules_to_save": ["embed_tokens"]}),
    "saved-tied-both": ("llama3", QUERIES | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "biases": ("gpt2", {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "biases-of-targets": ("qwen2", QUERIES | {"bias": "lora_only"}),
    "lora-bias": ("qwen2", QUERIES | {"lora_bias": True}),
    "tokens": ("llama", QUERIES | {"trainable_token_indices": [3, 40]}),
    "tokens-tied": ("llama3", QUERIES | {"trainable_token_indices": [5, 40, 63]}),
    "tokens-of-both": ("llama", QUERIES | {"trainable_token_indices": {"embed_tokens": [3, 40], "lm_head": [4]}}),
    "tokens-tied-of-both": ("llama3", QUERIES | {"trainable_token_indices": {"embed_tokens": [3, 40], "lm_head": [4]}}),
    "tokens-tied-same": ("llama3", QUERIES | {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [3, 9]}}),
    "resized": ("llama", QUERIES | {"resize": 67}),
    "resized-tied": ("llama3", QUERIES | {"resize": 67}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            # peft sorts the keys when it writes them; the first that matches counts.
            "rank_pattern": {
                r".*\.2\..*": 5,
                r"layers\.[01]\.self_attn\.v_proj": 2,
                r"layers\.\d+\.self_attn\.q_proj": 3,
            },
            "alpha_pattern": {
                r"(?!model).*v_proj": 7,
                r".*\.[02]\.mlp\.(up|down)_proj": 2.5,
                r"^model\.layers\.1\.mlp\.\w+": 6,
                r"layers\.1\..*": 3,
            },
        },
    ),
}


def built(family: str) -> tuple[torch.nn.Module, dict[str, tuple[int, ...]]]:
    """A tiny model, and the shapes of its tensors."""
    config = copy.deepcopy(MODELS[family])
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if getattr(config, "tie_word_embeddings", False):
        shapes.pop("lm_head.weight")
    tensors = {k: torch.tensor(v) for k, v in cases.tensors(family, shapes).items()}
    model.load_state_dict(tensors, strict=False)
    return model, shapes


def main() -> None:
    found = {}
    for name, (family, settings) in ADAPTERS.items():
        model, _ = built(family)
        settings = dict(settings)
        size = settings.pop("resize", None)
        if size:
            model.resize_token_embeddings(size)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        copied: bool | str = False if name in ("embeddings",) else bool(size) or "auto"
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory)
            wrapped.save_pretrained(path, save_embedding_layers=copied)
            config = json.loads((path / "adapter_config.json").read_text())
            saved = safetensors.numpy.load_file(path / "adapter_model.safetensors")
            drawn = cases.adapters(name, {k: v.shape for k, v in saved.items()})
            safetensors.numpy.save_file(drawn, path / "adapter_model.safetensors")
            model, _ = built(family)
            if size:
                model.resize_token_embeddings(size)
            wrapped = peft.PeftModel.from_pretrained(model, path)
        with torch.no_grad():
            logits = wrapped.eval()(input_ids=torch.tensor(cases.ids(family))).logits
        if isinstance(config["target_modules"], list):
            config["target_modules"] = sorted(config["target_modules"])
        found[name] = {
            "family": family,
            "config": config,
            "shapes": {k: list(v.shape) for k, v in saved.items()},
            "logits": logits.double().numpy().round(7)[: 2 if name in FIRST else 1].tolist(),
            "peft": peft.__version__,
        }
    path = pathlib.Path(__file__).with_name("peft_golden.json")
    path.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in found.items()) + "\n}\n")


if __name__ == "__main__":
    main()
