"""A small decoder that saves often: what the runs of this experiment train.

    python -m llm_jax.train --config=experiments/reliability/config.py --workdir=runs/one

60 steps on the standard library's text, a checkpoint every 5; the training itself takes seconds.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

default = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "default.py"))


def get_config() -> ConfigDict:
    config = default["get_config"]()
    config.tokenizer.vocab_size = 1024
    config.data.validation_fraction = 0.02
    config.model.update({"width": 64, "num_layers": 2, "mlp_width": 128})
    config.optim.update({"warmup_steps": 5})
    config.train.update({"steps": 60, "batch_size": 8, "seq_len": 64})
    config.eval.update({"every": 20, "rows": 8, "prompts": ()})
    config.checkpoint.update({"every": 5, "keep_last": 2, "keep_best": 0})
    return config
