"""The status line of a command that prints nothing else yet."""

import sys


def show(text: str) -> None:
    """Replaces the status line on stderr; "" removes it. Without a terminal, does nothing."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
