"""Small decoders that several experiments train: overrides of the recipe "default", training and held-out loss."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.data.rows import AnyRows, Batch, Row
from llm_jax.evaluation import held_out
from llm_jax.model.transformer import Transformer
from llm_jax.training import losses
from llm_jax.training.setup import Setup

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

_loss = jax.jit(losses.language_model, static_argnums=(0, 3))


def train(parts: Setup, params: Any, make_batch: Callable[[jax.Array], Batch], key: jax.Array) -> Any:
    """The weights after `train.steps` on generated batches.

    Args:
      params: the initial weights; None: random ones of `train.seed`.
      make_batch: key -> int32 (batch_size, seq_len) each; every step has its own key.
    """

    @jax.jit
    def batches(steps: jax.Array) -> Batch:
        return jax.lax.map(lambda step: make_batch(jax.random.fold_in(key, step)), steps)

    state, steps = parts.init(params), parts.config.train.steps
    for start in range(0, steps, 100):
        state, _ = parts.scan(state, batches(jnp.arange(start, min(start + 100, steps))))
    return state.params


def stack(rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """The arrays of rows, int32 (rows, T) each."""
    first, *others = rows
    return {name: np.stack([array, *(row[name] for row in others)]) for name, array in first.items()}


def evaluate(model: Transformer, params: Any, rows: AnyRows, batch_size: int, limit: int = 0) -> dict[str, float]:
    """The figures of `held_out.evaluate` on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return held_out.evaluate(lambda *arguments: _loss(model, *arguments, 0), params, rows, batch_size, device, limit)
