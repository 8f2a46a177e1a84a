"""A token cache in an object store (data.cache_dir=gs://... or s3://...), which many machines share.

Arrays are memory-mapped files, so each machine has a local copy. Missing files are downloaded from the store; newly
built files are uploaded. A directory in the store is complete if its manifest.json and all files that it lists exist; a
lifecycle rule of the bucket may have deleted old objects.
"""

import hashlib
import json
import pathlib

from llm_jax import files, object_store


def directory(cache_dir: str) -> pathlib.Path:
    """The directory of this machine for `data.cache_dir`: that directory, or the copy of one in an object store."""
    if not object_store.is_object(cache_dir):
        return pathlib.Path(cache_dir or "~/.cache/llm_jax").expanduser()
    return files.cache_directory() / "shared" / hashlib.sha256(cache_dir.rstrip("/").encode()).hexdigest()[:32]


def fetch(cache_dir: str, path: pathlib.Path) -> None:
    """Copies a file or directory from the store if it is there and not here. Does nothing for a cache on a disk.

    Args:
      path: below `directory(cache_dir)`.

    Raises:
      UserError: the store cannot be read, or this machine's copy not be written.
    """
    if not object_store.is_object(cache_dir) or path.exists():
        return
    origin = _origin(cache_dir, path)
    content = object_store.find(origin)
    if "." in content:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.new_file(path) as file:
            object_store.copy_to(origin, file)
    elif object_store.LAST in content and content.keys() >= set(
        json.loads(object_store.read(origin / object_store.LAST))
    ):
        with files.new_directory(path, exist_ok=True) as partial:
            object_store.download(origin, partial)
            (partial / object_store.LAST).unlink()


def publish(cache_dir: str, path: pathlib.Path) -> None:
    """Uploads a file or directory of this machine. Does nothing for a cache on a disk.

    Args:
      path: below `directory(cache_dir)`; a directory replaces an incomplete one.

    Raises:
      UserError: the store cannot be written.
    """
    if not object_store.is_object(cache_dir):
        return
    origin = _origin(cache_dir, path)
    if path.is_file():
        object_store.put(path, origin)
        return
    object_store.upload(path, origin)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    object_store.write(origin / object_store.LAST, json.dumps(names).encode())


def _origin(cache_dir: str, path: pathlib.Path) -> pathlib.Path:
    return files.path(cache_dir) / path.relative_to(directory(cache_dir)).as_posix()
