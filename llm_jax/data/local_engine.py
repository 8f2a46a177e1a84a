"""Runs jobs in several processes, with one progress bar."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from llm_jax import bars, extensions
from llm_jax.errors import UserError


def run_jobs(
    work: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    costs: Sequence[int],
    title: str,
    *,
    workers: int,
    min_bytes: int,
) -> Iterator[tuple[int, Any]]:
    """Yields (i, work(*jobs[i])) in the order in which the jobs finish.

    The processes are spawned, because JAX runs threads, which do not survive a fork: a script that calls this needs
    `if __name__ == "__main__"`.

    Args:
      costs: bytes of each job, for the progress bar.
      title: the label of the bar.
      workers: number of processes; 0: one for every `min_bytes` of the jobs, at most one per core. A single one is this
        process.

    Raises:
      UserError: `work` raises it, or a process was killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or max(1, min(cores, sum(costs) // min_bytes)), len(jobs))
    bar = bars.bar(total=sum(costs), desc=title, unit="B", unit_scale=True, leave=False, delay=0.5)
    with bar:
        if count <= 1:
            for i, job in enumerate(jobs):
                yield i, work(*job)
                bar.update(costs[i])
            return
        children_before = set(multiprocessing.active_children())
        pool = concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)
        try:
            try:
                numbers = {pool.submit(work, *job): i for i, job in enumerate(jobs)}
            except (OSError, ValueError) as error:  # from the pipes of a pool that breaks while it starts
                raise BrokenProcessPool(str(error)) from error
            for done in concurrent.futures.as_completed(numbers):
                yield numbers[done], done.result()
                bar.update(costs[numbers[done]])
        except BrokenProcessPool as error:
            for child in set(multiprocessing.active_children()) - children_before:
                child.kill()  # a process that started while the pool broke would never end
            raise UserError(
                f"{title}: a process was killed or could not start (out of memory?); the same command resumes; "
                "data.workers=1 needs the least memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def num_workers(workers: int, engine: str, parts: Iterable[str]) -> int:
    """`workers`, or 1 if a custom part is defined in `__main__`, for example of a notebook, which others cannot import.

    Args:
      engine: "local", or "ray".
      parts: names of parts, or specifications of custom ones.

    Raises:
      UserError: another engine than "local" would need such a part.
    """
    local = [part for part in parts if extensions.module_name(part) == "__main__"]
    if local and engine != "local":
        raise UserError(
            f"{local[0].partition('#')[0]}: only this process has this part; define it in a file for --engine={engine}"
        )
    return 1 if local else workers


def _begin() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and reports it
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """Ends this process when its parent ends, even if the parent was killed."""
    parent.join()
    os._exit(1)
