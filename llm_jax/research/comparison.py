"""Compares runs as text for the terminal."""

import math
from collections.abc import Sequence

from llm_jax.evaluation import example_counts
from llm_jax.intervals import Interval
from llm_jax.research import runs as runs_lib
from llm_jax.research.runs import Group, RunRecord

_SAMPLE_LENGTH = 300
_CELL_LENGTH = 44  # of a name or a value of an option


def text(runs: Sequence[RunRecord], samples: bool = True) -> str:
    """Returns the differing options, results with intervals, paired differences and last samples as text."""
    groups = runs_lib.group(runs)
    metric = runs_lib.main_metric(runs)
    head = f"{runs_lib.count(len(runs), 'run')} in {runs_lib.count(len(groups), 'group')}"
    blocks = [[f"{head}; runs of a group differ only in the seed"]]
    if groups[0].options:
        blocks.append(_columns([["option", *(f"({i})" for i in range(1, len(groups) + 1))], *_options(groups)]))
    blocks.append(
        _columns(
            [
                ["", "group", runs_lib.SEED, runs_lib.METRICS[metric], "best", "difference to (1)", *_MEASURES],
                *_rows(groups, metric),
            ]
        )
    )
    reasons = {reason for group in groups if (reason := runs_lib.not_comparable(group, groups[0], metric))}
    blocks += [[f"note: {_REASONS[reason]}"] for reason in sorted(reasons)]
    if repetitions := runs_lib.repetitions(runs):
        blocks.append([f"note: {repetitions}"])
    if metric != runs_lib.BITS:
        blocks.append(["note: no run has bits per byte; losses of different tokenizers cannot be compared"])
    if unfinished := [_unfinished(run, metric) for run in runs if not run.is_finished]:
        blocks.append([*unfinished, "unfinished runs are excluded from means, intervals and differences"])
    if samples:
        for number, group in enumerate(groups, 1):
            if group.runs[0].samples:
                sample = group.runs[0].samples[-1]
                cut = sample["text"][:_SAMPLE_LENGTH] + "..." * (len(sample["text"]) > _SAMPLE_LENGTH)
                cut = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in cut)
                blocks.append([f"({number}) {group.runs[0].name}, step {sample['step']}", cut])
    return "\n\n".join("\n".join(block) for block in blocks)


_REASONS = {
    "other text": "metrics on different held-out texts cannot be compared (data.source, its content, or the measured "
    "part differs; eval.final_rows=0 measures all rows); "
    "evaluate --checkpoint=A --checkpoint=B --data=FILE measures several checkpoints on the same text",
    "other tokenizer": "losses of different tokenizers cannot be compared; bits per byte can",
}
_MEASURES = {
    "tokens/s": ("tokens_per_second", "{:,.0f}", 1.0),
    "memory, MiB": ("peak_device_bytes", "{:,.0f}", 2.0**20),
    "parameters": ("parameters", "{:,.0f}", 1.0),
    "trainable": ("trained_parameters", "{:,.0f}", 1.0),
    "minutes": ("seconds", "{:.1f}", 60.0),
}


def costs(group: Group) -> dict[str, str]:
    """The mean speed, memory, size and time of the runs of a group, as text."""
    result = {}
    for label, (name, form, unit) in _MEASURES.items():
        mean = group.mean(name)
        if mean is None and name == "peak_device_bytes":
            mean = group.mean("peak_host_bytes")
        result[label] = "" if mean is None else form.format(mean.estimate / unit)
    return result


def best_text(group: Group, metric: str) -> str:
    """The best value of a group, with its number of rows if the final values are over another number."""
    best = group.best(metric)
    if best is None:
        return ""
    rows = example_counts.text(metric, best.examples) if best.examples != group.examples(metric) else ""
    return f"{best.value:.4f}{rows and f' ({rows})'}"


def interval_text(interval: Interval | None, digits: int = 4, sign: bool = False) -> str:
    """Formats an interval as "1.234 [1.200, 1.268]", or without unknown limits."""
    if interval is None:
        return ""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    estimate, low, high = map(form.format, interval)
    return estimate if math.isnan(interval.low) else f"{estimate} [{low}, {high}]"


def _unfinished(run: RunRecord, metric: str) -> str:
    latest = ""
    for point in run.measurements(metric)[-1:]:
        rows = example_counts.text(metric, point.examples)
        latest = f"; {runs_lib.METRICS[metric]} {point.value:.4f}{rows and f' ({rows})'} at step {point.step}"
    return f"not finished: {run.name}, step {run.step} of {run.config['train.steps']}{latest}"


def _options(groups: Sequence[Group]) -> list[list[str]]:
    return [[key, *shortened([str(group.options[key]) for group in groups])] for key in groups[0].options]


def shortened(texts: Sequence[str]) -> list[str]:
    """Shortens long texts, such as paths, in the middle; different texts stay different."""
    length = _CELL_LENGTH
    while len(set(cut := [_without_middle(text, length) for text in texts])) < len(set(texts)):
        length *= 2
    return cut


def _without_middle(text: str, length: int) -> str:
    half = length // 2 - 1
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def _rows(groups: Sequence[Group], metric: str) -> list[list[str]]:
    rows = []
    labels = shortened([group.label for group in groups])
    for number, (group, label) in enumerate(zip(groups, labels, strict=True), 1):
        seeds = ",".join(str(run.seed) for run in group.runs)
        seeds += f" ({group.unfinished} unfinished)" * bool(group.unfinished)
        compared = runs_lib.difference(group, groups[0], metric) if number > 1 else None
        reason = runs_lib.not_comparable(group, groups[0], metric)
        rows.append(
            [
                f"({number})",
                label,
                seeds,
                interval_text(group.mean(metric)),
                best_text(group, metric),
                interval_text(compared[0], sign=True) if compared else reason,
                *costs(group).values(),
            ]
        )
    return rows


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
