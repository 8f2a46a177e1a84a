"""Experiments: a function that measures each condition and seed once, and a rule that decides the verdict.

    def main() -> None:
        f = flags.FLAGS
        figures, origins = experiments.measure(experiments.directory(f.runs), CONDITIONS, f.seeds, measure)
        print(experiments.publish(__file__, judge(figures), tables(figures), origins=origins))

The script declares its statements and their rules in its docstring, which the page of all statements shows, its
conditions as a constant, and three functions: `measure(condition, seed)` returns figures as JSON values,
`judge(figures)` the findings by the rules, `tables(figures)` lines for the README. Figures are kept in
files below --runs, each with the commit, machine and date of its measurement, so that the same command goes on where it
was stopped, and results have the provenance of the figures that they follow from.
"""

import dataclasses
import functools
import pathlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from llm_jax import bars, files
from llm_jax.errors import UserError
from llm_jax.research import findings, provenance
from llm_jax.research.findings import Finding
from llm_jax.research.provenance import Provenance

# Flags that do not change results: directories, numbers of processes, and the selected part.
NEUTRAL = ("runs", "jobs", "part", "parts", "output", "resume")


def directory(runs: str, *names: object) -> pathlib.Path:
    """The directory RUNS/NAME-NAME-..., which is created; `runs` may begin with "~"."""
    path = pathlib.Path(runs).expanduser() / "-".join(map(str, names))
    files.make_directory(path)
    return path


def file_name(condition: str) -> str:
    """Converts a condition to a part of a file name."""
    return condition.replace(" ", "_").replace(":", "-")


def write_figures(path: pathlib.Path, figures: Any, origin: Provenance) -> None:
    """Writes figures, which are JSON values, with the commit, machine and date of their measurement."""
    fields = dataclasses.asdict(origin)
    del fields["command"]
    files.write_json(path, {"figures": figures} | fields)


def read_figures(path: pathlib.Path) -> tuple[Any, Provenance]:
    """(figures, where they were measured) of a file; files of earlier versions have no origin.

    Raises:
      UserError: the file cannot be read.
    """
    record = files.read_json(path)
    if not isinstance(record, dict) or record.keys() != {"figures", "commit", "machine", "date"}:
        return record, Provenance()
    return record.pop("figures"), Provenance(**record)


def cached(path: pathlib.Path, compute: Callable[[], Any]) -> tuple[Any, Provenance]:
    """(figures, where they were measured) of a JSON file; where it is missing, they are computed and written first."""
    if not path.exists():
        files.make_directory(path.parent)
        origin = provenance.here("")
        write_figures(path, compute(), origin)
    return read_figures(path)


def measure(
    directory: pathlib.Path, conditions: Iterable[str], seeds: int, compute: Callable[[str, int], Any]
) -> tuple[dict[str, list[Any]], list[Provenance]]:
    """({condition: the figures of each seed}, where each was measured); those in `directory` are not computed again.

    Args:
      compute: (condition, seed) -> figures, as JSON values.

    Raises:
      UserError: two conditions have the same file name.
    """
    figures: dict[str, list[Any]] = {condition: [] for condition in conditions}
    names: dict[str, str] = {}
    for condition in figures:
        other = names.setdefault(file_name(condition), condition)
        if other != condition:
            raise UserError(
                f"conditions '{other}' and '{condition}' have the same file name, {file_name(condition)}; rename one"
            )
    origins = []
    points = [(condition, seed) for seed in range(seeds) for condition in figures]
    for condition, seed in bars.bar(points, "runs"):
        path = directory / f"{file_name(condition)}-{seed}.json"
        value, origin = cached(path, functools.partial(compute, condition, seed))
        figures[condition].append(value)
        origins.append(origin)
    return figures, origins


def command(script: str, placeholders: Mapping[str, str] | None = None) -> str:
    """The command line of a script in experiments/ with every flag that has a non-default value.

    Flags in `NEUTRAL` are omitted.

    Args:
      placeholders: {flag: text that replaces its value}, such as RUN for a path.
    """
    path = pathlib.Path(script)
    texts = placeholders or {}
    words = []
    for module, flags in sorted(absl_flags.FLAGS.flags_by_module_dict().items()):
        for flag in () if module.startswith("absl.") else flags:  # those of absl.logging and others
            if flag.value != flag.default and flag.name not in NEUTRAL:
                text = f"--{flag.name}={texts[flag.name]}" if flag.name in texts else shlex.quote(flag.serialize())
                words.append(f" {text}")
    return f"PYTHONPATH=. python experiments/{path.parent.name}/{path.name}{''.join(words)}"


def publish(
    script: str,
    results: Sequence[Finding],
    lines: Sequence[str],
    *,
    section: str = "results",
    origins: Sequence[Provenance] | None = None,
    measured_by: str = "",
    verdicts: bool = True,
) -> str:
    """Writes results.json beside a script, and `lines` with the verdicts into a section of the README there.

    Args:
      script: the `__file__` of the experiment.
      origins: where the figures that the results follow from were measured; None: now, by this process. Where the
        origin of a figure is not known, a result that is recorded with equal estimates keeps its provenance.
      measured_by: the command that measures the results again; "": that of this process, see `command`.
      verdicts: whether the table of verdicts follows the lines.

    Returns:
      A line for each verdict, for the terminal.

    Raises:
      UserError: results.json cannot be written, or the README has no such section.
    """
    directory = pathlib.Path(script).parent
    line = measured_by or command(script)
    source = provenance.here(line) if origins is None else provenance.combine(origins, line)
    path = directory / "results.json"
    unknown = origins is not None and Provenance() in origins
    recorded = findings.read(path) if unknown and path.exists() else []
    findings.save(directory, [_with_provenance(result, source, recorded) for result in results])
    table = findings.verdict_table(results) if verdicts else []
    findings.replace_section(directory / "README.md", section, [*lines, *table])
    return findings.summary(results)


def _with_provenance(result: Finding, source: Provenance, recorded: Sequence[Finding]) -> Finding:
    """The result with the provenance of an equal one that is recorded, otherwise with `source`."""
    for other in recorded:
        if (other.claim, other.n, other.estimates) == (result.claim, result.n, result.estimates):
            return dataclasses.replace(other, verdict=result.verdict)
    return dataclasses.replace(result, **dataclasses.asdict(source))
