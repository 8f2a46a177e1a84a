"""Text objects that grow in an object store, such as the metrics of a run."""

import io
import threading
import time
from collections.abc import Callable
from typing import Any

from llm_jax.errors import UserError
from llm_jax.object_store import store

_UPLOAD_EVERY = 15.0  # seconds between uploads of an object that grows
_REST = 10  # the time between these uploads, in durations of the last one


class Appender(io.TextIOBase):
    """A text object that grows: it is kept in memory and written again as a whole.

    It is written at most every few seconds in the background, and at `sync` and `close`. The longer an upload takes,
    the longer the time to the next one, so that a long file does not keep the network busy.

    Args:
      path: the object, which may exist.
      check: called before every upload; raises UserError if another process writes the object now.
    """

    def __init__(self, path: Any, check: Callable[[], None] = lambda: None):
        self._path, self._check, self._next = path, check, time.monotonic() + _UPLOAD_EVERY
        self._parts: list[str] = [store.read(path).decode()] if path.exists() else []
        self._upload: threading.Thread | None = None
        self._changed = False

    def write(self, text: str) -> int:
        self._parts.append(text)
        self._changed = True
        return len(text)

    def flush(self) -> None:
        """Starts an upload if the last one was long ago. One that fails is tried again, and fails at `sync`."""
        if self.closed or not self._changed or time.monotonic() < self._next:
            return
        if self._upload is None or not self._upload.is_alive():
            self._changed = False
            self._upload = threading.Thread(target=self._try, args=(self._content(),), daemon=True)
            self._upload.start()

    def sync(self) -> None:
        """Writes what has not been written. Raises UserError."""
        if self._upload is not None:
            self._upload.join()  # it must not replace the newer content
        if self._changed:
            self._write(self._content())
            self._changed = False

    def close(self) -> None:
        if not self.closed:
            try:
                self.sync()
            finally:
                super().close()

    def _content(self) -> bytes:
        self._parts = ["".join(self._parts)]
        return self._parts[0].encode()

    def _write(self, content: bytes) -> None:
        began = time.monotonic()
        try:
            self._check()
            store.write(self._path, content)
        finally:
            now = time.monotonic()
            self._next = now + max(_UPLOAD_EVERY, _REST * (now - began))

    def _try(self, content: bytes) -> None:
        try:
            self._write(content)
        except UserError:
            self._changed = True
