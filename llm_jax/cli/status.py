"""What a command is doing while it prints nothing else."""

import sys


def show(text: str) -> None:
    """Shows a status on stderr in the place of the one before; "" removes it. Without a terminal, does nothing."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
