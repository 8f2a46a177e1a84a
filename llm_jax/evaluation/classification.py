"""Accuracy of a language model that answers with one of a few words."""

from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from llm_jax.data.rows import Batch, batches
from llm_jax.evaluation.ask import wilson
from llm_jax.evaluation.sentiment import Examples
from llm_jax.model.attention import Tokens
from llm_jax.model.transformer import Transformer

# Letters of shapes: B batch, T time, N examples in a row, D width, V vocabulary.


def correct(model: Transformer, params: Any, batch: Batch, options: tuple[int, ...], most: int) -> Any:
    """(right answers, answers), int32 () each: the likeliest of `options` at the first token that counts.

    Args:
      options: the first token of each answer that may be given.
      most: examples in the fullest row.
    """
    where = Tokens(batch["positions"], batch["segments"])
    x_BTD, _ = model.apply({"params": params}, batch["inputs"], where, method="features")
    mask_BT = batch["mask"]
    begins_BT = mask_BT * (1 - jnp.pad(mask_BT, ((0, 0), (1, 0)))[:, :-1])
    there_BN, places_BN = jax.lax.top_k(begins_BT, most)
    x_BND = jnp.take_along_axis(x_BTD, places_BN[..., None], 1)
    logits_BNV: Any = model.apply({"params": params}, x_BND, method="logits")
    allowed = jnp.asarray(options)
    said_BN = allowed[jnp.argmax(logits_BNV[..., allowed], -1)]
    right_BN = said_BN == jnp.take_along_axis(batch["targets"], places_BN, 1)
    return jnp.sum(right_BN * there_BN), jnp.sum(there_BN)


def accuracy(model: Transformer, params: Any, rows: Examples, size: int, sharding: Any) -> dict[str, float]:
    """{"accuracy", "low", "high", "right", "count"} over all rows, with the 95 % interval of `wilson`.

    Args:
      size: rows at a time.
      sharding: of a batch.
    """
    one = jax.jit(lambda params, batch: correct(model, params, batch, rows.options, rows.most))
    steps = -(-len(rows) // size)
    right = count = 0
    for batch in tqdm(batches(rows, 0, steps, size, sharding), "answering", steps, leave=False, disable=None):
        found = one(params, batch)
        right, count = right + int(found[0]), count + int(found[1])
    low, high = wilson(right, count)
    return {"accuracy": right / count, "low": low, "high": high, "right": right, "count": count}


def say(found: dict[str, float]) -> str:
    """What `accuracy` found, in words."""
    interval = f"95 % interval {found['low']:.1%} to {found['high']:.1%}"
    return f"{found['accuracy']:.1%} of {found['count']:,} right, {interval}"
