"""A machine that loses power: what remains on its disk is what has been flushed.

    with Recorder(directory) as recorder: ...      # records os.fsync and os.replace
    recorder.restore(moment, target)               # the directory as it was after the power failed at that moment

The model is stricter than most file systems. A file holds what it held when it was last flushed, or nothing. A
directory holds the names that it had when it was last flushed. A rename counts from the flush of its directory.
"""

import os
import pathlib
from typing import Any


class Recorder:
    def __init__(self, root: pathlib.Path):
        self._root = root
        self._files: dict[int, bytes] = {}  # inode: flushed content
        self._directories: dict[int, dict[str, tuple[int, bool]]] = {}  # inode: flushed {name: (inode, is directory)}
        self.moments: list[tuple[dict[int, bytes], dict[int, dict[str, tuple[int, bool]]]]] = []

    def __enter__(self) -> "Recorder":
        self._fsync, self._replace = os.fsync, os.replace
        os.fsync, os.replace = self._on_fsync, self._on_replace
        self._flushed(self._root)
        return self

    def __exit__(self, *error: Any) -> None:
        os.fsync, os.replace = self._fsync, self._replace

    def _on_fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self._fsync(number)
        path = pathlib.Path(f"/proc/self/fd/{number}").readlink()
        if path.is_relative_to(self._root):
            self._flushed(path)

    def _on_replace(self, source: Any, target: Any, **options: Any) -> None:
        self._replace(source, target, **options)
        self._record()

    def _flushed(self, path: pathlib.Path) -> None:
        inode = path.stat().st_ino
        if path.is_dir():
            self._directories[inode] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        else:
            self._files[inode] = path.read_bytes()
        self._record()

    def _record(self) -> None:
        self.moments.append((dict(self._files), dict(self._directories)))

    def restore(self, moment: int, target: pathlib.Path) -> None:
        """Writes what remains after a power failure at this moment into `target`."""
        files, directories = self.moments[moment]

        def write(inode: int, path: pathlib.Path) -> None:
            path.mkdir()
            for name, (inner, is_directory) in directories.get(inode, {}).items():
                if is_directory:
                    write(inner, path / name)
                else:
                    (path / name).write_bytes(files.get(inner, b""))

        write(self._root.stat().st_ino, target)
