"""Locks of directories in an object store: objects that are created conditionally and renewed by heartbeats."""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from typing import Any

from llm_jax.errors import UserError
from llm_jax.object_store import store

_HEARTBEAT = 5.0  # seconds between heartbeats of the holder of a lock
_STALE = 30.0  # seconds without a heartbeat after which another process takes over the lock


class Lock:
    """A lock of a directory, held against all other processes that create a `Lock` there.

    The lock is an object `NAME-NUMBER`, created on condition that it does not exist (If-None-Match;
    ifGenerationMatch=0). The holder rewrites it every few seconds (a heartbeat). A process that finds the object
    watches it: after `_STALE` seconds without a change, or at once if the holder ran on this machine and has ended, it
    takes over the lock by creating the object with the next number. Clocks of different machines are not compared.

    Raises:
      UserError: another process holds the lock, or it cannot be written.
    """

    def __init__(self, directory: Any, name: str, locked: str):
        self._directory, self._name, self._locked = directory, name, locked
        self._own = {"process": os.getpid(), "started": _started(os.getpid()), "machine": _machine()}
        self._own |= {"host": socket.gethostname(), "token": secrets.token_hex(8)}
        self._number = self._take()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises UserError if another process has taken over the lock."""
        if self._numbers()[-1:] != [self._number] or not self._is_own():
            raise UserError(
                f"{self._directory}: another trainer has taken over this run, because this one sent no heartbeat for "
                f"{_STALE:.0f} s; the run continues there"
            )

    def close(self) -> None:
        """Releases the lock; may be called again."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # a lock that is not deleted becomes stale
            if self._is_own():
                store.delete(self._object(self._number))

    def _take(self) -> int:
        numbers = self._numbers()
        if numbers:
            self._watch(numbers[-1])
        number = max(numbers, default=0) + 1
        try:
            store.create(self._object(number), self._content(0))
        except FileExistsError as error:
            raise self._refusal(self._read(number)) from error
        for older in numbers:
            store.delete(self._object(older))
        return number

    def _watch(self, number: int) -> None:
        """Returns when lock `number` is stale or released. Raises UserError if its holder is running."""
        before = self._read(number)
        until = time.monotonic() + _STALE
        if before and before.get("machine") == self._own["machine"]:
            if _started(before["process"]) != before["started"]:
                return
            raise self._refusal(before)
        if before:
            print(
                f"{self._directory}: locked by {_describe(before)}; waiting up to {_STALE:.0f} s for a heartbeat",
                file=sys.stderr,
                flush=True,
            )
        while time.monotonic() < until:
            time.sleep(min(_HEARTBEAT / 4, max(until - time.monotonic(), 0.0)))
            now = self._read(number)
            if not now:
                return
            if now != before:
                raise self._refusal(now)

    def _keep(self) -> None:
        beat = 0
        while not self._stop.wait(_HEARTBEAT):
            with contextlib.suppress(Exception):  # the network may come back; `check` says whether the lock is lost
                if not self._is_own():
                    return
                beat += 1
                store.write(self._object(self._number), self._content(beat))

    def _is_own(self) -> bool:
        return self._read(self._number).get("token") == self._own["token"]

    def _read(self, number: int) -> dict[str, Any]:
        try:
            return json.loads(store.read(self._object(number)))
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            return {}

    def _numbers(self) -> list[int]:
        parts = [name.rpartition("-") for name in store.list_directory(self._directory)]
        return sorted(int(number) for name, _, number in parts if name == self._name and number.isdecimal())

    def _object(self, number: int) -> Any:
        return self._directory / f"{self._name}-{number}"

    def _content(self, beat: int) -> bytes:
        return json.dumps(self._own | {"beat": beat}).encode()

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        return UserError(f"{self._directory}: {self._locked} ({_describe(holder)}); end it first")


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('host', '?')}"


def _machine() -> str:
    """An id of this boot of this machine and of its container."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {boot.read_text().strip()} {pathlib.Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()} {secrets.token_hex(8)}"  # unknown: only heartbeats show whether the holder runs


def _started(process: int) -> str:
    """When a process of this machine was started, in ticks of its kernel; "" if it has ended."""
    try:
        fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
