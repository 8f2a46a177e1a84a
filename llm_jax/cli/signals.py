"""SIGINT and SIGTERM of a command that runs as a process, and how such a process ends."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_PATIENCE = 5.0  # seconds between an interrupt and the end of the process
_installed = False


def install(message: str) -> None:
    """Makes SIGINT raise KeyboardInterrupt, and end the process with `message` should the exception be lost."""
    global _installed
    _installed = True
    signal.signal(signal.SIGINT, functools.partial(_interrupt, message))


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Within the context, a first SIGINT or SIGTERM is recorded instead of obeyed; a second one ends the process.

    Without `install`, in a notebook or a test, the handlers of the process stay as they are.

    Yields:
      A function that returns the number of the signal that has arrived, or 0.
    """
    received = 0

    def record(number: int, frame: Any) -> None:
        nonlocal received
        if received:
            leave(128 + number, "\nended at once; the same command resumes from the last checkpoint")
        received = number
        # os.write, because the signal may interrupt a print.
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step; once more to end at once\n".encode())

    numbers = (signal.SIGINT, signal.SIGTERM) if _installed else ()
    previous = {number: signal.signal(number, record) for number in numbers}
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave(code: int, message: str = "") -> None:
    """Ends the process with an exit code and a message on stderr, without waiting for other threads.

    Threads of the data pipeline and of Orbax would otherwise be cut off with tracebacks.
    """
    threading.excepthook = lambda failed: None
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    if message:
        os.write(2, f"{message}\n".encode())
    os._exit(code)


def _interrupt(message: str, number: int, frame: Any) -> None:
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":  # an exception raised there is lost
        signal.signal(signal.SIGALRM, functools.partial(_interrupt, message))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        return
    timer = threading.Timer(_PATIENCE, leave, (128 + signal.SIGINT, f"\n{message}"))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt
