"""The state of a running sweep: a table that is redrawn in a terminal, or lines without a terminal."""

import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from llm_jax import bars
from llm_jax.research import jobs, runs
from llm_jax.research.points import Point

_LINE_EVERY = 60.0  # seconds between progress lines without a terminal
_ORDER = (jobs.RUNNING, jobs.FAILED, jobs.ELSEWHERE, jobs.DONE, jobs.ENDED, jobs.WAITING)


class LiveTable:
    """Shows the states of the points of a sweep; call it with the points and the states.

    Args:
      stream: output stream; on a terminal, the table is redrawn.

    Attributes:
      is_redrawn: whether the stream is a terminal. Other lines must then not be printed between calls.
      notice: returns a message that is shown below the table while points are running, or "".
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self.is_redrawn = self._stream.isatty()
        self.notice: Callable[[], str] = lambda: ""
        self._painted = 0  # number of lines of the table on the screen
        self._print_changes = print_changes(self._stream)
        self._began = time.time()
        self._first_steps: dict[str, int] = {}  # steps that were done before this call
        self._printed = time.monotonic()

    def __call__(self, points: Sequence[Point], statuses: Sequence[jobs.Status]) -> None:
        metrics = {p.name: last_line(p.workdir / "metrics.jsonl") for p in points}
        steps = {
            p.name: p.config.train.steps if s.state == jobs.DONE else metrics[p.name].get("step", 0)
            for p, s in zip(points, statuses, strict=True)
        }
        for name, done in steps.items():
            self._first_steps.setdefault(name, done)
        seconds_left = self._time_left(points, statuses, steps)
        if self.is_redrawn:
            self._paint(points, statuses, metrics, steps, seconds_left)
        else:
            self._print(statuses, metrics, seconds_left)

    def close(self) -> None:
        """Leaves the table on the screen."""
        self._painted = 0

    def _time_left(
        self, points: Sequence[Point], statuses: Sequence[jobs.Status], steps: Mapping[str, int]
    ) -> float | None:
        """Estimated seconds until the last step of all points, or None before the first step."""
        done = sum(steps[name] - first for name, first in self._first_steps.items())
        active_states = (jobs.RUNNING, jobs.WAITING)
        remaining = sum(
            p.config.train.steps - steps[p.name]
            for p, s in zip(points, statuses, strict=True)
            if s.state in active_states
        )
        return (time.time() - self._began) / done * remaining if done > 0 else None

    def _paint(self, points, statuses, metrics, steps, left: float | None) -> None:
        width, height = shutil.get_terminal_size()
        rows = table(points, statuses, metrics, steps, max(3, height - 4))
        notice = self.notice() if any(s.state == jobs.RUNNING for s in statuses) else ""
        lines = [line[: width - 1] for line in [*rows, headline(statuses, left), notice] if line]
        up = f"\x1b[{self._painted}A" if self._painted else ""
        self._stream.write(up + "\x1b[J" + "\n".join(lines) + "\n")
        self._stream.flush()
        self._painted = len(lines)

    def _print(self, statuses, metrics, left: float | None) -> None:
        self._print_changes(statuses, {s.job.name: describe(metrics[s.job.name]) for s in statuses})
        if time.monotonic() - self._printed > _LINE_EVERY:
            self._printed = time.monotonic()
            print(headline(statuses, left), file=self._stream, flush=True)


def print_changes(stream: TextIO | None = None) -> Callable[..., None]:
    """Returns a function of states that prints a line for every job whose state has changed since the last call.

    The second, optional argument of the function is {name: details to print when the job is done}.
    """
    states: dict[str, str] = {}

    def show(statuses: Sequence[jobs.Status], details: Mapping[str, str] | None = None) -> None:
        for status in statuses:
            name = status.job.name
            before, states[name] = states.get(name, jobs.WAITING), status.state
            if before != status.state:
                detail = (details or {}).get(name, "") if status.state == jobs.DONE else ""
                print(f"{name}: {status.state}{detail and f', {detail}'}", file=stream or sys.stdout, flush=True)

    return show


def table(
    points: Sequence[Point],
    statuses: Sequence[jobs.Status],
    metrics: Mapping[str, Mapping[str, Any]],
    steps: Mapping[str, int],
    height: int,
) -> list[str]:
    """One line for each point, at most `height` lines; if not all fit, running and failed points are shown first."""
    rows = list(zip(points, statuses, strict=True))
    hidden = ""
    if len(rows) > height:
        shown = sorted(range(len(rows)), key=lambda i: (_ORDER.index(rows[i][1].state), i))[: height - 1]
        hidden = f"... and {len(rows) - len(shown)} more"
        rows = [rows[i] for i in sorted(shown)]
    width = max((len(point.name) for point, _ in rows), default=0)
    lines = []
    for point, status in rows:
        count = f"{steps[point.name]}/{point.config.train.steps}"
        detail = status.lines[-1] if status.state == jobs.FAILED else describe(metrics[point.name])
        lines.append(f"{point.name:<{width}}  {status.state:<17}  {count:>13}  {detail}".rstrip())
    return lines + [hidden] * bool(hidden)


def headline(statuses: Sequence[jobs.Status], left: float | None) -> str:
    """The number of points in each state, and the time left."""
    counts = {state: sum(s.state == state for s in statuses) for state in _ORDER}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    if not statuses:
        return "no point was run"
    left_text = f"; about {bars.duration(left)} left" if left is not None and left > 0 else ""
    return f"{runs.count(len(statuses), 'point')}: {text}{left_text}"


def describe(line: Mapping[str, Any]) -> str:
    """The loss, bits per byte and speed of a line of metrics.jsonl."""
    parts = []
    if line.get("loss") is not None:
        parts.append(f"loss {line['loss']:.3f}")
    if line.get("validation_bits_per_byte") is not None:
        parts.append(f"{line['validation_bits_per_byte']:.3f} bits per byte")
    if line.get("tokens_per_second") is not None:
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


def last_line(path: pathlib.Path) -> dict[str, Any]:
    """The last complete line of a file of JSON lines, or {}."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for length in (2**14, size):  # a line with norms may be long
                file.seek(max(0, size - length))
                lines = file.read().split(b"\n")[:-1]
                if lines and (len(lines) > 1 or length >= size):
                    return json.loads(lines[-1])
    except (OSError, ValueError):
        pass
    return {}
