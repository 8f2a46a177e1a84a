"""Runs jobs on a cluster of Ray Data (https://docs.ray.io): the counterpart of `local_engine` for several machines.

Ray starts a task anew if its process or machine fails. The cluster is that of RAY_ADDRESS, or one that runs on this
machine, or a new one of the cores of this machine. Ray neither encrypts nor authenticates its traffic by default.
"""

import functools
import logging
import os
import pathlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llm_jax import bars
from llm_jax.errors import UserError

NAME = "ray"


def run_jobs(
    work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], costs: Sequence[int], title: str
) -> Iterator[tuple[int, Any]]:
    """Yields (i, work(*jobs[i])) in the order in which Ray returns the results.

    Args:
      work: a function of a module of this package, or a `functools.partial` of one, that depends on its arguments and
        on the files that they name only. This package is sent to the cluster; its dependencies must be installed there.
      costs: bytes of each job, for the progress bar.
      title: the label of the bar.

    Raises:
      UserError: `work` raises it, Ray is not installed, or the cluster cannot be reached or fails.
    """
    if not jobs:
        return
    ray = _connected()
    from ray.exceptions import RayError

    rows = [{"index": i, "job": pickle.dumps(job)} for i, job in enumerate(jobs)]
    try:
        tasks = ray.data.from_items(rows, override_num_blocks=len(rows)).map(functools.partial(_result, work))
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


def _result(work: Callable[..., Any], row: dict[str, Any]) -> dict[str, Any]:
    """The row of a result, on a machine of the cluster: a pickled (message of an error or "", value)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a task
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
