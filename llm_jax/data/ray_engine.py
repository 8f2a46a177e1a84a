"""Runs jobs on a cluster of Ray Data (https://docs.ray.io): the counterpart of `local_engine` for several machines.

Ray starts a task anew if its process or machine fails. The cluster is that of RAY_ADDRESS, or one that runs on this
machine, or a new one of the cores of this machine. Ray neither encrypts nor authenticates its traffic by default.
"""

import atexit
import functools
import logging
import os
import pathlib
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llm_jax import bars, extensions
from llm_jax.errors import UserError

NAME = "ray"


def run_jobs(
    work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], costs: Sequence[int], title: str, parts: Iterable[str]
) -> Iterator[tuple[int, Any]]:
    """Yields (i, work(*jobs[i])) in the order in which Ray returns the results.

    Args:
      work: a function of a module of this package, or a `functools.partial` of one, that depends on its arguments and
        on the files that they name only. This package is sent to the cluster; its dependencies must be installed there.
      costs: bytes of each job, for the progress bar.
      title: the label of the bar.
      parts: names of the parts that `work` uses; the files of custom parts are sent with the jobs.

    Raises:
      UserError: `work` raises it, Ray is not installed, or the cluster cannot be reached or fails.
    """
    if not jobs:
        return
    ray = _connected()
    from ray.exceptions import RayError

    rows = [{"index": i, "job": pickle.dumps(job)} for i, job in enumerate(jobs)]
    sources = _sources(parts)
    try:
        tasks = ray.data.from_items(rows, override_num_blocks=len(rows)).map(functools.partial(_result, work, sources))
        with bars.bar(total=sum(costs), desc=title, unit="B", unit_scale=True, leave=False, delay=0.5) as bar:
            for row in tasks.iter_rows():
                error, value = pickle.loads(row["result"])
                if error:
                    raise UserError(error)
                yield row["index"], value
                bar.update(costs[row["index"]])
    except RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        raise UserError(f"{title}: Ray gave up ({reason}); the same command resumes from the finished parts") from error


def _sources(parts: Iterable[str]) -> tuple[tuple[str, bytes], ...]:
    """(relative path, content) of the files of custom parts. Those of installed packages are not sent."""
    names = sorted({name for part in parts if (name := extensions.module_name(part))})
    paths = [(extensions.relative_path(name), extensions.find_file(name)) for name in names]
    return tuple((name, path.read_bytes()) for name, path in paths if path and _is_below(name))


def _is_below(name: str) -> bool:
    path = pathlib.PurePath(name)
    return not path.is_absolute() and ".." not in path.parts and not name.startswith("~")


@functools.lru_cache(16)
def _install(sources: tuple[tuple[str, bytes], ...]) -> None:
    """Writes the files of custom parts to a directory of this process, where `extensions` reads and accepts them."""
    directory = tempfile.mkdtemp(prefix="llm_jax_parts_")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    paths = [pathlib.Path(directory, name) for name, _ in sources]
    for path, (_, content) in zip(paths, sources, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    sys.path.insert(0, directory)
    allowed = [os.environ.get("LLM_JAX_ALLOW", ""), *map(str, paths)]
    os.environ["LLM_JAX_ALLOW"] = os.pathsep.join(filter(None, allowed))


def _result(work: Callable[..., Any], sources: tuple[tuple[str, bytes], ...], row: dict[str, Any]) -> dict[str, Any]:
    """The row of a result, on a machine of the cluster: a pickled (message of an error or "", value)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a task
    _install(sources)
    try:
        outcome: tuple[str, Any] = "", work(*pickle.loads(row["job"]))
    except UserError as error:
        outcome = str(error), None
    return {"index": row["index"], "result": pickle.dumps(outcome)}


def _connected() -> Any:
    """The module `ray`, connected to a cluster. Raises UserError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray sends usage statistics
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"--engine={NAME} needs the package ray; pip install 'llm_jax[ray]'") from error
    if not ray.is_initialized():
        package = str(pathlib.Path(__file__).parents[1])
        environment = {"py_modules": [package], "env_vars": {"JAX_PLATFORMS": "cpu"}}
        try:
            ray.init(runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # many types: no cluster at the address, another version of Ray or Python
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            address = os.environ.get("RAY_ADDRESS", "")
            raise UserError(f"--engine={NAME}: no cluster at RAY_ADDRESS={address} ({reason})") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray
