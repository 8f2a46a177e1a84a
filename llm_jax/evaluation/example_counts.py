"""The numbers of held-out rows and task examples over which metrics are measured.

The periodic evaluations of a run use `eval.rows` and `eval.task_examples`, the final one `eval.final_rows` and all
examples. Metrics over different numbers of examples belong to different curves and cannot be compared.
"""

import math
from collections.abc import Mapping


def key(name: str) -> str:
    """The name of the count that belongs to a metric; "" for a metric of a training batch.

    Args:
      name: the name of a metric in metrics.jsonl, such as "validation_loss/SOURCE" or "task_NAME".

    Returns:
      "validation_rows", "validation_rows/SOURCE" or "task_examples/NAME".
    """
    metric, separator, source = name.partition("/")
    if metric.startswith("validation_"):
        return f"validation_rows{separator}{source}"
    return f"task_examples/{name.removeprefix('task_')}" if name.startswith("task_") else ""


def of_other_examples(metrics: Mapping[str, float], counts: Mapping[str, int]) -> set[str]:
    """The names of the metrics in `metrics` whose count differs from the one in `counts`.

    Args:
      metrics: metrics and their counts, by name.
      counts: the counts of other evaluations of the run, by name.
    """
    return {name for name in metrics if (count := key(name)) in counts and metrics[count] != counts[count]}


def text(name: str, count: float) -> str:
    """The number of rows or examples of a metric as text, such as "16 rows"; infinity means all, and 0 gives ""."""
    noun = "example" if name.startswith("task_") else "row"
    return (f"all {noun}s" if math.isinf(count) else f"{count:,.0f} {noun}{'s' * (count != 1)}") if count else ""
