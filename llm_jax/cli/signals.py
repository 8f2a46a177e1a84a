"""Handlers of SIGINT and SIGTERM for commands that run as the main program, and the exit of such a process."""

import contextlib
import functools
import importlib.machinery
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

_PATIENCE = 5.0  # seconds between an interrupt and the end of the process
_installed = False


def install(message: Callable[[], str]) -> None:
    """Makes SIGINT raise KeyboardInterrupt; if the exception is lost, the process exits with `message()`."""
    global _installed
    _installed = True
    signal.signal(signal.SIGINT, functools.partial(_interrupt, message))


class DeferredSignals:
    """A context in which the first SIGINT or SIGTERM is only recorded; a second signal ends the process.

    If `install` was not called, as in a notebook or a test, the signal handlers are not changed.

    Args:
      note: message printed at the first signal; see `message`.
      before_end: called at the second signal, before the process ends.
      resumption: returns what the same command does after the process was ended by the second signal.
      prints: whether the message is printed at the first signal; a live display shows it itself.

    Attributes:
      number: number of the received signal, or 0; calling the object returns it.
    """

    def __init__(
        self,
        note: str = "saving after this step",
        before_end: Callable[[], object] = lambda: None,
        resumption: Callable[[], str] = lambda: "the same command resumes from the last checkpoint",
        prints: bool = True,
    ) -> None:
        self.number = 0
        self._prints = prints
        self._note, self._before_end, self._resumption = note, before_end, resumption
        self._previous: dict[int, Any] = {}

    def __call__(self) -> int:
        return self.number

    @property
    def message(self) -> str:
        """What is printed at the first signal; "" before it."""
        return f"{signal.Signals(self.number).name}: {self._note}; repeat to stop immediately" if self.number else ""

    def __enter__(self) -> "DeferredSignals":
        numbers = (signal.SIGINT, signal.SIGTERM) if _installed else ()
        self._previous = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: Any) -> None:
        if self.number:
            self._before_end()
            exit_process(128 + number, f"\nstopped without saving; {self._resumption()}")
        self.number = number
        if self._prints:  # os.write, because the signal may interrupt a print.
            os.write(2, f"\n{self.message}\n".encode())


def exit_process(code: int, message: str = "") -> None:
    """Exits the process with an exit code and a message on stderr, without waiting for other threads.

    A normal exit would print tracebacks of the threads of the data pipeline and of Orbax.
    """
    threading.excepthook = lambda failed: None
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    if message:
        os.write(2, f"{message}\n".encode())
    os._exit(code)


def _interrupt(message: Callable[[], str], number: int, frame: Any) -> None:
    if _loses_exceptions(frame):
        signal.signal(signal.SIGALRM, functools.partial(_interrupt, message))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        return
    timer = threading.Timer(_PATIENCE, lambda: exit_process(128 + signal.SIGINT, f"\n{message()}"))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _loses_exceptions(frame: types.FrameType | None) -> bool:
    """Whether an exception raised in this frame would not reach `cli.start`.

    The garbage collector ignores exceptions of XLA's callback. jaxlib converts exceptions during its initialization to
    ImportError, or crashes.
    """
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":
            return True
        if isinstance(frame.f_locals.get("self"), importlib.machinery.ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False
