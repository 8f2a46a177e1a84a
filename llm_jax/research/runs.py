"""Reads run directories and sweeps, and groups runs that differ only in the seed."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax import configuration, files, intervals
from llm_jax.errors import UserError
from llm_jax.evaluation import example_counts
from llm_jax.intervals import Interval
from llm_jax.research import grid

SEED = "train.seed"
BITS = "validation_bits_per_byte"
METRICS = {BITS: "bits per byte", "validation_loss": "held-out loss", "loss": "training loss"}
# Options that do not change results: what is written or printed, where and how often. eval.rows, eval.final_rows and
# eval.task_examples are not included, because they select the examples on which metrics are measured.
OPTIONS_WITHOUT_EFFECT_ON_RESULTS = (
    *("checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_best"),
    *("report.to", "report.norms_every", "report.samples_every", "report.pictures"),
    *("eval.every", "eval.prompts", "eval.tasks", "eval.max_new_tokens"),
    *("data.cache_dir", "data.workers"),
)


# Options that determine the held-out text of a corpus.
_HELD_OUT = (
    *("data.kind", "data.validation_fraction", "eval.final_rows"),
    *("data.labelled.choices", "data.labelled.thresholds", "data.labelled.test_size", "data.labelled.validation_size"),
)
_TOKENIZER = ("tokenizer.kind", "tokenizer.vocab_size", "tokenizer.path")


class Measurement(NamedTuple):
    """A value of a metric during a run.

    Attributes:
      examples: the number of held-out rows or task examples, infinity for all; 0 for a metric of a training batch.
    """

    step: int
    value: float
    examples: float


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The content of a run directory.

    Attributes:
      name: the shortest unique suffix of the path.
      path: the directory.
      config: the configuration by dotted key.
      metrics: the lines of metrics.jsonl, one per step, with step, loss, ...
      summary: the metrics of summary.json; {} for a run that has not ended.
      samples: the lines of samples.jsonl, with step and text; only the last line of every step.
    """

    name: str
    path: pathlib.Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.config[SEED]

    @property
    def corpus(self) -> str:
        """The hash of the corpus, or "" if the run has not ended or does not record it."""
        return self.summary.get("corpus", {}).get("sha256", "")

    @property
    def step(self) -> int:
        """The number of completed steps."""
        return max(self.summary.get("steps") or 0, self.metrics[-1]["step"] if self.metrics else 0)

    @property
    def is_finished(self) -> bool:
        """Whether the run has completed all steps. One resumed for more steps has not, although it has a summary."""
        return bool(self.summary) and self.summary.get("steps", self.step) == self.step

    def final(self, name: str) -> float | None:
        """The final value of a metric, or the latest value of an unfinished run; None if missing."""
        if self.is_finished and isinstance(self.summary.get(name), int | float):
            return self.summary[name]
        return next((line[name] for line in reversed(self.metrics) if line.get(name) is not None), None)

    def best(self, name: str) -> Measurement | None:
        """The measurement of the curve (`curve`) with the minimum finite value of a metric, or None."""
        finite = [point for point in self.curve(name) if math.isfinite(point.value)]
        return min(finite, key=lambda point: point.value, default=None)

    def measurements(self, name: str) -> list[Measurement]:
        """All measurements of a metric by step, periodic and final ones."""
        lines = [line for line in self.metrics if line.get(name) is not None]
        return [Measurement(line["step"], line[name], self._examples(line, name)) for line in lines]

    def curve(self, name: str) -> list[Measurement]:
        """The measurements of a metric over the rows or examples of the periodic evaluations.

        They include the final evaluation only if it is over the same rows or examples.
        """
        points = self.measurements(name)
        counts = {point.examples for point in points}
        limit = self.config["eval.task_examples" if name.startswith("task_") else "eval.rows"]
        count = limit if limit in counts else max(counts, default=0)  # the limit may exceed the number of rows
        return [point for point in points if point.examples == count]

    def final_point(self, name: str) -> Measurement | None:
        """The last measurement of a finished run if it does not belong to the curve of the metric, or None."""
        last = self.measurements(name)[-1:]
        return last[0] if self.is_finished and last and last[0] not in self.curve(name) else None

    def _examples(self, line: Mapping[str, Any], name: str) -> float:
        key = example_counts.key(name)
        if not key or key in line:
            return line.get(key, 0)
        # An older run, which did not record the number.
        every, end = self.config["eval.every"], (self.config["train.steps"], self.summary.get("steps"))
        is_final = line["step"] in end or not every or line["step"] % every > 0
        if name.startswith("task_"):
            limit = 0 if is_final else self.config["eval.task_examples"]
        else:
            limit = self.config["eval.final_rows" if is_final else "eval.rows"]
        return limit if limit > 0 else math.inf


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed.

    Attributes:
      label: the options of the group that differ, such as "kind=alibi", or the name of a single run without such
        options.
      runs: the runs by ascending seed.
      options: the options that are not equal in all groups, by dotted key.
    """

    label: str
    runs: tuple[RunRecord, ...]
    options: Mapping[str, Any]

    def values(self, name: str) -> dict[int, float]:
        """{seed: final value of a metric} of the finished runs that have the metric."""
        return {run.seed: value for run in self.runs if run.is_finished and (value := run.final(name)) is not None}

    @property
    def unfinished(self) -> int:
        """The number of unfinished runs, which are excluded from means and differences."""
        return sum(not run.is_finished for run in self.runs)

    def best(self, name: str) -> Measurement | None:
        """The best measurement (`RunRecord.best`) of the finished runs, or None."""
        points = [point for run in self.runs if run.is_finished and (point := run.best(name))]
        return min(points, key=lambda point: point.value, default=None)

    def examples(self, name: str) -> float:
        """The number of rows or examples of the final values of a metric; see `Measurement`."""
        points = [run.measurements(name)[-1:] for run in self.runs if run.is_finished]
        return max((point[0].examples for point in points if point), default=0)

    def mean(self, name: str) -> Interval | None:
        """The mean of a metric over the finished runs with its interval (NaN limits for one run), or None."""
        values = list(self.values(name).values())
        return intervals.mean(values) if values else None


def find(paths: Iterable[str | os.PathLike[str]]) -> list[pathlib.Path]:
    """Returns the run directories of paths: a run, a sweep, or a directory that contains runs.

    Raises:
      UserError: no such directory, or there is no run in it.
    """
    result: dict[pathlib.Path, None] = {}
    for path in map(files.path, paths):
        files.check_reachable(path)
        if not path.is_dir():
            problem = "a file" if path.exists() else "no such directory"
            is_checkpoint = path.exists() or ":" in str(path)  # a GGUF file, asset:NAME, hf:ORG/NAME
            raise UserError(f"{path}: {problem}; expected a run or a sweep{_of_checkpoints(is_checkpoint)}")
        if (path / "config.json").exists():
            result[path] = None
            continue
        below = sorted(p.parent for p in path.glob("*/config.json"))
        if not below:
            raise UserError(
                f"{path}: no run in this directory; expected a directory with config.json, or runs below it"
            )
        result.update(dict.fromkeys(below))
    return list(result)


def _of_checkpoints(exists: bool) -> str:
    """A hint for error messages: the command that compares checkpoints of any form."""
    command = "python -m llm_jax.evaluate --checkpoint=A --checkpoint=B --data=FILE"
    return f"; {command} compares checkpoints of any form" * exists


def load(paths: Iterable[str | os.PathLike[str]]) -> list[RunRecord]:
    """Loads the runs of paths; see `find`.

    Raises:
      UserError: there are no runs, or a file of a run is damaged.
    """
    directories = find(paths)
    names = _names([files.absolute(path) for path in directories])
    return [read(path, name) for path, name in zip(directories, names, strict=True)]


def read(path: pathlib.Path, name: str = "") -> RunRecord:
    """Reads one run.

    Raises:
      UserError: a file is damaged.
    """
    content = files.read_json(path / "config.json")
    if not isinstance(content, dict) or not content.keys() & {"train", "tokenizer"}:
        raise UserError(f"{path}: not a run of llm_jax.train; expected a run or a sweep{_of_checkpoints(True)}")
    try:
        config = configuration.flat(configuration.build(configuration.upgrade(content)))
    except UserError as error:
        raise UserError(f"{path}: not a run of llm_jax.train ({error})") from error
    summary = path / "summary.json"
    samples = {line["step"]: line for line in read_lines(path / "samples.jsonl")}
    return RunRecord(
        name or path.name,
        path,
        config,
        read_lines(path / "metrics.jsonl"),
        files.read_json(summary) if summary.exists() else {},
        [samples[step] for step in sorted(samples)],
    )


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines; [] if it does not exist. An incomplete last line is ignored.

    Raises:
      UserError: a line before the last is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is damaged, not JSON ({error})") from error
    return values


def group(runs: Sequence[RunRecord]) -> list[Group]:
    """Groups runs that differ only in the seed, in the order of their first run.

    Two runs with equal configurations and equal seeds are in different groups, and so are runs with equal
    configurations whose corpora had different texts.
    """
    collected: dict[tuple[str, int], list[RunRecord]] = {}
    for run, key in zip(runs, _conditions(runs), strict=True):
        repeat = 0
        while any(other.seed == run.seed for other in collected.get((key, repeat), [])):
            repeat += 1
        collected.setdefault((key, repeat), []).append(run)
    members = [sorted(group, key=lambda run: run.seed) for group in collected.values()]
    keys = differing_options([group[0] for group in members])
    short = grid.short_keys(keys)
    groups = []
    for group_ in members:
        options = {key: group_[0].config[key] for key in keys}
        label = ", ".join(f"{short[key]}={_text(value)}" for key, value in options.items())
        groups.append(Group(label or group_[0].name, tuple(group_), options))
    labels = [g.label for g in groups]
    return [
        dataclasses.replace(g, label=f"{g.label} ({g.runs[0].name})") if labels.count(g.label) > 1 else g
        for g in groups
    ]


def _conditions(runs: Sequence[RunRecord]) -> list[str]:
    """What runs of a group have in common: the options that change results, without the seed, and the corpus."""
    corpora = {_data(run): run.corpus for run in reversed(runs) if run.corpus}
    ignored = (SEED, *OPTIONS_WITHOUT_EFFECT_ON_RESULTS)
    texts = []
    for run in runs:
        condition = json.dumps({key: value for key, value in run.config.items() if key not in ignored})
        # An unfinished run records no hash; it is grouped with other runs of its configuration.
        texts.append(condition + (run.corpus or corpora.get(_data(run), "")))
    return texts


def repetitions(runs: Sequence[RunRecord]) -> str:
    """A note that names the runs with equal configurations and equal seeds, which are separate groups; or ""."""
    equal: dict[tuple[str, int], list[str]] = {}
    for run, condition in zip(runs, _conditions(runs), strict=True):
        equal.setdefault((condition, run.seed), []).append(run.name)
    names = "; ".join(" = ".join(same) for same in equal.values() if len(same) > 1)
    return names and f"runs with equal configurations and equal seeds are separate groups: {names}"


def _data(run: RunRecord) -> str:
    return json.dumps([run.config[key] for key in ("data.source", "data.format", "data.field", *_HELD_OUT)])


def differing_options(runs: Sequence[RunRecord]) -> list[str]:
    """The dotted keys of options that are not equal in all runs, without the seed and options without effect."""
    if not runs:
        return []
    first = runs[0].config
    return [
        key
        for key in first
        if key != SEED
        and key not in OPTIONS_WITHOUT_EFFECT_ON_RESULTS
        and any(run.config[key] != first[key] for run in runs)
    ]


def difference(group: Group, baseline: Group, name: str) -> tuple[Interval, int] | None:
    """Returns the mean difference of the final values of a metric, group minus baseline, and the number of pairs.

    Pairs are finished runs with the same seed. Without a common seed, the difference of the means is returned, with NaN
    limits and 0 pairs. Returns None if a group has no finished run with the metric, or if the metric cannot be compared
    (`not_comparable`).
    """
    if not_comparable(group, baseline, name):
        return None
    group_values, baseline_values = group.values(name), baseline.values(name)
    if not group_values or not baseline_values:
        return None
    common = sorted(set(group_values) & set(baseline_values))
    if common:
        return intervals.paired([group_values[s] for s in common], [baseline_values[s] for s in common]), len(common)
    means = [intervals.mean(list(values.values())).estimate for values in (group_values, baseline_values)]
    return Interval(means[0] - means[1], float("nan"), float("nan")), 0


def not_comparable(group: Group, baseline: Group, name: str) -> str:
    """The reason why a metric of two groups cannot be compared: "other text" or "other tokenizer"; "" if it can.

    Bits per byte can be compared across tokenizers, but not across texts. Losses and perplexities are measured per
    token, and cannot be compared across tokenizers either.
    """
    runs = [next((run for run in g.runs if run.corpus), g.runs[0]) for g in (group, baseline)]
    if all(run.corpus for run in runs):
        texts = [run.corpus for run in runs]
    else:
        texts = [run.config["data.source"] for run in runs]
    # The same number of rows is a different part of the text if the length of rows or the tokenizer differs.
    is_part = any(run.config["eval.final_rows"] > 0 for run in runs)
    keys = [*_HELD_OUT, *(["train.seq_len", *_TOKENIZER] if is_part else [])]
    if texts[0] != texts[1] or any(runs[0].config[key] != runs[1].config[key] for key in keys):
        return "other text"
    if name != BITS and any(runs[0].config[key] != runs[1].config[key] for key in _TOKENIZER):
        return "other tokenizer"
    return ""


def count(number: int, noun: str) -> str:
    """A number with its noun, such as "1 run" or "2 runs"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def main_metric(runs: Sequence[RunRecord]) -> str:
    """The metric by which runs are compared: the first metric of `METRICS` that any run has."""
    measured = (name for name in METRICS if any(run.final(name) is not None for run in runs))
    return next(measured, BITS)


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The shortest suffix of every path that is not a suffix of another path."""

    @functools.cache
    def end(path: pathlib.Path, length: int) -> str:
        return "/".join(path.parts[-length:])

    names = []
    for path in paths:
        length = 1
        while length < len(path.parts) and sum(end(other, length) == end(path, length) for other in paths) > 1:
            length += 1
        names.append(end(path, length))
    return names


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
