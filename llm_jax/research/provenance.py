"""The provenance of a result: command, commit, machine and date."""

import dataclasses
import datetime
import functools
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The provenance of a result; unknown values are "".

    Attributes:
      command: the command that reproduces the result.
      commit: git commit of the code, with "+changes" if tracked files differed from it.
      machine: processor, number of cores, versions of Python and JAX.
      date: day of the measurement, ISO 8601.

    If a result was measured at several commits, on several machines or on several days, all are named; see `combine`.
    """

    command: str = ""
    commit: str = ""
    machine: str = ""
    date: str = ""


def here(command: str) -> Provenance:
    """The provenance of a measurement by `command` now on this machine."""
    return Provenance(command, commit(), machine(), datetime.date.today().isoformat())


def combine(origins: Iterable[Provenance], command: str) -> Provenance:
    """Combines the provenances of the figures from which a result was computed.

    Args:
      origins: the provenance of each figure; their commands are not used.
      command: the command that reproduces the result.

    Returns:
      A provenance in which different commits and machines are joined by "; " in the order of their dates, and different
      days are written as OLDEST..NEWEST. If only some values are unknown, these are "unknown".
    """
    ordered = sorted(origins, key=lambda origin: origin.date)
    commits, machines, dates = (
        list(dict.fromkeys(getattr(origin, name) for origin in ordered)) for name in ("commit", "machine", "date")
    )
    ends = dates if len(dates) < 2 else [dates[0] or "unknown", dates[-1]]
    return Provenance(command, _join(commits), _join(machines), "..".join(ends))


def command_line(name: str) -> str:
    """The command `python -m llm_jax.NAME ...` with the arguments of this process."""
    arguments = sys.argv[2:] if sys.argv[1:2] == [name] else sys.argv[1:]  # llm-jax NAME ...
    return shlex.join(["python", "-m", f"llm_jax.{name}", *arguments])


@functools.cache
def commit() -> str:
    """The git commit of this code, with "+changes" if tracked files differ from it; "" outside a checkout."""
    root = pathlib.Path(__file__).parent
    head = _git("-C", str(root), "rev-parse", "--short=10", "HEAD")
    tracked = _git("-C", str(root), "ls-files", "--", pathlib.Path(__file__).name)
    if not head or not tracked:  # not a checkout of this package
        return ""
    return head + ("+changes" if _git("-C", str(root), "status", "--porcelain", "--untracked-files=no") else "")


def machine() -> str:
    """The processor, the number of usable cores, and the versions of Python and JAX."""
    from importlib.metadata import version

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores, Python {platform.python_version()}, jax {version('jax')}"


@functools.cache
def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _join(values: list[str]) -> str:
    return values[0] if len(values) == 1 else "; ".join(value or "unknown" for value in values)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
