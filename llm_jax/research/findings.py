"""Results of experiments and sweeps: the results.json file of a directory is a list of findings.

    results = [finding("P4", "rise of the loss in nats", {"alibi": intervals.mean(rises)}, "holds", command=...)]
    save(directory, results)

A finding belongs to a statement and contains estimates by condition, a verdict, and its provenance.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax import files, intervals
from llm_jax.errors import UserError
from llm_jax.intervals import Interval
from llm_jax.research import provenance

Runs = Sequence[Mapping[str, Any]]  # {name of a figure: value} of each seed
Figures = Mapping[str, Runs]  # by condition


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The measurement of one condition.

    Attributes:
      condition: the setting, such as "alibi" or "alibi / 8x"; "" if the finding has only one estimate.
      estimate: the value, usually a mean over seeds or examples; None if `values` or `text` is used.
      low, high: the limits of its interval, or of its range if the measure is a range; None: not measured.
      n: number of independent values behind the estimate; None: `n` of the finding.
      seed: the seed of a measurement with a single seed.
      values: individual values, such as one for each seed.
      text: a result that is not a number, such as names.
    """

    condition: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    seed: int | None = None
    values: tuple[Any, ...] = ()
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """The measurements for a statement.

    Attributes:
      statement: identifier of the statement, such as "P4".
      part: the part of the statement, if it has several findings; "": the whole statement.
      measure: the measured quantity, with its unit.
      verdict: the verdict of the rule that was written before the run; None: the finding does not test a statement.
      n: number of independent runs, such as seeds.
      estimates: the estimates, by condition.
      command, commit, machine, date: see `provenance.Provenance`.
    """

    statement: str
    part: str
    measure: str
    verdict: str | None
    n: int
    estimates: tuple[Estimate, ...]
    command: str
    commit: str = ""
    machine: str = ""
    date: str = ""

    @property
    def claim(self) -> str:
        """The statement with its part and measure, for tables."""
        return f"{self.statement}{self.part and f', {self.part}'} ({self.measure})"

    def __getitem__(self, condition: str) -> Estimate:
        """The estimate under a condition. Raises KeyError."""
        for estimate in self.estimates:
            if estimate.condition == condition:
                return estimate
        raise KeyError(condition)


def finding(
    statement: str, measure: str, values: Any, verdict: str | None, *, command: str = "", n: int = 1, part: str = ""
) -> Finding:
    """Creates a finding with the provenance of this machine and the current date.

    Args:
      values: a number, an `Interval`, a sequence of numbers, a text, or a mapping of conditions to such values, which
        may be nested.
      command: the command that reproduces it; "": `experiments.publish` adds the provenance.
    """
    source = provenance.here(command) if command else provenance.Provenance()
    return Finding(statement, part, measure, verdict, n, estimates(values), **dataclasses.asdict(source))


def estimates(values: Any, condition: str = "") -> tuple[Estimate, ...]:
    """Converts a value or a nested mapping to estimates; conditions of nested mappings are joined by " / "."""
    if isinstance(values, Mapping):
        prefix = f"{condition} / " if condition else ""
        return tuple(e for key, value in values.items() for e in estimates(value, f"{prefix}{key}"))
    if isinstance(values, Interval):
        estimate, low, high = (None if math.isnan(x) else float(x) for x in values)
        return (Estimate(condition, estimate, low, high),)
    if isinstance(values, str):
        return (Estimate(condition, text=values),)
    if isinstance(values, Sequence):
        if all(isinstance(value, str) for value in values):
            return (Estimate(condition, text=", ".join(values)),)
        return (Estimate(condition, values=tuple(values)),)
    return (Estimate(condition, values if values is None or isinstance(values, bool | int) else float(values)),)


def save(directory: pathlib.Path, results: Sequence[Finding]) -> None:
    """Writes findings to results.json, and keeps the findings of other scripts. Raises UserError if writing fails."""
    path = directory / "results.json"
    recorded = read(path) if path.exists() else []
    scripts = {_script(result) for result in results}
    other_findings = [result for result in recorded if _script(result) not in scripts]
    all_findings = sorted([*other_findings, *results], key=lambda r: r.claim) if other_findings else list(results)
    files.write_json(path, [as_dict(result) for result in all_findings])


def read(path: pathlib.Path) -> list[Finding]:
    """Reads the findings in a results.json file.

    Raises:
      UserError: the file cannot be read, or is not a list of findings.
    """
    try:
        return [
            Finding(**entry | {"estimates": tuple(Estimate(**_tuples(e)) for e in entry["estimates"])})
            for entry in files.read_json(path)
        ]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: not a list of findings ({error}); run its experiment again") from error


def as_dict(result: Finding) -> dict[str, Any]:
    """Converts a finding to JSON values, without the fields of estimates that have default values."""
    default = Estimate("")
    fields = [field.name for field in dataclasses.fields(Estimate)]
    short = [
        {f: getattr(e, f) for f in fields if f == "condition" or getattr(e, f) != getattr(default, f)}
        for e in result.estimates
    ]
    return dataclasses.asdict(result) | {"estimates": short}


def verdict_table(results: Sequence[Finding]) -> list[str]:
    """The lines of a table of verdicts for a README, with an empty line before and after."""
    rows = [[result.claim, f"**{result.verdict}**"] for result in results]
    return ["", *markdown_table(["claim", "verdict"], rows), ""]


def markdown_table(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def condition_table(name: str, figures: Mapping[str, Any], columns: Mapping[str, Callable[[Any], object]]) -> list[str]:
    """The lines of a table with a row for each condition.

    Args:
      name: heading of the conditions.
      figures: {condition: figures}.
      columns: {heading: function of the figures of a condition that returns the cell}, such as `deviation("loss")`.
    """
    cells = columns.values()
    rows = ([condition, *(cell(values) for cell in cells)] for condition, values in figures.items())
    return markdown_table([name, *columns], rows)


def deviation(name: str, digits: int = 3) -> Callable[[Runs], str]:
    """A column of a `condition_table`: mean and standard deviation of a figure over the seeds."""
    return lambda runs: deviation_text([run[name] for run in runs], digits)


def interval(name: str, digits: int = 3, scale: float = 1) -> Callable[[Runs], str]:
    """A column of a `condition_table`: the mean of a figure over the seeds, times `scale`, with its t-interval."""
    return lambda runs: interval_text(intervals.mean([scale * run[name] for run in runs]), digits)


def first(name: str, form: str, scale: float = 1) -> Callable[[Runs], str]:
    """A column of a `condition_table`: a figure of the first seed, times `scale`, in a format such as ".2f"."""
    return lambda runs: format(scale * runs[0][name], form)


def interval_text(interval: Iterable[float], digits: int = 3) -> str:
    """Formats an estimate with its limits, such as "0.513 (0.401 to 0.624)", or without limits if they are NaN."""
    estimate, low, high = (f"{x:.{digits}f}" for x in interval)
    return estimate if low == "nan" else f"{estimate} ({low} to {high})"


def deviation_text(values: Sequence[float], digits: int = 3) -> str:
    """The mean of values with their standard deviation, such as "0.513 ± 0.040"."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def span(values: Sequence[float]) -> Interval:
    """The mean of values, with their minimum and maximum as limits."""
    return Interval(float(np.mean(values)), min(values), max(values))


def means(figures: Figures, name: str, scale: float = 1.0) -> dict[str, Interval]:
    """{condition: mean over the seeds of a figure times `scale`, with its t-interval}."""
    return {condition: intervals.mean([scale * run[name] for run in runs]) for condition, runs in figures.items()}


def differences(figures: Figures, name: str, baseline: str, scale: float = 1.0) -> dict[str, Interval]:
    """{condition: mean difference of a figure to the baseline, paired by seed}, for all other conditions.

    The arguments are those of `means`.
    """
    values = {condition: [scale * run[name] for run in runs] for condition, runs in figures.items()}
    reference = values.pop(baseline)
    return {condition: intervals.paired(xs, reference) for condition, xs in values.items()}


def summary(results: Sequence[Finding]) -> str:
    """A line for each verdict, for the terminal."""
    return "\n".join(f"{result.claim}: {result.verdict}" for result in results)


def replace_section(path: pathlib.Path, name: str, lines: Sequence[str]) -> None:
    """Replaces the lines between `<!-- NAME: ... -->` and `<!-- end of NAME -->` in a text file.

    Raises:
      UserError: the file has no such section, or several.
    """
    text = path.read_text()
    pattern = re.compile(rf"(<!-- {re.escape(name)}: [^\n]*-->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    count = len(pattern.findall(text))
    if count != 1:
        raise UserError(f"{path}: has {count} sections '<!-- {name}: ... -->'; expected one")
    body = "\n".join(lines) + "\n"
    files.write(path, pattern.sub(lambda match: match[1] + body + match[2], text))


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _script(result: Finding) -> str:
    match = re.search(r"\S+\.py\b", result.command)
    return match[0] if match else result.command
