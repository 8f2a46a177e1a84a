"""Copies checkpoints from object stores (gs://BUCKET/PATH, s3://BUCKET/PATH) into the cache."""

import hashlib
import pathlib
import posixpath
from typing import Any

from llm_jax import bars, files, object_store
from llm_jax.errors import UserError


def fetch(url: str) -> pathlib.Path:
    """Copies a file or directory of a bucket into the cache, unless the cache has a copy of the same version.

    From a run, only config.json and the last finished checkpoint are copied.

    Args:
      url: gs://BUCKET/PATH or s3://BUCKET/PATH of a run, a checkpoint, a Hugging Face directory, a .gguf file or a zip
        file.

    Raises:
      UserError: the package of the store is not installed, nothing is there, or it cannot be read.
    """
    path = files.path(url)
    files.check_reachable(path)
    selected = _of_last_checkpoint(object_store.find(path))
    if not selected:
        raise UserError(f"{url}: nothing there; expected a run, a checkpoint, a model directory or a .gguf file")
    state = sorted((relative, *map(str, _version(info))) for relative, info in selected.items())
    digest = hashlib.sha256(repr((url, state)).encode()).hexdigest()
    target = files.cache_directory() / "buckets" / digest[:32] / posixpath.basename(url.rstrip("/"))
    if target.exists():
        return target
    single = "." in selected  # the URL names one object, not a directory
    with files.new_directory(target.parent, exist_ok=True) as partial:
        for relative, info in bars.bar(selected.items(), desc=f"copying {url}", unit="file", leave=False):
            local = partial / target.name if single else partial / target.name / relative
            object_store.fetch(path if single else path / relative, local, partial)
            if local.stat().st_size != info["size"]:
                raise UserError(f"{url}: {relative} has changed while it was copied; try again")
    return target


def _of_last_checkpoint(infos: dict[str, Any]) -> dict[str, Any]:
    """Drops the earlier checkpoints of a run, and those that are not finished (they have no manifest yet)."""
    parts = {relative: relative.split("/") for relative in infos}
    finished = [
        int(p[1])
        for p in parts.values()
        if len(p) == 3 and p[0] == "checkpoints" and p[1].isdecimal() and p[2] == object_store.LAST
    ]
    if not finished:
        return infos
    last = ["checkpoints", str(max(finished))]
    return {relative: infos[relative] for relative, p in parts.items() if p[:2] == last or p == ["config.json"]}


def _version(info: dict[str, Any]) -> tuple[Any, ...]:
    """Properties that change with the content of an object: its size, hash and time, as far as the store has them."""
    keys = ("size", "md5Hash", "ETag", "generation", "updated", "mtime", "LastModified", "created")
    return tuple(info.get(key, "") for key in keys)
