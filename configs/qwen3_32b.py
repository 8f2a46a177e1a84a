"""Qwen3 32B (Yang et al. 2025, arXiv:2505.09388), weights and optimizer sharded over all devices.

    python -m llm_jax.plan --config=qwen3_32b --topology=v5p:4x4x8 --batch_per_device=1        # no TPU is needed

LoRA, QLoRA and precision: see configs/llama2_7b.py.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("llama2_7b")
    config.model.update({"vocab_size": 151936, "width": 5120, "num_layers": 64, "num_heads": 64, "num_kv_heads": 8})
    config.model.update({"head_dim": 128, "mlp_dim": 25600, "norm_eps": 1e-6, "qk_norm": True})
    config.model.position.update({"base": 1e6, "max_length": 40960})
    config.tokenizer.vocab_size = 151936
    config.train.seq_len = 4096
    return config
