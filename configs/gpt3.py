"""The geometry of GPT-3 175B (Brown et al. 2020, arXiv:2005.14165, table 2.1), for planning on a small machine.

    python -m llm_jax.train --config=configs/gpt3.py --workdir=runs/gpt3 --dry_run --devices=8 --config.mesh.fsdp=8

All layers are dense, as in GPT-2; the sparse attention pattern of every other layer of GPT-3 is not published. For the
other sizes in the table of the paper, use overrides; for example, Small (125M) has width 768, 12 layers, 12 heads and
mlp_dim 3072.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.model.update({"vocab_size": 50257, "width": 12288, "num_layers": 96, "num_heads": 96, "num_kv_heads": 96})
    config.model.update({"mlp_dim": 4 * 12288, "norm": "layer", "bias": True, "qk_norm": False})
    config.model.update({"mlp": "plain", "activation": "gelu", "tie_embeddings": True})
    config.model.position.update({"kind": "learned", "max_length": 2048})
    config.train.update({"seq_len": 2048})
    return config
