"""Copies checkpoints from Google Cloud Storage (gs://BUCKET/PATH) into the cache, through fsspec and gcsfs."""

import hashlib
import pathlib
import posixpath
from typing import Any

from llm_jax import bars, files
from llm_jax.errors import UserError

PREFIXES = ("gs://",)


def fetch(url: str) -> pathlib.Path:
    """The copy in the cache of a file or directory of a bucket. It is made again when an object has changed.

    Of a run, only its config.json and its last finished checkpoint are copied.

    Args:
      url: gs://BUCKET/PATH of a run, a checkpoint, a Hugging Face directory, a .gguf file or a zip file.

    Raises:
      UserError: gcsfs is not installed, nothing is there, or it cannot be read.
    """
    try:
        import fsspec

        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs the package gcsfs; pip install gcsfs") from error
    try:
        listing = {name: info for name, info in system.find(root, detail=True).items() if info["type"] == "file"}
    except Exception as error:  # many types: no network, no such bucket, no access
        raise UserError(f"{url} cannot be read ({_reason(error)})") from error
    objects = _of_last_checkpoint({posixpath.relpath(name, root): (name, info) for name, info in listing.items()})
    if not objects:
        raise UserError(f"{url}: nothing there; expected a run, a checkpoint, a model directory or a .gguf file")
    state = sorted((relative, *map(str, _version(info))) for relative, (_, info) in objects.items())
    digest = hashlib.sha256(repr((url, state)).encode()).hexdigest()
    target = files.cache_directory() / "buckets" / digest[:32] / posixpath.basename(root.rstrip("/"))
    if target.exists():
        return target
    single = "." in objects  # the object itself, not what is below its name
    with files.new_directory(target.parent, exist_ok=True) as partial:
        for relative, (name, info) in bars.bar(objects.items(), desc=f"copying {url}", unit="file", leave=False):
            local = partial / target.name if single else partial / target.name / relative
            _check_inside(url, relative)
            local.parent.mkdir(parents=True, exist_ok=True)
            try:
                system.get_file(name, str(local))
            except Exception as error:
                raise UserError(f"{url}: {relative} cannot be read ({_reason(error)})") from error
            if local.stat().st_size != info["size"]:
                raise UserError(f"{url}: {relative} has changed while it was copied; try again")
    return target


def _of_last_checkpoint(objects: dict[str, Any]) -> dict[str, Any]:
    """Without the earlier checkpoints of a run, and those that are not finished (they have no manifest yet)."""
    parts = {relative: relative.split("/") for relative in objects}
    finished = [
        int(p[1])
        for p in parts.values()
        if len(p) == 3 and p[0] == "checkpoints" and p[1].isdecimal() and p[2] == "manifest.json"
    ]
    if not finished:
        return objects
    last = ["checkpoints", str(max(finished))]
    return {relative: objects[relative] for relative, p in parts.items() if p[:2] == last or p == ["config.json"]}


def _version(info: dict[str, Any]) -> tuple[Any, ...]:
    """What changes with the content of an object: its size, hash and time, where the file system has them."""
    return tuple(info.get(key, "") for key in ("size", "md5Hash", "etag", "generation", "updated", "mtime", "created"))


def _check_inside(url: str, relative: str) -> None:
    if relative.startswith("/") or ".." in relative.split("/"):
        raise UserError(f"{url}: the name '{relative}' leads out of the directory")


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
