"""Experiments: a function that measures each condition and seed once, and a rule that decides the verdict.

    def main() -> None:
        f = flags.FLAGS
        figures, origins = experiments.measure(experiments.directory(f.runs), CONDITIONS, f.seeds, measure)
        print(experiments.publish(__file__, judge(figures), tables(figures), origins=origins))

The statements and their rules are in experiments/statements.toml. The script declares its conditions as a constant,
and three functions: `measure(condition, seed)` returns figures as JSON values, `judge(figures)` the findings by the
rules, `tables(figures)` lines for the README. Figures are kept in files below --runs, each with the commit, machine and
date of its measurement, so that the same command goes on where it was stopped, and results have the provenance of the
figures that they follow from.

    if __name__ == "__main__":
        cli.run_script(experiments.script(main, quick={"seeds": 2, "steps": 4}))

With --quick, the flags of `quick` have these values, and all files are written below RUNS/quick: the whole experiment
is tried in a few minutes, and nothing in experiments/ changes.
"""

import dataclasses
import functools
import hashlib
import pathlib
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags as absl_flags

from llm_jax import bars, files, runtime
from llm_jax.errors import UserError
from llm_jax.research import findings, jobs, live_table, points, provenance
from llm_jax.research.findings import Finding
from llm_jax.research.provenance import Provenance

T = TypeVar("T")

# Flags that do not change results: directories, numbers of processes, and the selected part.
NEUTRAL = ("runs", "jobs", "part", "parts", "output", "resume", "quick")


def script(main: Callable[[], None], quick: Mapping[str, Any], runs: str = "") -> Callable[[], None]:
    """The function that runs `main` of a script of experiments/, for `cli.run_script`; defines --quick and --runs.

    Args:
      quick: by flag, its value with --quick, where the command does not give another one.
      runs: the default of --runs, for a script that keeps no figures. Otherwise it is runs/NAME, where the script of
        experiments/NAME/ does not define the flag.
    """
    flags = absl_flags.FLAGS
    if "runs" not in flags:
        name = pathlib.Path(main.__code__.co_filename).parent.name
        text = "where results are written with --quick" if runs else "where figures are kept"
        absl_flags.DEFINE_string("runs", runs or f"runs/{name}", text, flag_values=flags)
    absl_flags.DEFINE_boolean(
        "quick", False, "try everything in its smallest form; writes below RUNS/quick only", flag_values=flags
    )

    @functools.wraps(main)
    def run() -> None:
        if flags.quick:
            for name, value in quick.items():
                if not flags[name].present:
                    flags[name].value = value
            flags["runs"].value = str(directory(flags.runs, "quick"))
        runtime.retain_freed_memory()
        try:
            main()
        except KeyboardInterrupt:
            if not runs:
                print(f"\nfigures are kept in {flags.runs}; the same command goes on with the others", file=sys.stderr)
            raise

    return run


def output(script: str) -> pathlib.Path:
    """Where results, tables and pictures of a script are written: beside it, or with --quick RUNS/published."""
    flags = absl_flags.FLAGS
    beside = pathlib.Path(script).parent
    if not ("quick" in flags and flags.quick):
        return beside
    published = directory(flags.runs, "published")
    if not (published / "README.md").exists():
        shutil.copy(beside / "README.md", published)
    return published


def directory(runs: str, *names: object) -> pathlib.Path:
    """The directory RUNS/NAME-NAME-..., which is created; `runs` may begin with "~"."""
    path = pathlib.Path(runs).expanduser() / "-".join(map(str, names))
    files.make_directory(path)
    return path


def file_name(condition: str) -> str:
    """Converts a condition to a part of a file name."""
    return condition.replace(" ", "_").replace(":", "-")


def digest(*values: str) -> str:
    """8 hexadecimal digits for values such as paths, which names of directories and files cannot contain."""
    return hashlib.sha256(" ".join(values).encode()).hexdigest()[:8]


def cached(path: pathlib.Path, compute: Callable[[], Any], origins: list[Provenance]) -> Any:
    """The figures of a JSON file, as JSON values; where it is missing, they are computed and written first.

    Args:
      origins: the provenance of the figures is appended; that of files of earlier versions is not known.

    Raises:
      UserError: the file cannot be read or written.
    """
    if not path.exists():
        files.make_directory(path.parent)
        origin = provenance.here("")
        files.write_json(path, {"figures": compute()} | _fields(origin))
    record = files.read_json(path)
    if isinstance(record, dict) and record.keys() == {"figures", *_fields(Provenance())}:
        figures = record.pop("figures")
        origins.append(Provenance(**record))
        return figures
    origins.append(Provenance())
    return record


def run_directory(root: pathlib.Path, condition: str, seed: int) -> pathlib.Path:
    """The directory of the training of a condition from a seed; see `trainings`."""
    return root / file_name(f"{condition}-{seed}")


def trainings(
    root: pathlib.Path,
    config: str | pathlib.Path,
    conditions: Mapping[str, Mapping[str, Any]],
    seeds: int,
    *,
    start: str = "",
    first_seed: int = 0,
) -> list[jobs.Job]:
    """The trainings of a recipe with the overrides of each condition, from each seed, below `root`.

    Args:
      config: name or path of the recipe.
      conditions: overrides by condition.
      start: the condition whose trained weights of the same seed are the `init_from` of all; "": random weights.
      first_seed: the `train.seed` of seed 0.

    Raises:
      UserError: a configuration is invalid, or a finished training has other options.
    """
    jobs_of_seeds = []
    for seed in range(seeds):
        of_seed: dict[str, Any] = {"train.seed": first_seed + seed}
        if start:
            of_seed["init_from"] = str(run_directory(root, start, seed))
        for condition, changes in conditions.items():
            directory = run_directory(root, condition, seed)
            jobs_of_seeds.append(points.training(config, {**changes, **of_seed}, directory))
    return jobs_of_seeds


def train(trainings: Sequence[jobs.Job], count: int) -> list[Provenance]:
    """Runs the trainings that are not done, `count` at a time (0: see `jobs.machine_shares`), and shows their states.

    Returns:
      Where each was trained, as its directory records: of a training that went on at another commit, all of them; of
      one by an earlier version, one that is not known.

    Raises:
      UserError: a training failed, or another process runs it.
    """
    origins = []
    for training in trainings:
        path = training.directory / "origins.json"
        records = files.read_json(path) if path.exists() else []
        if not training.is_done() and (here := _fields(provenance.here(""))) not in records:
            records.append(here)
            files.make_directory(training.directory)
            files.write_json(path, records)
        origins += [Provenance(**record) for record in records] or [Provenance()]
    jobs.run_all(trainings, jobs.machine_shares(count, len(trainings)), show=live_table.print_changes())
    return origins


def _fields(origin: Provenance) -> dict[str, str]:
    """A provenance as JSON values, without the command."""
    return {name: value for name, value in dataclasses.asdict(origin).items() if name != "command"}


def measure(
    directory: pathlib.Path, conditions: Iterable[str], seeds: int, compute: Callable[[str, int], Any]
) -> tuple[dict[str, list[Any]], list[Provenance]]:
    """({condition: the figures of each seed}, where each was measured); those in `directory` are not computed again.

    Args:
      compute: (condition, seed) -> figures, as JSON values.

    Raises:
      UserError: two conditions have the same file name.
    """
    names = list(dict.fromkeys(conditions))
    points = {f"{name}-{seed}": functools.partial(compute, name, seed) for seed in range(seeds) for name in names}
    origins: list[Provenance] = []
    figures = measure_all(directory, points, origins)
    return {name: [figures[f"{name}-{seed}"] for seed in range(seeds)] for name in names}, origins


def measure_all(
    directory: pathlib.Path, computations: Mapping[str, Callable[[], Any]], origins: list[Provenance]
) -> dict[str, Any]:
    """{name: figures} of {name: their computation}; what a file NAME.json in `directory` has is not computed again.

    Args:
      computations: each returns figures as JSON values; a name may contain "/".
      origins: where each was measured is appended.

    Raises:
      UserError: two names have the same file name.
    """
    names: dict[str, str] = {}
    for name in computations:
        other = names.setdefault(file_name(name), name)
        if other != name:
            raise UserError(f"'{other}' and '{name}' have the same file name, {file_name(name)}; rename one")
    return {
        name: cached(directory / f"{file_name(name)}.json", compute, origins)
        for name, compute in bars.bar(computations.items(), "measuring")
    }


def in_turns(computations: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """{name: the results of its computation}, one for each round, after a round that compiles.

    In a round, each computation runs once, so that other work of the machine affects all of them alike.
    """
    results: dict[str, list[T]] = {name: [] for name in computations}
    for _ in bars.bar(range(rounds + 1), "measuring"):
        for name, compute in computations.items():
            results[name].append(compute())
    return {name: of_rounds[1:] for name, of_rounds in results.items()}


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
    directory = output(script)
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
