"""Records the starts and ends of the trainers of a run, and computes the goodput."""

import json
import pathlib
import statistics
import time

from llm_jax import files
from llm_jax.training.bad_steps import read_metrics


def begin(workdir: pathlib.Path, step: int) -> None:
    """Records the start of a trainer in attempts.jsonl. If the previous trainer was killed, also records its end, the
    time of its last metrics."""
    attempts, metrics = _read(workdir), workdir / "metrics.jsonl"
    if attempts and "ended" not in attempts[-1]:
        last = files.modification_time(metrics) if metrics.exists() else 0.0
        attempts[-1]["ended"] = max(attempts[-1]["began"], last)
    _write(workdir, [*attempts, {"step": step, "began": time.time()}])


def end(workdir: pathlib.Path) -> None:
    """Records the end of the trainer in attempts.jsonl."""
    attempts = _read(workdir)
    attempts[-1]["ended"] = time.time()
    _write(workdir, attempts)


def goodput(workdir: pathlib.Path) -> float | None:
    """The share of the trainers' time that was spent on steps of the final run: number of steps times median step time.

    Compiling, evaluating, saving and lost steps do not count. None if no step has been timed.
    """
    lines = read_metrics(workdir / "metrics.jsonl")
    total = sum(max(attempt.get("ended", time.time()) - attempt["began"], 0.0) for attempt in _read(workdir))
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    # If the clock of the machine was changed, the quotient may exceed 1.
    return min(len(lines) * statistics.median(seconds) / total, 1.0) if seconds and total else None


def _read(workdir: pathlib.Path) -> list[dict[str, float]]:
    path = workdir / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _write(workdir: pathlib.Path, attempts: list[dict[str, float]]) -> None:
    files.write(workdir / "attempts.jsonl", "".join(json.dumps(attempt) + "\n" for attempt in attempts), durable=True)
