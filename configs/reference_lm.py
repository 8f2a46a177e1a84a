"""The reference model: 13.8 M parameters, trained from scratch on the standard library's text and Shakespeare.

    python -m llm_jax.train --config=configs/reference_lm.py --workdir=runs/reference_lm

67 minutes on two shared CPU cores (jax 0.10.2), one pass over 4.9 M tokens. 2.041 bits per byte on 930 kB of held-out
text (modules of Python 3.11.7's library and works of Shakespeare); gzip -9 reaches 2.766, xz -9 2.405.

The same command resumes an interrupted run. The experiments on quantization, decoding and prompting use this model as
the full-precision model.
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.data.source = "stdlib,asset:shakespeare"
    config.tokenizer.vocab_size = 8192
    # Widths that groups of 32, 64 and 128 divide, so that every quantization scheme applies to every matrix.
    config.model.update({"width": 384, "num_layers": 6, "num_heads": 6, "num_kv_heads": 6, "mlp_dim": 1024})
    config.train.update({"steps": 2400, "batch_size": 8, "seq_len": 256})
    config.optim.update({"lr": 2e-3, "warmup_steps": 100})
    config.eval.update({"every": 250, "prompts": ("def ", "KING. My lord, "), "max_new_tokens": 96})
    config.checkpoint.update({"every": 100, "keep_last": 2, "keep_best": 1})
    return config
