"""Losses over batches."""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.data.rows import Batch
from llm_jax.errors import UserError
from llm_jax.model.attention import Tokens
from llm_jax.model.transformer import Transformer

# Letters of shapes: B batch, T time, C chunk of time, D width, V vocabulary.


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats: (..., V), int (...) -> float32 (...)."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def language_model(model: Transformer, params: Any, batch: Batch, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(sum of the cross-entropy over the counted targets, number of these), both float32 ().

    Args:
      chunk: positions whose logits exist at a time, forward and backward (they are computed again
        there); it divides T. 0: all at once.
    """
    where = Tokens(batch["positions"], batch["segments"])
    x_BTD, _ = model.apply({"params": params}, batch["inputs"], where, method="features")

    def part(x_BCD: jax.Array, targets_BC: jax.Array, mask_BC: jax.Array) -> jax.Array:
        logits_BCV: Any = model.apply({"params": params}, x_BCD, method="logits")
        return jnp.sum(cross_entropy(logits_BCV, targets_BC) * mask_BC)

    count = jnp.sum(batch["mask"]).astype(jnp.float32)
    length = x_BTD.shape[1]
    if chunk in (0, length):
        return part(x_BTD, batch["targets"], batch["mask"]), count

    def chunked(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(array.shape[0], length // chunk, chunk, *array.shape[2:]), 1, 0)

    def body(total: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(part)(*parts), None

    parts = tuple(chunked(a) for a in (x_BTD, batch["targets"], batch["mask"]))
    return jax.lax.scan(body, jnp.float32(0), parts)[0], count


def check_chunk(chunk: int, length: int) -> None:
    """Raises UserError unless `train.loss_chunk` divides `train.seq_len`."""
    if chunk < 0 or (chunk and length % chunk):
        raise UserError(f"config key 'train.loss_chunk' is {chunk}; it must divide train.seq_len={length}")
