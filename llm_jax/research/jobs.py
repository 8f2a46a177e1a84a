"""Runs Python commands concurrently, with locks and within the limits of memory and devices; can be resumed.

A job is done when its result exists, so the same call resumes after an interruption. While a job runs, its directory is
locked. Several processes that run the same jobs, on one machine or on machines with a shared file system, therefore
divide the jobs among themselves.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llm_jax import files, runtime
from llm_jax.errors import UserError

_POLL, _SHOW_EVERY = 0.1, 1.0  # seconds
_IDLE_POLLS = 3
_LOCK = ".job.lock"
_LAST_LINES = 8
_MEMORY_MARGIN = 1.2  # another job starts if the free memory is at least this factor times the largest peak so far

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
ELSEWHERE, ENDED = "running elsewhere", "ended early"


@dataclasses.dataclass(frozen=True)
class Job:
    """A command with its directory and completion checks.

    Attributes:
      name: the name in messages.
      command: the arguments of the Python interpreter, such as ("-m", "llm_jax.train", ...).
      directory: holds log.txt, the lock, and failed.json if the job failed.
      is_done: whether the result of the job exists.
      is_set_up: whether a running job has finished its set-up; its memory is then known and its caches are written.
    """

    name: str
    command: tuple[str, ...]
    directory: pathlib.Path
    is_done: Callable[[], bool]
    is_set_up: Callable[[], bool] = lambda: True


@dataclasses.dataclass
class Status:
    """The state of a job.

    Attributes:
      lines: the last lines of output of a failed job.
      began: start time of a running job, in seconds of `time.time`.
    """

    job: Job
    state: str
    lines: tuple[str, ...] = ()
    began: float = 0.0


@dataclasses.dataclass(frozen=True)
class MachineShare:
    """The share of the machine that one job gets: CPU cores, and environment variables that select a device."""

    cores: tuple[int, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Child:
    process: subprocess.Popen
    lock: Any
    share: MachineShare
    set_up: bool = False


_children: set[subprocess.Popen] = set()


def machine_shares(count: int = 0, most: int = 10_000) -> list[MachineShare]:
    """Divides this machine into shares: one per GPU or TPU host if JAX can use it, else one per core.

    Args:
      count: number of shares; 0: determined automatically.
      most: maximum number of shares, such as the number of jobs.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    gpus = _gpus()
    if not count:
        count = len(gpus) or (1 if pathlib.Path("/dev/accel0").exists() else len(cores))
    count = max(1, min(count, most))
    share_cores = [tuple(cores[i::count]) or tuple(cores) for i in range(count)]
    if not gpus:
        return [MachineShare(cores) for cores in share_cores]
    names = [gpus[i % len(gpus)] for i in range(count)]
    environments = [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    if count > len(gpus):  # several processes on one GPU must not each reserve most of its memory
        environments = [e | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} for e in environments]
    return [MachineShare(*pair) for pair in zip(share_cores, environments, strict=True)]


def status(job: Job) -> Status:
    """The state of a job that this process is not running."""
    if is_locked(job.directory):
        return Status(job, DONE if job.is_done() else ELSEWHERE)
    return _recorded(job)


def is_locked(directory: pathlib.Path) -> bool:
    """Whether another process has locked the directory of a job."""
    for name in (_LOCK, ".lock"):  # the locks of a job and of a trainer that was started manually
        if (directory / name).exists():
            try:
                files.lock(directory, name).close()
            except UserError:
                return True
    return False


def _recorded(job: Job) -> Status:
    """The state of a job that no process is running, read from its files."""
    if job.is_done():
        return Status(job, DONE)
    failure = job.directory / "failed.json"
    if failure.exists():
        return Status(job, FAILED, tuple(map(_plain, files.read_json(failure)["lines"])))
    return Status(job, WAITING)


def run(
    jobs: Sequence[Job],
    shares: Sequence[MachineShare],
    *,
    stop: Callable[[], Any] = lambda: False,
    show: Callable[[Sequence[Status]], None] = lambda statuses: None,
    retry_failed: bool = False,
    environment: Mapping[str, str] | None = None,
    more: Callable[[Sequence[Status]], Job | None] = lambda statuses: None,
    should_end: Callable[[Job], Any] = lambda job: False,
) -> list[Status]:
    """Runs the jobs that are not done, one in each share of the machine, and returns the states of all jobs.

    The first job runs alone until it is set up; the others then use its caches, and its memory is known. Another job
    starts only if enough memory is free. Jobs that another process is running are skipped.

    Args:
      stop: polled; if it returns a true value, `run` sends SIGTERM to the running jobs, waits for them and returns.
      show: called with the states after every change, and every second.
      retry_failed: also run jobs that failed in an earlier call.
      environment: additional environment variables of the jobs.
      more: called with the states when a share of the machine is free and no job waits; returns another job, or None.
      should_end: called for every running job each second; if it returns a true value, the job is ended by SIGTERM.
    """
    statuses = [status(job) for job in jobs]
    for s in statuses:
        if s.state == FAILED and retry_failed:
            (s.job.directory / "failed.json").unlink()
            s.state, s.lines = WAITING, ()
    free, running, peak, shown = list(shares), dict[int, _Child](), 0, 0.0
    stopping, ended, idle = False, set[int](), 0
    try:
        while True:
            changed = False
            for i, child in list(running.items()):
                peak = max(peak, _memory(child.process.pid, "VmHWM"))
                child.set_up = child.set_up or statuses[i].job.is_set_up()
                if child.process.poll() is not None:
                    del running[i]
                    free.append(child.share)
                    statuses[i] = _end(statuses[i], child, WAITING if stopping else ENDED if i in ended else "")
                    changed = True
            if stop() and not stopping:
                stopping = changed = True
                _terminate(child.process for child in running.values())
            is_idle = bool(free) and not stopping and all(s.state != WAITING for s in statuses)
            if is_idle and _may_start(list(running.values()), peak) and (job := more(statuses)):
                statuses.append(status(job))
            for i, waiting in enumerate(statuses):
                if stopping or not free or not _may_start(list(running.values()), peak):
                    break
                if waiting.state in (WAITING, ELSEWHERE):
                    statuses[i], started = _start(waiting.job, free[0], environment or {})
                    changed |= statuses[i].state != waiting.state
                    if started:
                        running[i] = started
                        free.pop(0)
            if changed or time.monotonic() - shown >= _SHOW_EVERY:
                shown = time.monotonic()
                show(statuses)
                end_now = {i for i in running if i not in ended and not stopping and should_end(statuses[i].job)}
                _terminate(running[i].process for i in end_now)
                ended |= end_now
            states = {s.state for s in statuses}
            idle = 0 if running or WAITING in states else idle + 1
            # A process that tests a lock holds it for a moment, so wait for several polls.
            if not running and (stopping or idle > (_IDLE_POLLS if ELSEWHERE in states else 0)):
                return statuses
            time.sleep(_POLL)
    finally:  # after an exception of `show` or `stop`, such as KeyboardInterrupt in a notebook
        _terminate(child.process for child in running.values())
        for child in running.values():
            child.process.wait()
            _children.discard(child.process)
            child.lock.close()


def run_all(jobs: Sequence[Job], shares: Sequence[MachineShare], **options: Any) -> None:
    """Like `run`, for jobs that must all succeed; the first failure stops the others.

    Raises:
      UserError: a job failed, or another process is running it; the message names the job, its last line and its log.
    """
    failures: list[Status] = []
    show = options.pop("show", lambda statuses: None)

    def observe(statuses: Sequence[Status]) -> None:
        failures[:] = [s for s in statuses if s.state == FAILED]
        show(statuses)

    statuses = run(jobs, shares, stop=lambda: failures, show=observe, retry_failed=True, **options)
    for s in sorted(statuses, key=lambda s: s.state != FAILED):
        if s.state != DONE:
            last = f": {s.lines[-1]} ({s.job.directory / 'log.txt'})" if s.lines else ""
            raise UserError(f"{s.job.name} is {s.state}{last}")


def kill_all() -> None:
    """Kills all running jobs of this process."""
    for process in list(_children):
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def _start(job: Job, share: MachineShare, environment: Mapping[str, str]) -> tuple[Status, _Child | None]:
    files.make_directory(job.directory)
    current = status(job)  # another process may have done the job in the meantime
    if current.state != WAITING:
        return current, None
    try:
        lock = files.lock(job.directory, _LOCK)
    except UserError:
        return Status(job, ELSEWHERE), None
    current = _recorded(job)  # check again: another process may have done the job before the lock was free
    if current.state != WAITING:
        lock.close()
        return current, None
    with (job.directory / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": _python_path(),
                **environment,
                **share.environment,
            },
            start_new_session=True,  # Ctrl-C in a terminal reaches only this process, which then ends its jobs
        )
    _children.add(process)
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, share.cores)
    return Status(job, RUNNING, began=time.time()), _Child(process, lock, share)


def _python_path() -> str:
    """PYTHONPATH for jobs, so that they import the package from the same path as this process."""
    return os.pathsep.join(filter(None, [str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))


def _end(running: Status, child: _Child, state: str) -> Status:
    """The state of a job whose process has ended; `state`: the state if it was ended on request without a result."""
    job, code = running.job, child.process.returncode
    _children.discard(child.process)
    log = (job.directory / "log.txt").read_text(errors="replace")
    lines = tuple(filter(str.strip, map(_plain, log.splitlines())))[-_LAST_LINES:]
    if job.is_done():
        result = Status(job, DONE, began=running.began)
    elif state:
        result = Status(job, state)
    elif lines and files.LOCKED in lines[-1]:
        result = Status(job, ELSEWHERE)
    else:
        lines = lines or ("no output",)
        if code == 0:
            lines += ("ended without a result",)
        elif code < 0:
            cause = " (possibly out of memory)" if code == -signal.SIGKILL else ""
            lines += (f"ended by {signal.Signals(-code).name}{cause}",)
        files.write_json(job.directory / "failed.json", {"code": code, "lines": lines})
        result = Status(job, FAILED, lines)
    child.lock.close()
    return result


def _plain(line: str) -> str:
    """A line of output without the escape sequences of terminals; other control characters are spelled out."""
    text = re.sub(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])", "", line.expandtabs())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).rstrip()


def _may_start(running: Sequence[_Child], peak: int) -> bool:
    """Whether another job may start: all are set up, and memory is free for it and for the growth of the others."""
    if not running:
        return True
    if not all(child.set_up for child in running):
        return False
    available = runtime.available_memory()
    growth = sum(max(0, peak - _memory(child.process.pid, "VmRSS")) for child in running)
    return available is None or available - growth > _MEMORY_MARGIN * peak


def _terminate(processes: Iterable[subprocess.Popen]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)


def _memory(pid: int, field: str) -> int:
    """VmRSS or VmHWM (the peak) of a process in bytes; 0 if unknown."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def _gpus() -> list[str]:
    """The numbers of the NVIDIA GPUs that JAX can use."""
    has_plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if not has_plugin or os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu", ""):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(line for line in listing.splitlines() if line.startswith("GPU "))]
