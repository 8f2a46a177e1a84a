"""The form of an experiment: a measure function, asked for each condition and seed once, and a rule that judges.

    def main() -> None:
        f = flags.FLAGS
        figures = experiments.measure(experiments.directory(f.runs), CONDITIONS, f.seeds, measure)
        print(experiments.publish(__file__, judge(figures), tables(figures), flags=("seeds",)))

The script declares its statements and their rules in its docstring, which the page of all statements shows, its
conditions as a constant, and three functions: `measure(condition, seed)` returns figures as JSON values,
`judge(figures)` the findings by the rules, `tables(figures)` lines for the README. What is measured is kept below
--runs, so that the same command goes on where it was stopped.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags as absl_flags

from llm_jax import bars, files
from llm_jax.research import findings, provenance
from llm_jax.research.findings import Finding


def directory(runs: str, *names: object) -> pathlib.Path:
    """The directory RUNS/NAME-NAME-..., which is created; `runs` may begin with "~"."""
    path = pathlib.Path(runs).expanduser() / "-".join(map(str, names))
    files.make_directory(path)
    return path


def file_name(condition: str) -> str:
    """A condition as a part of a file's name."""
    return condition.replace(" ", "_").replace(":", "-")


def cached(path: pathlib.Path, compute: Callable[[], Any]) -> Any:
    """The value of a JSON file; where it is missing, it is computed and written first."""
    if not path.exists():
        files.make_directory(path.parent)
        files.write_json(path, compute())
    return files.read_json(path)


def measure(
    directory: pathlib.Path, conditions: Iterable[str], seeds: int, compute: Callable[[str, int], Any]
) -> dict[str, list[Any]]:
    """{condition: the figures of each seed}; those in `directory` are not computed again.

    Args:
      compute: (condition, seed) -> figures, as JSON values.
    """
    figures: dict[str, list[Any]] = {condition: [] for condition in conditions}
    points = [(condition, seed) for seed in range(seeds) for condition in figures]
    for condition, seed in bars.bar(points, "runs"):
        path = directory / f"{file_name(condition)}-{seed}.json"
        figures[condition].append(cached(path, functools.partial(compute, condition, seed)))
    return figures


def command(script: str, flags: Sequence[str] = ()) -> str:
    """The command line of a script of experiments/ with the values that some of its flags have."""
    path = pathlib.Path(script)
    values = "".join(f" --{name}={absl_flags.FLAGS[name].value}" for name in flags)
    return f"PYTHONPATH=. python experiments/{path.parent.name}/{path.name}{values}"


def publish(
    script: str,
    results: Sequence[Finding],
    lines: Sequence[str],
    *,
    section: str = "results",
    flags: Sequence[str] = (),
    suffix: str = "",
    verdicts: bool = True,
) -> str:
    """Writes results.json beside a script, and `lines` with the verdicts into a section of the README there.

    Args:
      script: the `__file__` of the experiment.
      flags: names of the flags whose values are part of the command that measures the results again.
      suffix: the rest of that command.
      verdicts: whether the table of verdicts follows the lines.

    Returns:
      A line for each verdict, for the terminal.

    Raises:
      UserError: results.json cannot be written, or the README has no such section.
    """
    source = provenance.here(command(script, flags) + suffix)
    results = [dataclasses.replace(result, **dataclasses.asdict(source)) for result in results]
    directory = pathlib.Path(script).parent
    findings.save(directory, results)
    table = findings.verdict_table(results) if verdicts else []
    findings.replace_section(directory / "README.md", section, [*lines, *table])
    return findings.summary(results)
