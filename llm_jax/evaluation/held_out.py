"""Held-out loss, perplexity and bits per byte."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax import bars
from llm_jax.data.rows import AnyRows, Batch, batches
from llm_jax.errors import UserError
from llm_jax.tokenizers import Tokenizer

_SAMPLE = 1_000_000  # held-out tokens that are searched for the unknown token
LossFunction = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def evaluate(
    loss: LossFunction, params: Any, rows: AnyRows, batch_size: int, sharding: jax.sharding.Sharding, limit: int = 0
) -> dict[str, float]:
    """The loss over the first `limit` rows (0: all).

    Args:
      loss: jitted (params, batch) -> (sum of the cross-entropy in nats, number of targets), float32 () each.
      batch_size: rows at a time.
      sharding: the sharding of a batch.

    Returns:
      {"loss": nats per token; "perplexity": its exponential; "bits_per_byte": the sum of the cross-entropy in bits,
      divided by the bytes of the text, which can be compared across tokenizers; "tokens": number of targets, including
      EOS}. If only a part of the rows is evaluated, its bytes are estimated from the mean bytes per target of all rows.

    Raises:
      UserError: the rows have no targets.
    """
    if not len(rows):
        raise UserError("no text is held out (data.validation_fraction=0)")
    nats, tokens = sums(loss, params, rows, batch_size, sharding, limit)
    if not tokens:
        raise UserError("the loss counts no held-out token; hold out more text (data.validation_fraction)")
    num_bytes = rows.bytes_per_target * tokens
    mean = nats / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "tokens": tokens,
    }


def sums(
    function: Callable[[Any, Batch], tuple[jax.Array, ...]],
    params: Any,
    rows: AnyRows,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    limit: int = 0,
) -> list[float]:
    """Sums each output of a jitted (params, batch) -> (float32 (), ...) over the first `limit` rows (0: all).

    For the other arguments, see `evaluate`.
    """
    count_rows = min(limit, len(rows)) if limit else len(rows)
    steps = -(-count_rows // batch_size)
    outputs: list[tuple[jax.Array, ...]] = []
    stream = batches(rows, 0, steps, batch_size, sharding)
    for step, batch in enumerate(bars.bar(stream, "evaluating", steps, leave=False, delay=2)):
        if count_rows < min((step + 1) * batch_size, len(rows)):  # the last batch has more rows than are counted
            counted = jax.numpy.arange(batch_size) < count_rows - step * batch_size
            batch = batch | {"mask": batch["mask"] * counted[:, None]}
        # One step at a time: on CPUs, concurrent programs with collectives may block each other's threads.
        jax.block_until_ready(outputs[-1:])
        outputs.append(function(params, batch))
    return [float(sum(float(x) for x in part)) for part in zip(*jax.device_get(outputs), strict=True)]


def unknown_note(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Returns a note if at least 1 % of held-out tokens are the unknown token, else "".

    The unknown token replaces many different texts and is easy to predict, so bits per byte are too low.

    Args:
      tokens: integers (tokens,); the first million are read.
    """
    if tokenizer.unk is None or tokenizer.unk in (tokenizer.bos, tokenizer.eos):
        return ""
    share = float(np.mean(tokens[:_SAMPLE] == tokenizer.unk)) if len(tokens) else 0.0
    if share < 0.01:
        return ""
    return (
        f"note: {share:.0%} of the held-out tokens are unknown to the tokenizer; bits per byte are too low and cannot "
        "be compared with those of other tokenizers or compressors"
    )


def batch_size(largest: int, rows: AnyRows) -> int:
    """The smallest power of two that is not below the number of rows, at most `largest`; avoids rows of padding."""
    return min(largest, 1 << (len(rows) - 1).bit_length()) if len(rows) else largest


def check_same_text(held_out_texts: Sequence[Any]) -> None:
    """Raises UserError unless all checkpoints are measured on the same documents.

    Args:
      held_out_texts: the held-out text of each checkpoint, see `llm_jax.evaluate`.
    """
    first = held_out_texts[0]
    for other in held_out_texts[1:]:
        for key in ("source", "kind", "format", "field", "validation_fraction", "labelled"):
            values = [getattr(held_out.data, key) for held_out in (first, other)]
            ignored = (key == "labelled" and first.data.kind != "labelled") or (
                key == "validation_fraction" and first.is_whole_text
            )
            if values[0] != values[1] and not ignored:
                cure = "give --kind, --format and --field" if first.is_whole_text else "give --data=FILE"
                raise UserError(
                    f"--checkpoint={first.name} and --checkpoint={other.name} are not measured on the same text "
                    f"(data.{key} is {values[0]!r} and {values[1]!r}); {cure}"
                )
    for held_out in held_out_texts:
        if held_out.is_masked:
            raise UserError(
                f"{held_out.name} predicts masked tokens (loss.masked={held_out.config.loss.masked}), which differ "
                "between checkpoints; evaluate it alone"
            )
