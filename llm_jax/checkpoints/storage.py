"""Writes and removes checkpoints of runs atomically, on a disk and in an object store.

On a disk it is written under a temporary name and renamed. Objects cannot be renamed: there a checkpoint is complete
when its manifest.json exists, which is written last and deleted first. Orbax writes the arrays of gs:// itself; for
s3:// it has no driver, so that checkpoints are written to the cache directory of this machine, and uploaded.
"""

import contextlib
import hashlib
import pathlib
import shutil
from collections.abc import Iterator

from llm_jax import files, object_store


def steps(directory: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints in `directory`, ascending."""
    if object_store.is_object(directory):
        names = object_store.finished(directory)
    else:
        names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def begin(directory: pathlib.Path, step: int) -> pathlib.Path:
    """The path under which checkpoint `step` is written, which `create` creates."""
    if not object_store.is_object(directory):
        return directory / f"{files.PARTIAL}{step}"
    if object_store.has_orbax_driver(directory):
        return directory / str(step)
    return _uploads(directory) / str(step)


def create(partial: pathlib.Path) -> None:
    """Creates the directory that `begin` names. Raises OSError, UserError."""
    if object_store.is_object(partial):
        object_store.remove(partial)  # of an attempt that was not finished
    else:
        partial.mkdir(parents=True)


def commit(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Makes the checkpoint at `partial`, which has its manifest, complete under its path. Raises OSError, UserError."""
    if not object_store.is_object(path):
        files.rename(partial, path, durable=True)
    elif partial != path:
        object_store.remove(path)
        object_store.upload(partial, path)
        shutil.rmtree(partial)


def abandon(partial: pathlib.Path) -> None:
    """Removes a checkpoint that could not be written; errors are ignored."""
    if object_store.is_object(partial):
        with contextlib.suppress(Exception):
            object_store.remove(partial)
    else:
        shutil.rmtree(partial, ignore_errors=True)


def remove(path: pathlib.Path) -> None:
    """Removes a complete checkpoint. Raises OSError, UserError."""
    if object_store.is_object(path):
        object_store.remove(path)
        return
    renamed = path.with_name(f"{files.PARTIAL}{path.name}-old")
    path.rename(renamed)
    files.flush(path.parent)  # a power failure must not leave a part of it under its name
    shutil.rmtree(renamed)


def remove_unfinished(directory: pathlib.Path) -> None:
    """Removes unfinished checkpoints that killed trainers left in `directory`. Raises OSError, UserError."""
    if object_store.is_object(directory):
        shutil.rmtree(_uploads(directory), ignore_errors=True)
        finished = set(object_store.finished(directory))
        for name in {name.split("/")[0] for name in object_store.find(directory)} - finished:
            if name.isascii() and name.isdigit():  # other files do not belong to the run
                object_store.remove(directory / name)
        return
    for leftover in directory.glob(f"{files.PARTIAL}*"):
        shutil.rmtree(leftover)


def _uploads(directory: pathlib.Path) -> pathlib.Path:
    """The local directory of one run's checkpoints before they are uploaded."""
    return files.cache_directory() / "uploads" / hashlib.sha256(str(directory).encode()).hexdigest()[:32]


@contextlib.contextmanager
def readable_by_orbax(arrays: pathlib.Path) -> Iterator[pathlib.Path]:
    """The directory of arrays of a checkpoint, or a temporary copy where Orbax has no driver for its store."""
    if object_store.has_orbax_driver(arrays):
        yield files.absolute(arrays)
        return
    with files.local_copy(arrays) as copy:
        yield copy
