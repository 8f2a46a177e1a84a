"""Profiles of training steps."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax


class Profiler:
    """Writes a trace of three steps to WORKDIR/profile for TensorBoard and xprof.

    Args:
      start, stop: the first step that this process runs, and the step after the last one. Steps start + 3 to start + 5
        are traced, after compilation; in a shorter run, the last three steps.
      enabled: whether to write a trace.
      write: prints the line that names the directory.
    """

    def __init__(
        self, workdir: pathlib.Path, start: int, stop: int, enabled: bool, write: Callable[[str], None] = print
    ):
        self._directory, self._active, self._write = workdir / "profile", False, write
        self._first = max(min(start + 3, stop - 3), start) if enabled else None
        if enabled and start >= stop:
            write(f"note: --profile writes no trace: the run has already reached train.steps={stop}")

    def before_step(self, done: int, state: Any) -> None:
        """Starts or ends the trace; call before every step with the current state."""
        if self._first is None:
            return
        if not self._active and self._first <= done < self._first + 3:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._directory))
            self._active = True
        elif done == self._first + 3:
            self.close(state)

    def stop(self) -> None:
        """Ends a running trace, for example after an error."""
        if self._active:
            self._active, self._first = False, None
            jax.profiler.stop_trace()

    def close(self, state: Any) -> None:
        """Ends a running trace and prints its directory."""
        if self._active:
            jax.block_until_ready(state)
            self.stop()
            self._write(f"profile: {self._directory} (tensorboard --logdir={self._directory})")
