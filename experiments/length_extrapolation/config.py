"""A decoder of 0.75 M parameters trained on windows of 64 tokens: what every run of this experiment starts from.

    python -m llm_jax.train --config=experiments/length_extrapolation/config.py --workdir=runs/one

One to two minutes on a CPU core; 2.02 (alibi) to 2.09 (t5) bits per byte, 2.05 with rope.
`sweep.py` says what is changed from run to run.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.tokenizer.vocab_size = 1024
    config.data.validation_fraction = 0.02
    # In all runs: the head is untied because concatenated positions need it so, and token embeddings are
    # scaled because sinusoids, whose entries are of size 1, would drown them.
    config.model.update(
        {"width": 128, "num_layers": 3, "mlp_dim": 256, "tie_embeddings": False, "scale_embeddings": True}
    )
    config.model.position.update({"max_length": 512, "width": 32})
    config.train.update({"steps": 500, "batch_size": 16, "seq_len": 64})
    config.eval.update({"every": 0, "prompts": ()})
    config.checkpoint.update({"every": 100, "keep_last": 1, "keep_best": 0})
    return config
