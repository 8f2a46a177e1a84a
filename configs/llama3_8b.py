"""Llama 3 8B (Dubey et al. 2024, arXiv:2407.21783), weights and optimizer sharded over all devices.

    python -m llm_jax.plan --config=llama3_8b --topology=v5p:4x4x4 --batch_per_device=2        # no TPU is needed

LoRA, QLoRA and precision: see configs/llama2_7b.py.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("llama2_7b")
    config.model.update({"vocab_size": 128256, "num_kv_heads": 8, "mlp_dim": 14336})
    config.model.position.update({"base": 500000.0, "max_length": 8192})
    config.tokenizer.vocab_size = 128256
    config.train.seq_len = 8192
    return config
