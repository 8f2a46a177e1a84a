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
      sharding: of a batch.

    Returns:
      {"loss": nats per token; "perplexity": its exponential; "bits_per_byte": see below; "tokens": number of targets,
      EOS included}. Bits per byte can be compared across tokenizers: the sum of the cross-entropy in bits, over the
      bytes of the text. For a part of the rows, the bytes are estimated by the bytes per target of all rows.

    Raises:
      UserError: the rows have no target.
    """
    if not len(rows):
        raise UserError("nothing is held out (data.validation_fraction=0)")
    nats, tokens = sums(loss, params, rows, batch_size, sharding, limit)
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


def sums(
    function: Callable[[Any, Batch], tuple[jax.Array, ...]],
    params: Any,
    rows: AnyRows,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    limit: int = 0,
) -> list[float]:
    """The outputs of a jitted (params, batch) -> (float32 (), ...), each summed over the first `limit` rows (0: all).

    The other arguments are those of `evaluate`.
    """
    count_rows = min(limit, len(rows)) if limit else len(rows)
    steps = -(-count_rows // batch_size)
    outputs: list[tuple[jax.Array, ...]] = []
    stream = batches(rows, 0, steps, batch_size, sharding)
    for step, batch in enumerate(bars.bar(stream, "evaluating", steps, leave=False, delay=2)):
        if count_rows < min((step + 1) * batch_size, len(rows)):  # the last batch has more rows than are counted
            counted = jax.numpy.arange(batch_size) < count_rows - step * batch_size
            batch = batch | {"mask": batch["mask"] * counted[:, None]}
        # One step at a time: on CPU, programs with collectives that run together starve each other of threads.
        jax.block_until_ready(outputs[-1:])
        outputs.append(function(params, batch))
    return [float(sum(float(x) for x in part)) for part in zip(*jax.device_get(outputs), strict=True)]


def unknown_note(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """A note if at least 1 % of held-out tokens are the unknown token, else "".

    All text that the vocabulary lacks is then one token, which is easy to predict, so bits per byte are too low.

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
    """The smallest power of two that is enough for all rows, at most `largest`: rows of padding only cost time."""
    return min(largest, 1 << (len(rows) - 1).bit_length()) if len(rows) else largest


def refuse_other_text(several: Sequence[Any]) -> None:
    """Raises UserError unless checkpoints are measured on the same documents.

    Args:
      several: the held-out text of each, as `llm_jax.evaluate` describes it.
    """
    first = several[0]
    for other in several[1:]:
        for key in ("source", "kind", "field", "validation_fraction", "labelled"):
            values = [getattr(held_out.data, key) for held_out in (first, other)]
            ignored = (key == "labelled" and first.data.kind != "labelled") or (
                key == "validation_fraction" and first.is_whole_text
            )
            if values[0] != values[1] and not ignored:
                cure = "give --kind and --field" if first.is_whole_text else "give --data=FILE"
                raise UserError(
                    f"--checkpoint={first.name} and --checkpoint={other.name} are not measured on the same text "
                    f"(data.{key} is {values[0]!r} and {values[1]!r}); {cure}"
                )
    for held_out in several:
        if held_out.is_masked:
            raise UserError(
                f"{held_out.name} predicts masked tokens (loss.masked={held_out.config.loss.masked}), which differ "
                "between checkpoints; evaluate it alone"
            )
