"""Atomic writing of files and directories: they are written under a temporary name, then renamed.

    with files.new_file(path) as file: file.write(b"...")
    with files.new_directory(path) as partial: (partial / "model.bin").write_bytes(b"...")
    files.write(path, "text"); files.write_json(path, value); value = files.read_json(path)

Files are created with the permissions of the user's umask.

All functions take `pathlib.Path`s. For gs://BUCKET/PATH and s3://BUCKET/PATH, `path` returns a path of `etils.epath`
with the same methods, and the functions use the object store instead of the disk, also for appending and locking.
"""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, TextIO

from llm_jax import object_store
from llm_jax.errors import UserError

PARTIAL = ".partial-"  # prefix of the temporary names
_POINTER = b"version https://git-lfs.github.com/spec/"  # begins a pointer of Git LFS


def path(name: str | os.PathLike[str]) -> pathlib.Path:
    """Converts a name from the user to a path: expands ~, and supports gs://BUCKET/PATH and s3://BUCKET/PATH.

    Raises:
      UserError: the package of an object store is not installed, or its address names no bucket.
    """
    return object_store.path(os.fspath(name)) if object_store.is_object(name) else pathlib.Path(name).expanduser()


def local_path(name: str, flag: str) -> pathlib.Path:
    """Like `path`, for commands that write to disks only. Raises UserError for the address of an object store."""
    if object_store.is_object(name):
        raise UserError(f"{flag}={name}: this command writes to disks only; give a directory")
    return path(name)


def absolute(path: pathlib.Path) -> pathlib.Path:
    """The absolute path; an address of an object store is returned unchanged."""
    return path if object_store.is_object(path) else path.absolute()


@contextlib.contextmanager
def new_file(path: pathlib.Path, *, source: str = "", durable: bool = False) -> Iterator[BinaryIO]:
    """Context with a binary file to write to, which replaces `path` when the block ends without an error.

    Args:
      path: the final name; its parent directory is created if it is missing.
      source: how errors name the file, such as "--output=PATH:"; by default its path.
      durable: flush the file and its directory entry to the disk before returning.

    Raises:
      UserError: the file cannot be written.
    """
    if object_store.is_object(path):
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            object_store.write(path, file.read())
        return
    check_local(path)
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            yield file
        rename(partial, path, durable=durable)
    except OSError as error:
        raise UserError(f"{source or f'{path}:'} cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):  # the file was renamed, or never created
            partial.unlink()


@contextlib.contextmanager
def new_directory(
    path: pathlib.Path, *, source: str = "", exist_ok: bool = False, durable: bool = False
) -> Iterator[pathlib.Path]:
    """Context with a temporary directory, which is renamed to `path` when the block ends without an error.

    Args:
      path: the final name; its parent directory is created if it is missing.
      source: how errors name the directory, such as "--output=PATH"; by default its path.
      exist_ok: keep an existing `path` instead of raising, for directories that several processes may create.
      durable: flush every file to the disk before the rename, and the directory entry after it.

    Raises:
      UserError: the directory cannot be written.
    """
    if object_store.is_object(path):
        with tempfile.TemporaryDirectory() as temporary:
            yield pathlib.Path(temporary)
            object_store.upload(pathlib.Path(temporary), path)
        return
    check_local(path)
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        try:
            rename(partial, path, durable=durable)
        except OSError:
            if not (exist_ok and path.exists()):
                raise
    except OSError as error:
        raise UserError(f"{source or path} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rename(partial: pathlib.Path, path: pathlib.Path, *, durable: bool = False) -> None:
    """Renames a complete file or directory to its final name; a file replaces an existing one.

    Args:
      durable: flush the content to the disk before the rename, and the directory entry after it, so that a power
        failure leaves either nothing or the complete content under `path`.

    Raises:
      OSError: from the file system.
    """
    if durable:
        for inner in sorted(partial.rglob("*")) if partial.is_dir() else []:
            flush(inner)
        flush(partial)
    os.replace(partial, path)
    if durable:
        flush(path.parent)


def flush(path: pathlib.Path) -> None:
    """Flushes the content of a file, or the entries of a directory, to the disk (fsync). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: pathlib.Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replaces a file by `content`; text is encoded as UTF-8. Raises UserError if the file cannot be written."""
    with new_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: pathlib.Path, value: Any, *, durable: bool = False) -> None:
    """Replaces a file by `value` as JSON. Raises UserError if the file cannot be written."""
    write(path, dump_json(value), durable=durable)


def dump_json(value: Any) -> str:
    """Returns the text that `write_json` writes."""
    return json.dumps(value, indent=1) + "\n"


def read(path: pathlib.Path) -> bytes:
    """The content of a file. Raises OSError, or UserError for an object that exists but cannot be read."""
    return object_store.read(path) if object_store.is_object(path) else path.read_bytes()


def modification_time(path: pathlib.Path) -> float:
    """The modification time of a file, in seconds since 1970. Raises OSError."""
    return object_store.modification_time(path) if object_store.is_object(path) else path.stat().st_mtime


def list_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name relative to `directory`: path} of the files in a directory and those below it, sorted."""
    if object_store.is_object(directory):
        return {name: directory / name for name in sorted(object_store.find(directory))}
    return {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if p.is_file()}


def open_to_append(path: pathlib.Path, lock: Any = None) -> TextIO:
    """Opens a text file for appending. An object is uploaded as a whole, every few seconds and by `sync`.

    Args:
      lock: the `lock` of the directory; after another process has taken over the lock, the object is not written.
    """
    if object_store.is_object(path):
        return object_store.Appender(path, functools.partial(check_lock, lock))  # type: ignore[return-value]
    return path.open("a")


def sync(file: TextIO) -> None:
    """Flushes the appended text to the disk or the object store. Raises OSError or UserError."""
    if isinstance(file, object_store.Appender):
        file.sync()
    else:
        os.fsync(file.fileno())


@contextlib.contextmanager
def local_copy(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Context with a local path: `path` itself, or a temporary copy of a file or directory in an object store."""
    if not object_store.is_object(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = pathlib.Path(temporary) / path.name
        if path.is_dir():
            object_store.download(path, copy)
        else:
            copy.write_bytes(object_store.read(path))
        yield copy


def read_json(path: pathlib.Path) -> Any:
    """The value of a JSON file. Raises UserError if it cannot be read or is not JSON."""
    try:
        return json.loads(read(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or 'no such object'})") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from error


def check_not_lfs_pointer(path: pathlib.Path) -> None:
    """Raises UserError if a file is a pointer of Git LFS, because the large file itself was not downloaded."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{path}: a pointer of Git LFS, not the file itself; run `git lfs pull` there, or download the file"
            )


def cache_directory() -> pathlib.Path:
    """The directory for data that can be downloaded or computed again: $LLM_JAX_CACHE, or ~/.cache/llm_jax."""
    return pathlib.Path(os.environ.get("LLM_JAX_CACHE", "~/.cache/llm_jax")).expanduser()


def check_local(path: str | os.PathLike[str]) -> None:
    """Raises UserError for a URL such as https://host/run, which would create a local directory of that name."""
    if not object_store.is_object(path) and re.match(r"[a-zA-Z][\w+.-]+:/", str(path)):
        raise UserError(f"{path}: URLs are not supported; give a directory, such as one of a mounted bucket")


def check_reachable(path: pathlib.Path) -> None:
    """Raises UserError as `check_local`, and if the bucket of an object store cannot be listed."""
    check_local(path)
    if object_store.is_object(path):
        object_store.check(path)


def check_writable(directory: pathlib.Path) -> None:
    """Raises UserError if a local directory cannot be created or written to, without creating it.

    Call it before long work whose results are written to the directory. It creates and removes a temporary directory,
    because some file systems, such as /proc, reject writes that their permissions allow.
    """
    if object_store.is_object(directory):
        return
    existing = next(path for path in (directory, *directory.parents) if os.path.exists(path))  # noqa: PTH110
    if not existing.is_dir():
        raise UserError(f"{directory}: cannot be written to ({existing} is not a directory)")
    try:
        pathlib.Path(tempfile.mkdtemp(prefix=".writable-", dir=existing)).rmdir()
    except OSError as error:
        raise UserError(f"{directory}: cannot be written to ({existing}: {error.strerror})") from error


def make_directory(directory: pathlib.Path) -> None:
    """Creates a directory with its parents. Raises UserError if that fails or the directory is not writable."""
    check_local(directory)
    if object_store.is_object(
        directory
    ):  # object stores have no empty directories; only check that objects can be written
        probe = directory / f".writable-{secrets.token_hex(8)}"
        object_store.write(probe, b"")
        object_store.remove(probe)
        return
    try:
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        for path in missing:  # otherwise a power failure could remove the directory and with it flushed files
            flush(path.parent)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may check the directory at the same time
    except OSError as error:
        raise UserError(f"{directory}: cannot be written to ({error.strerror})") from error


LOCKED = "another trainer is at work here"  # part of the error message of `lock`; `research.jobs` searches for it


def lock(workdir: pathlib.Path, name: str = ".lock", *, wait: bool = False) -> Any:
    """Locks a run directory for this process until the returned file is closed or the process ends.

    Args:
      name: the lock file; locks with different names are independent.
      wait: wait until no other process holds the lock.

    Raises:
      UserError: another process holds the lock, without `wait`.
    """
    if object_store.is_object(workdir):
        return object_store.Lock(workdir, name, LOCKED)
    file = (workdir / name).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        with file:
            file.seek(0)
            holder = file.read().strip()
        raise UserError(f"{workdir}: {LOCKED} ({holder}); end it first") from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def check_lock(lock: Any) -> None:
    """Raises UserError if another process has taken over the lock. Only locks in object stores can be lost."""
    if isinstance(lock, object_store.Lock):
        lock.check()
