"""The process of one side of a measure; `runner.Worker` starts it.

    python -m experiments.benchmarks.worker MODULE FUNCTION OPTIONS

FUNCTION of MODULE (without a dot: of `experiments.benchmarks.MODULE`) is called with OPTIONS (JSON) and returns a
`Job`. The process then answers every line on stdin, the number of a turn, with one line of JSON: the figures of that
turn, and "peak MiB", the largest resident memory of the process so far, where the figures have none of their own.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """A side that is ready to be measured.

    Attributes:
      turn: takes the number of the turn (negative: warming up) and returns its figures.
      software: names and versions.
      details: constants of the side, for the record.
      resource: lives as long as the job, such as a temporary directory.
    """

    turn: Callable[[int], Mapping[str, float]]
    software: str
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resource: object = None


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `work` takes, on the clock and of the processor, until the arrays that it returns are computed."""
    start, used = time.perf_counter(), time.process_time()
    result = work()
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(result)
    return time.perf_counter() - start, time.process_time() - used


def rates(unit: str, amount: float, times: tuple[float, float]) -> dict[str, float]:
    """The figures "UNIT/s" and "UNIT/s of CPU time", and "seconds" and "CPU seconds"."""
    clock, cpu = (max(seconds, 1e-9) for seconds in times)
    return {f"{unit}/s": amount / clock, f"{unit}/s of CPU time": amount / cpu, "seconds": clock, "CPU seconds": cpu}


def peak_mib() -> float:
    """The largest resident memory of this process so far, MiB."""
    try:  # ru_maxrss of a new process starts with that of its parent
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peaks() -> dict[str, float]:
    """The figure "peak MiB", and "GPU peak MiB" where a GPU is used."""
    figures = {"peak MiB": peak_mib()}
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    if jax is not None and jax.default_backend() == "gpu":
        figures["GPU peak MiB"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20
    elif torch is not None and torch.cuda.is_initialized():
        figures["GPU peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
    return figures


def resolve(name: str) -> Callable[..., Job]:
    """The function "MODULE:FUNCTION"."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module if "." in module else f"experiments.benchmarks.{module}"), function)


def main() -> None:
    module, function, options = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print does not get between the answers

    def answer(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        job = resolve(f"{module}:{function}")(**json.loads(options))
        answer({"software": job.software, "details": dict(job.details)})
        for line in sys.stdin:
            figures = dict(job.turn(int(line)))
            for figure, value in peaks().items():
                figures.setdefault(figure, value)
            answer(figures)
    except ModuleNotFoundError as error:
        answer({"error": f"{error.name} is not installed"})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        raise


if __name__ == "__main__":
    main()
