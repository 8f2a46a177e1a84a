"""Runs experiments: measures each condition and seed once, decides verdicts by rules, and publishes the results.

    def main() -> None:
        f = flags.FLAGS
        figures, origins = experiments.measure(experiments.directory(f.runs), CONDITIONS, f.seeds, measure)
        print(experiments.publish(__file__, judge(figures), tables(figures), origins=origins))

The statements and their rules are in experiments/statements.toml. The script of an experiment defines its conditions as
a constant, and three functions: `measure(condition, seed)` returns figures as JSON values, `judge(figures)` applies the
rules and returns findings, and `tables(figures)` returns lines for the README. The figures are stored in files below
--runs, each with the commit, machine and date of its measurement, so that the same command resumes after an
interruption, and results record the provenance of the figures that they were computed from.

    if __name__ == "__main__":
        cli.run_script(experiments.script(main, quick={"seeds": 2, "steps": 4}))

With --quick, the flags in `quick` have these values, and all files are written below RUNS/quick. This tests the whole
experiment in a few minutes, without changes to experiments/.
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
FLAGS_WITHOUT_EFFECT_ON_RESULTS = ("runs", "jobs", "part", "parts", "output", "resume", "quick")


def script(main: Callable[[], None], quick: Mapping[str, Any], runs: str = "") -> Callable[[], None]:
    """Wraps `main` of a script in experiments/ for `cli.run_script`, and defines the flags --quick and --runs.

    Args:
      quick: {flag: value with --quick}; a flag that is given on the command line keeps its value.
      runs: the default of --runs for a script that stores no figures. Otherwise the default is runs/NAME for
        experiments/NAME/, unless the script defines the flag itself.
    """
    flags = absl_flags.FLAGS
    if "runs" not in flags:
        name = pathlib.Path(main.__code__.co_filename).parent.name
        text = "directory for the results of --quick" if runs else "directory of the measured figures"
        absl_flags.DEFINE_string("runs", runs or f"runs/{name}", text, flag_values=flags)
    absl_flags.DEFINE_boolean(
        "quick", False, "run the smallest form of everything; write below RUNS/quick only", flag_values=flags
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
                print(f"\nfigures are stored in {flags.runs}; the same command measures the others", file=sys.stderr)
            raise

    return run


def output(script: str) -> pathlib.Path:
    """The directory for results, tables and pictures: that of the script, or RUNS/published with --quick."""
    flags = absl_flags.FLAGS
    script_directory = pathlib.Path(script).parent
    if not ("quick" in flags and flags.quick):
        return script_directory
    published = directory(flags.runs, "published")
    if not (published / "README.md").exists():
        shutil.copy(script_directory / "README.md", published)
    return published


def directory(runs: str, *names: object) -> pathlib.Path:
    """Creates and returns the directory RUNS/NAME-NAME-...; `runs` may begin with "~"."""
    path = pathlib.Path(runs).expanduser() / "-".join(map(str, names))
    files.make_directory(path)
    return path


def file_name(condition: str) -> str:
    """Converts a condition to a part of a file name."""
    return condition.replace(" ", "_").replace(":", "-")


def digest(*values: str) -> str:
    """8 hexadecimal digits that identify values, such as paths, in the name of a file or directory."""
    return hashlib.sha256(" ".join(values).encode()).hexdigest()[:8]


def cached(path: pathlib.Path, compute: Callable[[], Any], origins: list[Provenance]) -> Any:
    """Reads figures, JSON values, from a file. If the file is missing, computes the figures and writes it.

    Args:
      origins: list to which the provenance of the figures is appended; it is unknown for files of earlier versions.

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
    """The run directory of a condition and seed; see `trainings`."""
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
    """Returns the jobs that train a recipe with the overrides of each condition and each seed, below `root`.

    Args:
      config: name or path of the recipe.
      conditions: {condition: overrides}.
      start: condition whose weights, trained with the same seed, are the `init_from` of all runs; "": random weights.
      first_seed: the `train.seed` of seed 0.

    Raises:
      UserError: a configuration is invalid, or a finished training has other options.
    """
    jobs_of_seeds = []
    for seed in range(seeds):
        seed_overrides: dict[str, Any] = {"train.seed": first_seed + seed}
        if start:
            seed_overrides["init_from"] = str(run_directory(root, start, seed))
        for condition, changes in conditions.items():
            directory = run_directory(root, condition, seed)
            jobs_of_seeds.append(points.training(config, {**changes, **seed_overrides}, directory))
    return jobs_of_seeds


def train(trainings: Sequence[jobs.Job], count: int) -> list[Provenance]:
    """Runs the trainings that are not done, `count` at a time (0: see `jobs.machine_shares`), and shows their states.

    Returns:
      The provenance of the trainings, as recorded in their directories: all provenances of a training that was resumed
      at another commit, and an unknown provenance for a training by an earlier version.

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
    """Converts a provenance to JSON values, without the command."""
    return {name: value for name, value in dataclasses.asdict(origin).items() if name != "command"}


def measure(
    directory: pathlib.Path, conditions: Iterable[str], seeds: int, compute: Callable[[str, int], Any]
) -> tuple[dict[str, list[Any]], list[Provenance]]:
    """Measures all conditions and seeds that are not stored in `directory`.

    Args:
      compute: (condition, seed) -> figures, as JSON values.

    Returns:
      ({condition: list with the figures of each seed}, the provenance of every measurement).

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
    """Returns {name: figures}; figures that are stored as NAME.json in `directory` are not computed again.

    Args:
      computations: {name: function that returns figures as JSON values}; a name may contain "/".
      origins: list to which the provenance of every measurement is appended.

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
    """Runs all computations once in every round, after an additional round for compilation.

    The computations alternate, so that other load of the machine affects all of them equally.

    Returns:
      {name: results of the computation, one per round}.
    """
    results: dict[str, list[T]] = {name: [] for name in computations}
    for _ in bars.bar(range(rounds + 1), "measuring"):
        for name, compute in computations.items():
            results[name].append(compute())
    return {name: round_results[1:] for name, round_results in results.items()}


def command(script: str, placeholders: Mapping[str, str] | None = None) -> str:
    """The command line of a script in experiments/ with every flag that has a non-default value.

    Flags in `FLAGS_WITHOUT_EFFECT_ON_RESULTS` are omitted.

    Args:
      placeholders: {flag: text that replaces its value}, such as RUN for a path.
    """
    path = pathlib.Path(script)
    texts = placeholders or {}
    words = []
    for module, flags in sorted(absl_flags.FLAGS.flags_by_module_dict().items()):
        for flag in () if module.startswith("absl.") else flags:  # those of absl.logging and others
            if flag.value != flag.default and flag.name not in FLAGS_WITHOUT_EFFECT_ON_RESULTS:
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
    """Writes results.json to the directory of a script, and `lines` with the verdicts to a section of its README.

    Args:
      script: the `__file__` of the experiment.
      origins: the provenance of the figures from which the results were computed; None: measured now, by this process.
        If the provenance of a figure is unknown, results that are already recorded with equal estimates keep theirs.
      measured_by: the command that reproduces the results; "": the command of this process, see `command`.
      verdicts: whether to append the table of verdicts to the lines.

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
    """Adds the provenance of an equal recorded result, or `source` if there is none."""
    for other in recorded:
        if (other.claim, other.n, other.estimates) == (result.claim, result.n, result.estimates):
            return dataclasses.replace(other, verdict=result.verdict)
    return dataclasses.replace(result, **dataclasses.asdict(source))
