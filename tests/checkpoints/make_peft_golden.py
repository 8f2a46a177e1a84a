"""Writes peft_golden.json: adapter_config.json, tensor shapes and logits of adapters of tiny models, by peft.

pip install torch transformers peft && python tests/checkpoints/make_peft_golden.py
"""

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
# name -> (family, settings)
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
}


def main() -> None:
    found = {}
    for name, (family, settings) in ADAPTERS.items():
        config = MODELS[family]
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).eval()
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        if getattr(config, "tie_word_embeddings", False):
            shapes.pop("lm_head.weight")
        tensors = {k: torch.tensor(v) for k, v in cases.tensors(family, shapes).items()}
        model.load_state_dict(tensors, strict=False)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory)
            wrapped.save_pretrained(path, save_embedding_layers=False)
            said = json.loads((path / "adapter_config.json").read_text())
            saved = safetensors.numpy.load_file(path / "adapter_model.safetensors")
            drawn = cases.adapters(name, {k: v.shape for k, v in saved.items()})
            safetensors.numpy.save_file(drawn, path / "adapter_model.safetensors")
            wrapped.load_adapter(path, "drawn")
        wrapped.set_adapter("drawn")
        with torch.no_grad():
            logits = wrapped.eval()(input_ids=torch.tensor(cases.ids(family))).logits
        said["target_modules"] = sorted(said["target_modules"])
        found[name] = {
            "family": family,
            "config": said,
            "shapes": {k: list(v.shape) for k, v in saved.items()},
            "logits": logits.double().numpy().round(7).tolist(),
            "peft": peft.__version__,
        }
    path = pathlib.Path(__file__).with_name("peft_golden.json")
    path.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in found.items()) + "\n}\n")


if __name__ == "__main__":
    main()
