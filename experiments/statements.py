"""The statements of statements.toml."""

import dataclasses
import pathlib
import tomllib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Picture:
    """Estimates of a finding on one axis, beside the thresholds of its rule.

    Attributes:
      conditions: regular expression; the picture has the estimates whose whole condition matches.
      thresholds: the values that the rule compares these estimates with.
      holds: how estimates lie to the thresholds where the statement holds, such as "above"; "" without a threshold.
      title: what the axis is; "": the measure of the finding.
      log: whether the axis is logarithmic.
    """

    conditions: str = ".*"
    thresholds: tuple[float, ...] = ()
    holds: str = ""
    title: str = ""
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement and what is known about it besides the findings of `results.json`.

    Attributes:
      text: the statement, one sentence.
      rule: how the verdict follows from the figures, written before the run. Unless it names others, intervals are 95 %
        t-intervals of a mean over the seeds, and comparisons are paired by seed.
      pictures: each finding about the statement is shown by those that match one of its conditions.
      published: figures of the literature, with their source.
      tests: where tests hold the statement instead of an experiment: a file and an expression for `pytest -k`.
    """

    text: str
    rule: str = ""
    pictures: tuple[Picture, ...] = ()
    published: str = ""
    tests: str = ""


def _picture(fields: dict[str, Any]) -> Picture:
    """`above = X` and `below = X` stand for one threshold."""
    for holds in ("above", "below"):
        if holds in fields:
            fields |= {"thresholds": [fields.pop(holds)], "holds": holds}
    return Picture(**fields | {"thresholds": tuple(fields.get("thresholds", ()))})


_file = tomllib.loads(pathlib.Path(__file__).with_suffix(".toml").read_text())
GROUPS: dict[str, str] = _file["groups"]
STATEMENTS = {
    name: Statement(
        text=fields.pop("text"),
        rule=" ".join(fields.pop("rule", "").split()),
        pictures=tuple(map(_picture, fields.pop("pictures", ()))),
        **fields,
    )
    for name, fields in _file["statements"].items()
}
