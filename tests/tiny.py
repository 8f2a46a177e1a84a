"""A model of a few thousand parameters, for tests: compiles in seconds."""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.tokenizer.kind = "byte"
    config.model.update({"width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48})
    config.optim.update({"lr": 1e-2, "warmup_steps": 2})
    config.train.update({"steps": 8, "batch_size": 8, "seq_len": 32})
    config.eval.update({"every": 4, "rows": 8, "final_rows": 0, "prompts": (), "max_new_tokens": 8})
    config.checkpoint.update({"every": 4})
    return config
