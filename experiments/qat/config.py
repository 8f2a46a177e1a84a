"""A decoder of 1 M parameters, the full-precision start of every run of this experiment.

    python -m llm_jax.train --config=experiments/qat/config.py --workdir=runs/one

About a minute on two CPU cores, 2.2 bits per byte. `sweep.py` says what is changed from run to run.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.tokenizer.vocab_size = 1024
    config.data.validation_fraction = 0.02
    config.model.update({"width": 128, "num_layers": 3, "mlp_dim": 256})
    config.train.update({"steps": 500, "batch_size": 16, "seq_len": 64})
    config.eval.update({"every": 0, "prompts": ()})
    config.checkpoint.update({"every": 100, "keep_last": 1, "keep_best": 0})
    return config
