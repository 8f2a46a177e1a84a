"""The points of a sweep: each has a run directory and a configuration, validated before any point starts.

OUTPUT/sweep.json           the keys of the sweep, overrides of every point, command, commit, machine, date
OUTPUT/NAME/recipe.json     the options that differ from the defaults or were overridden, for `train --config`
OUTPUT/NAME/...             the run: config.json (all options), metrics.jsonl, summary.json, checkpoints/, log.txt
OUTPUT/.cache/              the compiled functions that the points share
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax import configuration, files
from llm_jax.errors import UserError
from llm_jax.research import grid, jobs, runs
from llm_jax.research.provenance import Provenance
from llm_jax.schema import Config, resuming

LOCK = ".sweep.lock"  # locked while the points of a sweep or the trials of a search are written


@dataclasses.dataclass(frozen=True)
class Point:
    """A configuration of a sweep.

    Attributes:
      name: the name of its run directory.
      overrides: its overrides, by dotted key.
      config: the complete configuration.
      workdir: its run directory.
    """

    name: str
    overrides: Mapping[str, Any]
    config: Config
    workdir: pathlib.Path


def plan(base: Config, overrides: Sequence[Mapping[str, Any]], output: pathlib.Path) -> list[Point]:
    """Returns the points of a sweep, and validates their configurations. Writes nothing.

    Raises:
      UserError: a configuration is invalid, two points are equal, or a run in `output` has other options.
    """
    points = []
    for name, changes in zip(grid.names([dict(o) for o in overrides]), overrides, strict=True):
        try:
            config = configuration.load(base, changes)
        except UserError as error:
            raise UserError(f"point {name}: {error}") from error
        points.append(Point(name, changes, config, output / name))
    for point in points:
        _changes(point)
    return points


def notes(points: Sequence[Point]) -> list[str]:
    """Returns a note for each option that was changed after some points were done: these keep their results."""
    changed: dict[str, list[str]] = {}
    for point in filter(is_done, points):
        for key, (before, _) in _changes(point).items():
            if key not in runs.OPTIONS_WITHOUT_EFFECT_ON_RESULTS:
                changed.setdefault(f"{key}={before!r}", []).append(point.name)
    return [
        f"note: {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)} "
        f"{'are' if len(names) > 1 else 'is'} done with {option}; the result is kept"
        for option, names in changed.items()
    ]


def write(points: Sequence[Point], output: pathlib.Path, provenance: Provenance) -> None:
    """Writes recipe.json of every point that is not done, and adds the points to sweep.json."""
    files.make_directory(output)
    for point in points:
        _write_recipe(point)
    with files.lock(output, LOCK, wait=True):  # another sweep may start at the same moment
        record = read(output)
        record["points"] |= {point.name: dict(point.overrides) for point in points}
        keys = dict.fromkeys(key for overrides in record["points"].values() for key in overrides)
        files.write_json(output / "sweep.json", record | {"keys": list(keys)} | dataclasses.asdict(provenance))


def read(output: pathlib.Path) -> dict[str, Any]:
    """Reads sweep.json: {"points": {name: overrides}, "keys": [...], ...}; without the file, there are no points."""
    path = output / "sweep.json"
    return files.read_json(path) if path.exists() else {"points": {}, "keys": []}


def recipe(config: Config) -> dict[str, Any]:
    """Returns a partial nested mapping from which `configuration.load` builds an equal configuration.

    It contains only the explicit options, because with `init_from` the checkpoint determines the others.
    """
    nested: dict[str, Any] = {}
    for key, value in configuration.flat(config).items():
        if key in config.explicit:
            *sections, name = key.split(".")
            section = nested
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = value
    return json.loads(json.dumps(nested))


def job(point: Point) -> jobs.Job:
    """Returns the job that trains a point in a separate process and resumes from the last checkpoint."""
    recipe_path = str(point.workdir / "recipe.json")
    one_process = "--num_processes=1"  # even in a cluster job, in which several sweeps share the points
    command = ("-m", "llm_jax.train", f"--config={recipe_path}", f"--workdir={point.workdir}", one_process)
    metrics = point.workdir / "metrics.jsonl"
    return jobs.Job(
        point.name,
        command,
        point.workdir,
        is_done=lambda: is_done(point),
        is_set_up=lambda: metrics.exists() and metrics.stat().st_size > 0,
    )


def training(config: str | os.PathLike[str], overrides: Mapping[str, Any], workdir: pathlib.Path) -> jobs.Job:
    """Returns the job that trains a recipe with overrides in `workdir`, for scripts; writes WORKDIR/recipe.json.

    Raises:
      UserError: the configuration is invalid, or the run in `workdir` has other options.
    """
    point = Point(workdir.name, overrides, configuration.load(config, overrides), workdir)
    _changes(point)
    _write_recipe(point)
    return job(point)


def is_done(point: Point) -> bool:
    """Whether the run of a point has completed all steps."""
    path = point.workdir / "summary.json"
    return path.exists() and files.read_json(path).get("steps") == point.config.train.steps


def environment(output: pathlib.Path) -> dict[str, str]:
    """Environment variables with which the trainings share one cache of compiled functions, unless one is set."""
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str((output / ".cache" / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    return {name: value for name, value in variables.items() if name not in os.environ}


def _write_recipe(point: Point) -> None:
    files.make_directory(point.workdir)
    if not (is_done(point) and (point.workdir / "recipe.json").exists()):  # of a run that is done: how it was trained
        files.write_json(point.workdir / "recipe.json", recipe(point.config))


def _changes(point: Point) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (recorded value, requested value)} of the options that differ from the run of a point.

    Raises:
      UserError: an option differs that must not change when a run is resumed.
    """
    path = point.workdir / "recipe.json"
    if not path.exists() or not (point.workdir / "config.json").exists():
        return {}
    recorded, requested = configuration.flat(configuration.load(path)), configuration.flat(point.config)
    changed = {key: (recorded[key], value) for key, value in requested.items() if value != recorded[key]}
    for key, (before, now) in changed.items():
        if not resuming.may_change(key):
            raise UserError(
                f"{point.workdir} was trained with {key}={before!r}, now {now!r}; choose another --output or "
                "remove the directory"
            )
    return changed
