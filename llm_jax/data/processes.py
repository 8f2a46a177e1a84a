"""Work on pieces of a corpus in several processes, with one progress bar."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from llm_jax.errors import UserError


def each(
    work: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    costs: Sequence[int],
    title: str,
    *,
    workers: int,
    pays: int,
) -> Iterator[tuple[int, Any]]:
    """(i, work(*jobs[i])) as they are done.

    The processes are new ones (spawned: JAX runs threads, which a fork would not survive), so a script
    that gets here needs its `if __name__ == "__main__"`.

    Args:
      costs: bytes of each job, for the bar.
      workers: processes; 0: as many as have `pays` bytes each, at most one per core. One works right here.

    Raises:
      UserError: as `work` does, or a process was killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or max(1, min(cores, sum(costs) // pays)), len(jobs))
    bar = tqdm(total=sum(costs), desc=title, unit="B", unit_scale=True, leave=False, disable=None, delay=0.5)
    with bar:
        if count <= 1:
            for i, job in enumerate(jobs):
                yield i, work(*job)
                bar.update(costs[i])
            return
        others = set(multiprocessing.active_children())
        pool = concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)
        try:
            try:
                places = {pool.submit(work, *job): i for i, job in enumerate(jobs)}
            except (OSError, ValueError) as error:  # of the pipes of a pool that breaks while it starts
                raise BrokenProcessPool(str(error)) from error
            for done in concurrent.futures.as_completed(places):
                yield places[done], done.result()
                bar.update(costs[places[done]])
        except BrokenProcessPool as error:
            for child in set(multiprocessing.active_children()) - others:
                child.kill()  # one that was started while the pool broke would wait for work for ever
            raise UserError(
                f"{title}: a process was killed or could not start (out of memory?); started again it goes on; "
                "data.workers=1 takes the least memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and says so
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A parent that is killed cannot end its processes."""
    parent.join()
    os._exit(1)
