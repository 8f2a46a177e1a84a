"""An encoder with BERT's architecture (learned positions, segment embeddings, post-norm) that predicts masked words.

    python -m llm_jax.train --config=configs/mlm.py --workdir=runs/mlm

4.3 M parameters; 15 % of the words of Shakespeare are masked, each as a whole. Held-out loss in nats per masked token:
5.96, 5.84, 5.81 and 5.79 after 250, 500, 750 and 1,000 steps; a prediction by word frequency has 6.36. Took 15 minutes
on half an Intel Xeon core with AMX, with --config.model.precision.compute=bfloat16 --config.model.scan_layers=False.
This run is short, so the model learns little. `loss.masked=tokens` masks single tokens, which is an easier task.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.data.source = "asset:shakespeare"
    config.tokenizer.update({"kind": "wordpiece", "vocab_size": 4096})
    config.loss.update({"masked": "words", "mask_prob": 0.15})
    config.model.update({"causal": False, "type_vocab_size": 2, "embed_norm": True, "norm": "layer", "norm_eps": 1e-12})
    config.model.update({"norm_placement": "post", "qk_norm": False, "bias": True})
    config.model.update({"mlp": "plain", "mlp_dim": 1024, "activation": "gelu_exact"})
    config.model.position.update({"kind": "learned", "max_length": 512})
    config.train.update({"steps": 1000, "batch_size": 16, "seq_len": 128, "loss_chunk": 32})
    config.optim.update({"lr": 1e-3, "warmup_steps": 100, "schedule": "linear", "weight_decay": 0.01, "beta2": 0.999})
    config.eval.update({"every": 250, "rows": 128, "final_rows": 0, "prompts": ()})
    config.checkpoint.update({"every": 100})
    return config
