"""Runs and checkpoints as directories: which are there, whether they are whole, JSON that is whole or as it was.

What stands in them is told in `checkpoint.py`.
"""

import fcntl
import hashlib
import json
import os
import pathlib
import socket
from typing import Any

from llm_jax.errors import UserError

FORMAT = 1  # of the checkpoints that are written, and the one that is read


def steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the finished checkpoints of a run, in order."""
    directory = workdir / "checkpoints"
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def find(path: str | os.PathLike[str]) -> pathlib.Path:
    """The directory of one checkpoint, from itself or its run (the last one).

    Raises:
      UserError: there is none.
    """
    given = pathlib.Path(path).expanduser()
    if (given / "record.json").is_file():
        return given
    if not given.is_dir():
        raise UserError(f"{path}: no such directory; expected a run or one of its checkpoints")
    if not (found := steps(given)):
        raise UserError(f"{path}: no finished checkpoint here; expected a run or one of its checkpoints")
    return given / "checkpoints" / str(found[-1])


def write_manifest(directory: pathlib.Path) -> None:
    """Writes manifest.json, the sha256 of every other file; the last thing written in a checkpoint."""
    write_json(directory / "manifest.json", {name: _sha256(path) for name, path in _files(directory).items()})


def verify(directory: pathlib.Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, and returns its record.

    Raises:
      UserError: a file is missing, added or changed, or the format is another version; it names the file.
    """
    manifest = read_json(directory / "manifest.json")
    if (directory / "manifest.json").read_text() != _dump(manifest):
        raise UserError(f"{directory}: the file 'manifest.json' is damaged{_others(directory)}")
    record = read_json(directory / "record.json")
    if not isinstance(record, dict) or not isinstance(manifest, dict):
        raise UserError(f"{directory}: record.json or manifest.json is damaged{_others(directory)}")
    if record.get("format") != FORMAT:
        raise UserError(f"{directory}: checkpoint format {record.get('format')}; this version reads format {FORMAT}")
    present = _files(directory)
    for name in sorted(set(manifest) | set(present)):
        if name not in present:
            raise UserError(f"{directory}: the file '{name}' is missing{_others(directory)}")
        if name not in manifest and name.rsplit("/", 1)[-1].startswith("."):
            continue  # what file managers leave behind
        if name not in manifest:
            raise UserError(f"{directory}: the file '{name}' does not belong to this checkpoint; remove it")
        if _sha256(present[name]) != manifest[name]:
            raise UserError(f"{directory}: the file '{name}' is damaged (sha256 differs){_others(directory)}")
    return record


def lock(workdir: pathlib.Path) -> Any:
    """Holds the directory for this process until it ends, however it ends. Keep what is returned.

    Raises:
      UserError: another process holds it.
    """
    file = (workdir / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise UserError(f"{workdir}: another trainer is at work here ({file.read().strip()}); end it first") from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def make_directory(directory: pathlib.Path) -> None:
    """Makes it with its parents; UserError where that cannot be done or it cannot be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{directory}: cannot be written to ({error.strerror})") from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that the file is whole or as it was."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(_dump(value))
    os.replace(partial, path)


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """What a JSON file says. Raises UserError where it cannot be read or is damaged."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}){_others(path.parent)}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}){_others(path.parent)}") from error


def _others(directory: pathlib.Path) -> str:
    """A phrase that names the checkpoint to fall back on."""
    run = directory.parent.parent
    others = [s for s in steps(run) if str(s) != directory.name] if directory.name.isdigit() else []
    return f"; delete this directory to go on from checkpoint {others[-1]}" if others else ""


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    found = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / "manifest.json")
    return {p.relative_to(directory).as_posix(): p for p in found}


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
