"""Held-out loss, perplexity and bits per byte."""

import math
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from llm_jax.data.rows import AnyRows, Batch, batches
from llm_jax.errors import UserError

LossFunction = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def evaluate(
    loss: LossFunction, params: Any, rows: AnyRows, batch_size: int, sharding: jax.sharding.Sharding, limit: int = 0
) -> dict[str, float]:
    """Figures over the first `limit` rows (0: all), whose windows do not overlap.

    Args:
      loss: (params, batch) -> (sum of nats, number of targets), jitted.

    Returns:
      loss: nats per token. perplexity: its exponential. tokens: targets counted, EOS included.
      bits_per_byte: all nats in bits over the bytes of the text; exact for all rows, and for a part
      of them by the bytes per token of the whole. This one compares across tokenizers.

    Raises:
      UserError: no target counts.
    """
    count_rows = min(limit, len(rows)) if limit else len(rows)
    steps = -(-count_rows // batch_size)
    sums: list[tuple[jax.Array, jax.Array]] = []
    stream = batches(rows, 0, steps, batch_size, sharding)
    for batch in tqdm(stream, "evaluating", steps, leave=False, delay=2, disable=None):
        # One at a time: programs with collectives that run at once starve each other of CPU threads.
        jax.block_until_ready(sums[-1:])
        sums.append(loss(params, batch))
    nats, tokens = (float(sum(float(x) for x in part)) for part in zip(*jax.device_get(sums), strict=True))
    if not tokens:
        raise UserError("no held-out token counts; hold out more text (data.validation_fraction)")
    num_bytes = rows.bytes_per_target * tokens
    mean = nats / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "tokens": tokens,
    }
