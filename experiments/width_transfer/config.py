"""A decoder of width 32 to 256 on bytes of the standard library: what every run of this experiment starts from.

    python -m llm_jax.train --config=experiments/width_transfer/config.py --workdir=runs/one --config.model.width=64

A few seconds on two CPU cores. `sweep.py` says what is changed from run to run.
"""

from ml_collections import ConfigDict

from llm_jax import configuration

HEAD_WIDTH = 8  # of every width: wider models have more heads


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.tokenizer.kind = "byte"
    config.data.validation_fraction = 0.02
    config.model.update({"width": 32, "base_width": 32, "num_layers": 2, "mlp_dim": 64})
    config.model.update({"num_heads": 4, "num_kv_heads": 4, "head_dim": HEAD_WIDTH})
    config.optim.update({"warmup_steps": 20})
    config.train.update({"steps": 300, "batch_size": 16, "seq_len": 64})
    config.eval.update({"every": 0, "prompts": ()})
    config.checkpoint.update({"every": 0})
    return config
