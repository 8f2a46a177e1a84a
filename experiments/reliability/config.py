"""A small decoder that saves often: what the runs of this experiment train.

    python -m llm_jax.train --config=experiments/reliability/config.py --workdir=runs/one

60 steps on the standard library's text, a checkpoint every 5; the training itself takes seconds.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.tokenizer.vocab_size = 1024
    config.data.validation_fraction = 0.02
    config.model.update({"width": 64, "num_layers": 2, "mlp_dim": 128})
    config.optim.update({"warmup_steps": 5})
    config.train.update({"steps": 60, "batch_size": 8, "seq_len": 64})
    config.eval.update({"every": 20, "rows": 8, "final_rows": 0, "prompts": ()})
    config.checkpoint.update({"every": 5, "keep_last": 2, "keep_best": 0})
    return config
