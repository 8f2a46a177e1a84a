"""Runs a measure: every side in a process of its own, in turns, on the same cores, while the other work is watched.

A side is a function that `worker.py` calls in its process. The order of the sides is reversed in every other round, so
that a steady drift of the machine's speed cancels in the ratios, which are taken between turns of one round.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

QUIET = 0.05  # largest share of the cores' time that other work may take on a machine that is called quiet
BOUNDS = "bounds"  # the side that measures what the machine can do
# What the first step takes above the median of the later ones, to compile and to allocate memory.
FIRST = {"seconds": "first step, extra s", "CPU seconds": "first step, extra CPU s"}
ROOT = pathlib.Path(__file__).parents[2]

Figures = dict[str, float]
Turn = Callable[[int], Figures]


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the programs that a measure compares.

    Attributes:
      name: its row in the table.
      prepare: "MODULE:FUNCTION"; see `worker`.
      options: keyword arguments of the function.
      peer: runs in the interpreter of `--peer_python`.
      rivals: names of the sides that its figures are divided by.
      environment: environment variables of its process.
    """

    name: str
    prepare: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    peer: bool = False
    rivals: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is measured in one alternation.

    Attributes:
      name: of `--only`, and the key in the results.
      title: heading of its table.
      note: one or two sentences below the heading: sizes, units, what a turn is.
      sides: in the order of the table.
      rounds: number of rounds that are counted.
      warm_up: number of turns of each side before the first round; they compile.
      same_loss: largest relative difference of the figure "loss" of the first turn between sides; 0: not compared.
    """

    name: str
    title: str
    note: str
    sides: tuple[Side, ...]
    rounds: int
    warm_up: int = 1
    same_loss: float = 0.0


class SideError(Exception):
    """A side cannot run; the message says why, in one line."""


# ---------------------------------------------------------------- one measure


def run(measure: Measure, peer_python: str, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs a measure and returns its record: machine, load, the figures of every side, and the sides that are missing.

    Args:
      peer_python: interpreter of the sides that are other people's software.
      say: prints a line of progress.
    """
    record: dict[str, Any] = {
        "title": measure.title,
        "note": measure.note,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine(),
        "software": {},
        "details": {},
        "missing": {},
    }
    with contextlib.ExitStack() as stack:
        turns: dict[str, Turn] = {}
        first: dict[str, Figures] = {}  # of the first turn, which compiles
        for side in measure.sides:
            try:
                worker = stack.enter_context(Worker(side, peer_python if side.peer else sys.executable))
                warm_up = [worker.turn(-1 - i) for i in range(measure.warm_up)]
                first[side.name] = warm_up[0] if warm_up else {}
                _check_loss(side.name, first, measure.same_loss)
            except SideError as error:
                first.pop(side.name, None)
                record["missing"][side.name] = str(error)
                say(f"  {side.name}: {error}")
                continue
            turns[side.name] = worker.turn
            record["software"][side.name] = worker.software
            record["details"][side.name] = dict(worker.details)
            say(f"  {side.name}: ready ({worker.software})")
        values, failed, circumstances = _rounds(turns, measure.rounds, say)
    record |= circumstances
    record["missing"] |= failed
    for name, figures in values.items():
        if "loss" in figures:
            for figure, extra in FIRST.items():
                above = first[name][figure] - statistics.median(figures[figure])
                record["details"][name][extra] = round(max(0.0, above), 1)
            record["details"][name]["first loss"] = first[name]["loss"]
            del figures["loss"]
    known_bounds = values.pop(BOUNDS, {})
    record["bounds"] = summarize(known_bounds)
    record["sides"] = {name: summarize(figures) for name, figures in values.items()}
    record["ratios"] = ratios(values, {side.name: side.rivals for side in measure.sides})
    record["of bounds"] = shares_of_bounds(values, record["details"], known_bounds)
    return record


def _rounds(
    turns: Mapping[str, Turn], rounds: int, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str], dict[str, Any]]:
    """The results of `alternate`, and what else ran on the cores meanwhile."""
    others = OtherWork(sorted(os.sched_getaffinity(0)))
    shares: list[float | None] = []
    loads: list[float] = []

    def watch(number: int) -> None:
        shares.append(others.share())
        loads.append(round(os.getloadavg()[0], 2))
        share = "unknown" if shares[-1] is None else f"{shares[-1]:.0%}"
        say(f"  round {number + 1} of {rounds}: other work took {share} of the cores, load {loads[-1]}")

    values, failed = alternate(turns, rounds, watch)
    rounded = [None if share is None else round(share, 3) for share in shares]
    return values, failed, {"rounds": rounds, "other work": rounded, "load": loads, "quiet": is_quiet(shares)}


def _check_loss(name: str, first: Mapping[str, Figures], tolerance: float) -> None:
    """Compares the loss of a side's first turn with those of the sides before it. Raises: SideError."""
    loss = first[name].get("loss")
    if not tolerance or loss is None:
        return
    for other, figures in first.items():
        if "loss" in figures and not abs(figures["loss"] - loss) <= tolerance * abs(loss):
            raise SideError(f"its first loss is {loss:.5f}, that of {other} {figures['loss']:.5f}; they must agree")


def alternate(
    turns: Mapping[str, Turn], rounds: int, after: Callable[[int], None] = lambda number: None
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Calls every turn once per round, in reverse order in every other round.

    Args:
      turns: by the name of the side; each gets the number of the round and returns its figures.
      after: called with the number of the round after each.

    Returns:
      {side: {figure: [value per round]}} of the sides that took part in all rounds, and {side: error} of the others.
    """
    values: dict[str, dict[str, list[float]]] = {name: {} for name in turns}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in list(turns)[:: 1 if number % 2 == 0 else -1]:
            if name in failed:
                continue
            try:
                figures = turns[name](number)
            except SideError as error:
                failed[name] = str(error)
                continue
            for figure, value in figures.items():
                values[name].setdefault(figure, []).append(value)
        after(number)
    return {name: figures for name, figures in values.items() if name not in failed}, failed


def summarize(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """{figure: {"median", "low", "high", "values"}}."""
    return {
        figure: {"median": statistics.median(v), "low": min(v), "high": max(v), "values": list(v)}
        for figure, v in values.items()
    }


def ratios(values: Mapping[str, Mapping[str, Sequence[float]]], rivals: Mapping[str, Sequence[str]]) -> list[dict]:
    """The ratios between turns of one round, of every side to each of its rivals, for the figures that both have."""
    result = []
    for name, others in rivals.items():
        for other in others:
            if name not in values or other not in values:
                continue
            for figure, mine in values[name].items():
                theirs = values[other].get(figure)
                if theirs is None or not all(theirs):
                    continue
                quotients = [a / b for a, b in zip(mine, theirs, strict=True)]
                result.append({"side": name, "rival": other, "figure": figure} | summarize({"": quotients})[""])
    return result


def shares_of_bounds(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    details: Mapping[str, Mapping[str, Any]],
    bounds: Mapping[str, Sequence[float]],
) -> list[dict]:
    """The shares of the machine's bounds that sides reach, between turns of one round.

    Args:
      details: "bounds" of a side lists (figure, bound, amount of it in units of 10^9 that one of the figure needs).
      bounds: the values of the machine's bounds, in 10^9 per second.
    """
    result = []
    for name, figures in values.items():
        for figure, bound, amount in details[name].get("bounds", ()):
            if figure in figures and bound in bounds:
                parts = [rate * amount / b for rate, b in zip(figures[figure], bounds[bound], strict=True)]
                result.append({"side": name, "bound": bound, "figure": figure} | summarize({"": parts})[""])
    return result


# ---------------------------------------------------------------- the process of a side


class Worker(contextlib.AbstractContextManager):
    """The process of a side, which takes turns on request.

    Attributes:
      software: names and versions of what the side runs.
      details: constants of the side, such as the bytes of its weights.

    Raises:
      SideError: the side cannot be prepared.
    """

    def __init__(self, side: Side, python: str):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by __exit__
        settings = {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false", "TOKENIZERS_PARALLELISM": "false"}
        module, function = side.prepare.split(":")
        command = [python, "-m", "experiments.benchmarks.worker", module, function, json.dumps(dict(side.options))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=os.environ | settings | dict(side.environment),
        )
        try:
            ready = self._receive()
        except SideError:
            self.__exit__()
            raise
        self.software, self.details = ready["software"], ready["details"]

    def turn(self, number: int) -> Figures:
        """The figures of one turn. Raises: SideError."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # _receive says why
            print(number, file=self._process.stdin, flush=True)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["no message"]
            raise SideError(f"the process ended with exit code {self._process.returncode} ({last[0][:200]})")
        message = json.loads(line)
        if "error" in message:
            raise SideError(message["error"])
        return message

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        try:
            self._process.wait(5)  # the end of its input ends it
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


# ---------------------------------------------------------------- the machine


class OtherWork:
    """The share of the time of some cores that was spent on work of others: other processes, other virtual machines."""

    def __init__(self, cores: Sequence[int]):
        self._cores = {f"cpu{core}" for core in cores}
        self._last = self._read()

    def share(self) -> float | None:
        """From 0 to 1, since the last call; None where the system does not say."""
        now = self._read()
        if now is None or self._last is None:
            return None
        seconds, busy, own = (a - b for a, b in zip(now, self._last, strict=True))
        self._last = now
        return min(1.0, max(0.0, busy - own) / (seconds * len(self._cores)))

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds: of the clock, that the cores were busy, that this process and its children used."""
        try:
            lines = pathlib.Path("/proc/stat").read_text().splitlines()
        except OSError:
            return None
        tick = os.sysconf("SC_CLK_TCK")
        busy = 0
        for line in lines:
            name, *times = line.split()
            if name in self._cores:  # user, nice, system, (idle, iowait), irq, softirq, steal
                busy += sum(int(t) for i, t in enumerate(times[:8]) if i not in (3, 4))
        own = sum(os.times()[:4]) + sum(_cpu_seconds(pid) for pid in _descendants(os.getpid()))
        return time.monotonic(), busy / tick, own


def is_quiet(shares: Sequence[float | None]) -> bool:
    """Whether other work took at most `QUIET` of the cores in every round; False where that is not known."""
    return bool(shares) and all(share is not None and share <= QUIET for share in shares)


def machine() -> dict[str, Any]:
    """The CPU, its instructions for matrix products, the cores that are used, and the memory in GiB."""
    text = ""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": fields.get("model name", "unknown"),
        "instructions": [name for name in known if name in fields.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory GiB": round(memory, 1),
        **_gpu(),
    }


def _gpu() -> dict[str, str]:
    """The name of the first NVIDIA GPU, if there is one."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0 and result.stdout.strip():
            return {"gpu": result.stdout.splitlines()[0].strip()}
    return {}


def _descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started and that still run, and theirs."""
    with contextlib.suppress(OSError):
        for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            for child in path.read_text().split():
                yield int(child)
                yield from _descendants(int(child))


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its children that have ended."""
    try:
        after_name = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(ticks) for ticks in after_name[11:15]) / os.sysconf("SC_CLK_TCK")
