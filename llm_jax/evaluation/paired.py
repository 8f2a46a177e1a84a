"""Paired differences of several models on the same documents of a text, or the same examples of a task."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax import bars, intervals
from llm_jax.data.rows import AnyRows, Batch, batches
from llm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Units:
    """The results of a model on every unit of a data set.

    Attributes:
      values: float64 (units,): bits of each document, or 1.0 for each correctly answered example.
      sizes: float64 (units,): bytes of each document; ones for examples.
      measured: bool (units,): whether a unit was measured; examples that do not fit into a window are not.
      targets: number of predicted tokens of all documents; 0 for the examples of a task.
    """

    values: np.ndarray
    sizes: np.ndarray
    measured: np.ndarray
    targets: int = 0


def bits_by_document(
    loss: Callable[[Any, Batch], jax.Array],
    params: Any,
    rows: AnyRows,
    sizes: np.ndarray,
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> Units:
    """Computes the cross-entropy of every document, or of every example if the data consists of examples.

    Args:
      loss: jitted (params, batch) -> nats of every counted target, 0 for others, float32 (B, T).
      rows: the held-out rows.
      sizes: int64 (documents,): number of bytes of each document that the loss counts.
      batch_size: rows at a time.
      sharding: the sharding of a batch.
    """
    bits, measured, targets = np.zeros(len(sizes)), np.zeros(len(sizes), bool), 0
    steps = -(-len(rows) // batch_size)
    stream = batches(rows, 0, steps, batch_size, sharding)
    for step, batch in enumerate(bars.bar(stream, "evaluating", steps, leave=False, delay=2)):
        nats_BT, segments_BT, mask_BT = jax.device_get((loss(params, batch), batch["segments"], batch["mask"]))
        targets += int(mask_BT.sum())
        for row in range(min(batch_size, len(rows) - step * batch_size)):
            inside = segments_BT[row] > 0
            documents = rows.documents(step * batch_size + row)[segments_BT[row][inside] - 1]
            np.add.at(bits, documents, nats_BT[row][inside].astype(np.float64) / math.log(2))
            measured[documents] = True
    return Units(bits, sizes.astype(np.float64), measured, targets)


def compare(units: Sequence[Units], *, proportions: bool) -> list[dict[str, Any]]:
    """Returns the results of each model over the units that were measured for all models.

    Args:
      proportions: whether values are 0 or 1 and sizes 1.

    Returns:
      For each model {"units": number of units, "value": sum of values / sum of sizes}. For all models except the first
      also "difference", the difference from the first model, and "low" and "high", the limits of its paired 95 %
      interval (`intervals.difference_of_proportions` or `intervals.ratio`; None if there are too few units).

    Raises:
      UserError: no unit was measured for all models.
    """
    common = np.logical_and.reduce([unit.measured for unit in units])
    sizes = units[0].sizes[common]
    if not sizes.sum():
        raise UserError("no example was measured by all of these checkpoints; raise --seq_len")
    values = [unit.values[common] for unit in units]
    comparisons: list[dict[str, Any]] = []
    for model in values:
        comparisons.append({"units": len(sizes), "value": float(model.sum() / sizes.sum())})
        if model is values[0]:
            continue
        if proportions:
            interval = intervals.difference_of_proportions(model > 0, values[0] > 0)
        else:
            interval = intervals.ratio(model - values[0], sizes)
        limits = [None if math.isnan(limit) else limit for limit in (interval.low, interval.high)]
        comparisons[-1] |= {"difference": interval.estimate, "low": limits[0], "high": limits[1]}
    return comparisons


def table(
    names: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]], comparisons: Sequence[dict[str, Any]], over: str
) -> str:
    """Formats a table with a row for each model.

    Args:
      names: names of the checkpoints.
      columns: (title, one text per model).
      comparisons: the result of `compare`.
      over: what the intervals are over, such as "over the documents".
    """
    differences = [_difference(row) for row in comparisons]
    all_columns = [("checkpoint", names), *columns, (f"difference from the first, 95 % interval {over}", differences)]
    lines = [[title for title, _ in all_columns], *zip(*(texts for _, texts in all_columns), strict=True)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(all_columns))]
    first, *others = widths
    return "\n".join(
        "  ".join([line[0].ljust(first), *(text.rjust(w) for text, w in zip(line[1:], others, strict=True))]).rstrip()
        for line in lines
    )


def _difference(row: dict[str, Any]) -> str:
    if "difference" not in row:
        return ""
    limits = "no interval" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
    return f"{row['difference']:+.4f} ({limits})"
