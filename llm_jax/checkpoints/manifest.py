"""Finds the checkpoints of a run, hashes their files, and verifies the hashes. `run.py` describes the directory."""

import contextlib
import hashlib
import os
import pathlib
from typing import Any

from llm_jax import files, object_store
from llm_jax.checkpoints import storage
from llm_jax.errors import UserError

FORMAT = 1  # version of the checkpoint format that is written, and the only one that is read

_SHOWN_RUNS = 3  # how many runs of a directory an error names
_FORMS = "a run or one of its checkpoints, a Hugging Face or peft directory (with config.json or adapter_config.json)"


def steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the finished checkpoints of a run, in ascending order."""
    return storage.steps(workdir / "checkpoints")


def find(path: str | os.PathLike[str]) -> pathlib.Path:
    """The directory of one checkpoint.

    Args:
      path: a checkpoint, or a run, of which the last checkpoint is returned.

    Raises:
      UserError: the path is not a checkpoint or a run with one.
    """
    directory = files.path(path)
    if (directory / "record.json").is_file():
        return directory
    if not directory.is_dir():
        likely = len(directory.parts) == 1 or (len(directory.parts) == 2 and not directory.parent.exists())
        model = str(path) if likely else ""
        if directory.parts[:2] == ("https:", "huggingface.co"):
            model = "/".join(directory.parts[2:4])
        hub = f"; a model of the Hugging Face hub is hf:{model}" if model else ""
        raise UserError(f"{path}: no such directory; expected {_FORMS}{hub}")
    finished = steps(directory)
    if not finished:
        raise UserError(f"{path}: {_without_checkpoint(directory)}")
    return directory / "checkpoints" / str(finished[-1])


def _without_checkpoint(directory: pathlib.Path) -> str:
    """Explains that a directory has no finished checkpoint, and names the runs in it or the run that it belongs to."""
    if not object_store.is_object(directory):
        for above in files.absolute(directory).parents[:3]:
            if (above / "record.json").is_file():
                return f"a part of a checkpoint; give the checkpoint, {above}"
        if finished := [run for p in directory.glob("*/checkpoints") if steps(run := p.parent)]:
            finished.sort(key=lambda run: run.stat().st_mtime, reverse=True)
            names = ", ".join(map(str, finished[:_SHOWN_RUNS]))
            others = f" or one of {len(finished) - _SHOWN_RUNS:,} others" if len(finished) > _SHOWN_RUNS else ""
            return f"a directory of runs; give one of them: {names}{others}"
        run = directory.parent if directory.name == "checkpoints" else directory
        if (run / "config.json").is_file() and (run / "checkpoints").is_dir():
            return f"the run {run} has no finished checkpoint; the command that started it resumes it"
    return f"no finished checkpoint here; expected {_FORMS}"


def write_manifest(directory: pathlib.Path) -> None:
    """Writes manifest.json, the sha256 of every other file. It is the last file of a checkpoint to be written."""
    hashes = {name: _sha256(path) for name, path in _files(directory).items()}
    files.write_json(directory / "manifest.json", hashes)


def verify(directory: pathlib.Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, and returns its record (record.json).

    Raises:
      UserError: a file is missing, added or changed, or the checkpoint has another format version.
    """
    manifest, record = (_read_json(directory / name) for name in ("manifest.json", "record.json"))
    if not isinstance(manifest, dict) or files.read(directory / "manifest.json") != files.dump_json(manifest).encode():
        raise UserError(f"{directory}: the file 'manifest.json' is damaged{_fallback(directory)}")
    if not isinstance(record, dict):
        raise UserError(f"{directory}: the file 'record.json' is damaged{_fallback(directory)}")
    if record.get("format") != FORMAT:
        raise UserError(f"{directory}: checkpoint format {record.get('format')}; this version reads format {FORMAT}")
    present = _files(directory)
    for name in sorted(set(manifest) | set(present)):
        if name not in present:
            raise UserError(f"{directory}: the file '{name}' is missing{_fallback(directory)}")
        if name not in manifest and name.rsplit("/", 1)[-1].startswith("."):
            continue  # files that file managers create
        if name not in manifest:
            raise UserError(f"{directory}: the file '{name}' does not belong to this checkpoint; remove it")
        if _sha256(present[name]) != manifest[name]:
            raise UserError(f"{directory}: the file '{name}' is damaged (sha256 differs){_fallback(directory)}")
    # The name of this key was `jumped` in older records.
    return record | {"skipped_batches": record.get("skipped_batches", record.get("jumped", 0))}


def _read_json(path: pathlib.Path) -> Any:
    try:
        return files.read_json(path)
    except object_store.StoreError:
        raise
    except UserError as error:
        raise UserError(f"{error}{_fallback(path.parent)}") from error


def _fallback(directory: pathlib.Path) -> str:
    """A phrase that names another checkpoint of the run to resume from, or ""."""
    run = directory.parent.parent
    other_steps = [step for step in steps(run) if str(step) != directory.name] if directory.name.isdigit() else []
    return f"; delete this directory to resume from checkpoint {other_steps[-1]}" if other_steps else ""


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    return {name: path for name, path in files.list_files(directory).items() if name != "manifest.json"}


def _sha256(path: pathlib.Path) -> str:
    reading = (
        object_store.user_errors(path, "cannot be read") if object_store.is_object(path) else contextlib.nullcontext()
    )
    with reading, path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
