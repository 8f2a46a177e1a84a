"""The geometry of Llama 2 7B, to be planned, not trained, on a small machine.

    python -m llm_jax.plan --memory --config=configs/llama_7b.py          # two minutes, little memory

Adapters of rank 16 on all linear layers, one row of 1,024 tokens. The step is compiled from shapes; no weights are
loaded.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.model.update({"vocab_size": 32000, "width": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32})
    config.model.update({"mlp_dim": 11008, "qk_norm": False, "tie_embeddings": False})
    config.model.position.max_length = 4096
    config.lora.update({"rank": 16, "alpha": 32.0, "targets": ("linear",)})
    config.train.update({"batch_size": 1, "seq_len": 1024, "loss_chunk": 256})
    return config
