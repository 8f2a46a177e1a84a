"""Progress bars on stderr, and durations as text."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_enabled = contextvars.ContextVar("progress_bars", default=True)


def bar(*args: Any, **options: Any) -> Any:
    """A `tqdm` bar with these arguments, shown only in a terminal and outside of `off`."""
    return tqdm(*args, disable=None if _enabled.get() else True, **options)


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Context in which new bars are not shown."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def duration(seconds: float) -> str:
    """Seconds as "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
