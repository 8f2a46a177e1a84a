"""The state of a running sweep: a table that is redrawn in a terminal, or lines without a terminal."""

import dataclasses
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


@dataclasses.dataclass
class _Speed:
    """The speed of a point while it runs.

    Attributes:
      began: start time in seconds of `time.time`.
      resumed: the step from which the point continues.
      set_up: seconds until its first step; None before it.
      seconds_per_step: mean over the steps after the first, with evaluations and saves; None before them.
    """

    began: float
    resumed: int
    set_up: float | None = None
    seconds_per_step: float | None = None
    _first: tuple[int, float] = (0, 0.0)  # the first step of this run that was seen, and the time

    def record(self, step: int, now: float) -> None:
        if step <= self.resumed:
            return
        if self.set_up is None:
            self.set_up, self._first = now - self.began, (step, now)
        elif step > self._first[0]:
            self.seconds_per_step = (now - self._first[1]) / (step - self._first[0])


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
        self._speeds: dict[str, _Speed] = {}  # of the points that have run since the first call
        self._printed = time.monotonic()

    def __call__(self, points: Sequence[Point], statuses: Sequence[jobs.Status]) -> None:
        metrics = {p.name: last_line(p.workdir / "metrics.jsonl") for p in points}
        steps = {
            p.name: p.config.train.steps if s.state == jobs.DONE else metrics[p.name].get("step", 0)
            for p, s in zip(points, statuses, strict=True)
        }
        now = time.time()
        for status in statuses:
            if status.state == jobs.RUNNING:
                speed = self._speeds.setdefault(status.job.name, _Speed(status.began, steps[status.job.name]))
                speed.record(steps[status.job.name], now)
        seconds_left = time_left(points, statuses, steps, self._speeds, now)
        if self.is_redrawn:
            self._paint(points, statuses, metrics, steps, seconds_left)
        else:
            self._print(statuses, metrics, seconds_left)

    def close(self) -> None:
        """Leaves the table on the screen."""
        self._painted = 0

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


def time_left(
    points: Sequence[Point],
    statuses: Sequence[jobs.Status],
    steps: Mapping[str, int],
    speeds: Mapping[str, _Speed],
    now: float,
) -> float | None:
    """Estimated seconds until the last step of all points, or None before the second step of a point.

    The work of each point, its steps and its set-up, is divided by the number of points that run concurrently. A point
    without a step takes the mean time per step and the shortest set-up of the others.
    """
    measured = [speed.seconds_per_step for speed in speeds.values() if speed.seconds_per_step is not None]
    if not measured:
        return None
    each = sum(measured) / len(measured)
    set_up = min(speed.set_up for speed in speeds.values() if speed.set_up is not None)
    work = [0.0]
    for point, status in zip(points, statuses, strict=True):
        left, speed = point.config.train.steps - steps[point.name], speeds.get(point.name)
        if status.state == jobs.WAITING:
            work.append(set_up + left * each)
        elif status.state == jobs.RUNNING and speed is not None and speed.set_up is None:
            work.append(max(set_up - (now - speed.began), 0.0) + left * each)
        elif status.state == jobs.RUNNING and speed is not None:
            work.append(left * (each if speed.seconds_per_step is None else speed.seconds_per_step))
    running = sum(status.state == jobs.RUNNING for status in statuses)
    return max(sum(work) / max(running, 1), max(work))


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
