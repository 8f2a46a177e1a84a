"""Llama 2 70B (Touvron et al. 2023, arXiv:2307.09288), weights and optimizer sharded over all devices.

    python -m llm_jax.plan --config=llama2_70b --topology=v5p:8x8x8 --batch_per_device=1       # no TPU is needed

LoRA, QLoRA and precision: see configs/llama2_7b.py.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("llama2_7b")
    config.model.update({"width": 8192, "num_layers": 80, "num_heads": 64, "num_kv_heads": 8, "mlp_dim": 28672})
    config.optim.lr = 1.5e-4
    config.train.update({"batch_size": 1024, "seq_len": 4096})
    return config
