"""Progress bars on stderr, which show in a terminal and can be switched off for a block of code, and durations."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_enabled = contextvars.ContextVar("progress_bars", default=True)


def bar(*args: Any, **options: Any) -> Any:
    """A `tqdm` bar, as its arguments say, that shows in a terminal only, and not within `off`."""
    return tqdm(*args, disable=None if _enabled.get() else True, **options)


@contextlib.contextmanager
def off() -> Iterator[None]:
    """No bar that is created within the block shows."""
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
