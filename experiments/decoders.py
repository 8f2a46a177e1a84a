"""Decoders that several experiments train, as overrides of the recipe "default"."""

from typing import Any

# About 1 M parameters: a minute on two CPU cores, 2.0 to 2.2 bits per byte.
SMALL: dict[str, Any] = {
    "tokenizer.vocab_size": 1024,
    "data.validation_fraction": 0.02,
    "model.width": 128,
    "model.num_layers": 3,
    "model.mlp_dim": 256,
    "train.steps": 500,
    "train.batch_size": 16,
    "train.seq_len": 64,
    "eval.every": 0,
    "eval.prompts": (),
    "checkpoint.every": 100,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 0,
}
# For comparisons of positions: concatenated ones need an untied head, and sinusoids, whose entries are of size 1, would
# drown token embeddings that are not scaled.
UNTIED = SMALL | {
    "model.tie_embeddings": False,
    "model.scale_embeddings": True,
    "model.position.max_length": 512,
    "model.position.width": 32,
}
# 12 layers, for an accelerator.
FULL = SMALL | {
    "tokenizer.vocab_size": 8192,
    "model.width": 768,
    "model.num_layers": 12,
    "model.num_heads": 12,
    "model.num_kv_heads": 12,
    "model.mlp_dim": 2048,
    "model.precision.compute": "bfloat16",
    "train.steps": 20000,
    "train.batch_size": 64,
    "train.seq_len": 512,
    "optim.lr": 6e-4,
    "optim.warmup_steps": 1000,
}
