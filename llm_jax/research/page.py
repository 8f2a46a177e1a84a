"""report.html: a self-contained page about runs.

The data are JSON in the page; page.js draws curves, tables and parallel coordinates from them.
"""

import datetime
import html
import importlib.resources
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.evaluation import example_counts
from llm_jax.intervals import Interval
from llm_jax.pictures import html_document
from llm_jax.research import runs as runs_lib
from llm_jax.research.runs import Group, RunRecord

_MAX_POINTS = 300  # of a curve
_NOT_DRAWN = {"step", "tokens", "seconds", "bad"}
_MAX_SAMPLES = 6  # of a group
_BODY = """<header><h1>{title}</h1><p id="summary"></p></header>
<main>
<section><h2>Groups</h2>
<p class="controls"><label>Filter <input id="filter" type="search" placeholder="alibi, lr=0.001"></label>
<label>Differences to <select id="baseline"></select></label></p>
<div class="scroll"><table id="groups"></table></div></section>
<section><h2>Curves</h2>
<p class="controls"><label>Metric <select id="metric"></select></label>
<label><input id="log" type="checkbox"> logarithmic</label></p>
<div id="curves" class="plot"></div><p class="note" id="caption"></p>
<ul id="legend"></ul></section>
<section id="parallel-section"><h2>Options and result</h2><div id="parallel" class="plot scroll"></div></section>
<section><h2>Time and memory</h2><div class="scroll"><table id="resources"></table></div></section>
<section id="options-section"><h2>Options that differ</h2>
<div class="scroll"><table id="options"></table></div></section>
<section id="samples-section"><h2>Samples</h2><div id="samples"></div></section>
{sections}<section><details><summary>Options that are equal in all runs</summary>
<div class="scroll"><table id="common"></table></div></details>
<details><summary>Runs</summary><div class="scroll"><table id="runs"></table></div></details></section>
</main>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>"""


def render(runs: Sequence[RunRecord], title: str, sections: str = "") -> str:
    """The page as text.

    Args:
      title: the heading, such as the name of the sweep.
      sections: HTML of further sections.
    """
    package = importlib.resources.files(__package__)
    text = json.dumps(_without_nan(data(runs)), allow_nan=False).replace("<", "\\u003c")
    body = _BODY.format(
        title=html.escape(title),
        script=(package / "page.js").read_text(),
        data=text,
        sections=sections,
    )
    return html_document.render(title, body, (package / "page.css").read_text())


def data(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The data of the page, as JSON values."""
    groups = runs_lib.group(runs)
    metric = runs_lib.main_metric(runs)
    varied = list(groups[0].options)
    scales = [
        next(i for i, g in enumerate(groups) if not runs_lib.not_comparable(group, g, metric)) for group in groups
    ]
    first = groups[0].runs[0].config
    return {
        "date": datetime.date.today().isoformat(),
        "main_metric": {"name": metric, "label": runs_lib.METRICS[metric]},
        "metrics": _metrics(runs, metric),
        "options": varied,
        "note": runs_lib.repetitions(runs),
        "groups": [_group(group, metric) | {"scale": scale} for group, scale in zip(groups, scales, strict=True)],
        "quantiles": _quantiles(max(len(group.runs) for group in groups)),
        "common": {key: str(value) for key, value in first.items() if key not in varied and key != runs_lib.SEED},
    }


def curve(group: Group, name: str) -> dict[str, Any] | None:
    """The mean, minimum and maximum over the seeds by step; None if no run has the metric.

    Only steps that all runs have are used; long curves are averaged over equal numbers of consecutive steps. A final
    evaluation over other rows is not included; see `final_point`.
    """
    measured = [points for run in group.runs if (points := run.curve(name))]
    curves = [{point.step: point.value for point in points} for points in measured]
    if not curves:
        return None
    steps = sorted(set.intersection(*(set(points) for points in curves)))
    if not steps:
        return None
    values = np.array([[points[step] for step in steps] for points in curves], float)  # (runs, steps)
    bins = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_POINTS))
    values = np.stack([values[:, b].mean(1) for b in bins], 1)
    rows = {"mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
    result: dict[str, Any] = {key: [float(f"{x:.6g}") for x in row] for key, row in rows.items()}
    result["step"] = [steps[int(b[-1])] for b in bins]
    return result | {"examples": example_counts.text(name, measured[0][0].examples)}


def final_point(group: Group, name: str) -> dict[str, Any] | None:
    """The mean, minimum and maximum of the final evaluations that do not belong to the curve, or None."""
    points = [point for run in group.runs if (point := run.final_point(name))]
    if not points:
        return None
    values = [point.value for point in points]
    examples = example_counts.text(name, points[0].examples)
    mean = sum(values) / len(values)
    return {"step": points[0].step, "mean": mean, "low": min(values), "high": max(values), "examples": examples}


def _metrics(runs: Sequence[RunRecord], metric: str) -> list[str]:
    """The names of the metrics that can be drawn: the held-out ones and the loss first."""
    names = {
        name
        for run in runs
        for line in run.metrics
        for name, value in line.items()
        if isinstance(value, float) and name not in _NOT_DRAWN
    }
    first = [name for name in (metric, "loss", "validation_loss") if name in names]
    return [*first, *sorted(names - set(first))]


def _group(group: Group, metric: str) -> dict[str, Any]:
    mean = group.mean(metric)
    best = group.best(metric)
    memory = group.mean("peak_device_bytes") or group.mean("peak_host_bytes")
    measures = ("seconds", "tokens_per_second", "parameters", "trained_parameters")
    seconds, rate, parameters, trainable = (group.mean(name) for name in measures)
    names = _metrics(group.runs, metric)
    curves = {name: curve(group, name) for name in names}
    final_points = {name: final_point(group, name) for name in names}
    return {
        "label": group.label,
        "options": {key: v if isinstance(v, int | float | str) else str(v) for key, v in group.options.items()},
        "seeds": [run.seed for run in group.runs],
        "result": _interval(mean),
        "values": group.values(metric),  # by seed: the page computes the differences to the chosen group
        "best": best
        and {
            "value": best.value,
            "examples": example_counts.text(metric, best.examples),
            "is_of_other_examples": best.examples != group.examples(metric),
        },
        "tokens_per_second": rate and rate.estimate,
        "memory": memory and memory.estimate / 2**20,
        "parameters": parameters and parameters.estimate,
        "trainable": trainable and trainable.estimate,
        "minutes": seconds and seconds.estimate / 60,
        "curves": {name: points for name, points in curves.items() if points},
        "final_points": {name: point for name, point in final_points.items() if point},
        "samples": [{"step": s["step"], "text": s["text"]} for s in group.runs[0].samples[-_MAX_SAMPLES:]],
        "runs": [
            {"name": run.name, "step": run.step, "steps": run.config["train.steps"], "done": run.is_finished}
            for run in group.runs
        ],
    }


def _quantiles(most: int) -> list[float | None]:
    """The 97.5 % quantiles of Student's t for means of 0, 1, ..., `most` values; None below two values."""
    from scipy import stats

    return [None if count < 2 else float(stats.t.ppf(0.975, count - 1)) for count in range(most + 1)]


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
