"""Llama 2 7B (Touvron et al. 2023, arXiv:2307.09288), weights and optimizer sharded over all devices.

    python -m llm_jax.plan --config=llama2_7b --topology=v5e:16x16 --batch_per_device=4        # no TPU is needed
    python -m llm_jax.train --config=llama2_7b --config.data.source=... --workdir=runs/llama2_7b

LoRA: --config.lora.rank=16 --config.init_from=CHECKPOINT. QLoRA: --config.quant.scheme=nf4 as well.
Matrix products are rounded to bfloat16, so gradients are summed over devices in bfloat16; a TPU accumulates each
product in float32.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.model.update({"vocab_size": 32000, "width": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32})
    config.model.update({"mlp_dim": 11008, "qk_norm": False, "tie_embeddings": False, "remat": "full"})
    config.model.precision.update({"compute": "bfloat16", "accumulate": "bfloat16", "output": "bfloat16"})
    config.model.position.max_length = 4096
    config.tokenizer.update({"kind": "bpe", "vocab_size": 32000})
    config.lora.update({"alpha": 32.0, "targets": ("linear",)})
    config.train.update({"steps": 10000, "batch_size": 256, "seq_len": 2048})
    config.optim.update({"lr": 3e-4, "warmup_steps": 2000, "final_lr_fraction": 0.1})
    config.mesh.update({"data": 1, "fsdp": -1})
    return config
