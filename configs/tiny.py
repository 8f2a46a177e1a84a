"""A model of 0.1 million parameters on the source code of the standard library, for trying commands; half a minute.

python -m llm_jax.train --config=tiny --workdir=runs/tiny

The examples of the documentation use it. Its tokens are bytes. It is far too small to write code: it reaches about 4
bits per byte after 100 steps; an untrained model has 8.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.tokenizer.kind = "byte"
    config.model.update({"width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 192})
    config.optim.lr = 1e-2
    config.train.update({"steps": 100, "batch_size": 16, "seq_len": 64})
    config.eval.update({"every": 25, "rows": 16, "final_rows": 128, "max_new_tokens": 32})
    config.checkpoint.update({"every": 50})
    return config
