"""Names of checkpoints: paths, zip files, asset:NAME, hf:ORG/NAME, gs://BUCKET/PATH and s3://BUCKET/PATH."""

import os
import pathlib

from llm_jax import object_store
from llm_jax.checkpoints import buckets, zip_files
from llm_jax.data import assets
from llm_jax.errors import UserError

_PREFIXES = ("asset:", "hf:", *object_store.PREFIXES)
# The files that are downloaded from the hub: weights, configs, and every file of a tokenizer.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt"]
_OTHER_PATTERNS = ["consolidated*", "original/*", "onnx/*"]  # the same weights in the layouts of other programs


def is_remote(name: str) -> bool:
    """Whether a name is asset:NAME, hf:ORG/NAME, gs://BUCKET/PATH or s3://BUCKET/PATH rather than a path."""
    return name.startswith(_PREFIXES)


def recorded_name(name: str | os.PathLike[str], path: pathlib.Path) -> str:
    """The name of a checkpoint in records: its remote name, its zip file, or the absolute path of its directory.

    Args:
      path: the directory or file that `resolve` returned for `name`.
    """
    name = str(name)
    if is_remote(name):
        return name
    return str((pathlib.Path(name).expanduser() if _is_zip(name) else path).absolute())


def resolve(name: str | os.PathLike[str]) -> pathlib.Path:
    """The local file or directory of a name. Assets, models of the hub and objects of a store are downloaded.

    Args:
      name: a path; the path of a zip file, which is unpacked into the cache; "asset:NAME" (`llm_jax.assets`);
        "hf:ORG/NAME" (needs the package huggingface_hub); "gs://BUCKET/PATH" (needs the package gcsfs); or
        "s3://BUCKET/PATH" (needs the package s3fs).

    Raises:
      UserError: an unknown name, a failed download, an unsafe or damaged zip file, or a .gguf or .zip file that does
        not exist. Other paths are returned whether they exist or not.
    """
    name = str(name)
    if name.startswith("asset:"):
        return assets.path(name.removeprefix("asset:"))
    if name.startswith("hf:"):
        return _download(name.removeprefix("hf:"))
    if is_remote(name):
        path = buckets.fetch(name)
        return zip_files.unpack(path) if _is_zip(name) else path
    try:
        path = pathlib.Path(name).expanduser()
        if not path.exists() and (path.suffix == ".gguf" or _is_zip(name)):
            raise OSError(f"expected a {path.suffix[1:].upper()} file")
    except (RuntimeError, OSError, ValueError) as error:
        shown = name if len(name) <= 300 else f"{name[:80]}..."
        raise UserError(f"{shown}: no such file or directory ({error})") from error
    return zip_files.unpack(path) if _is_zip(name) and path.is_file() else path


def _is_zip(name: str) -> bool:
    return name.lower().endswith(".zip")


def _download(name: str) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"hf:{name} needs the package huggingface_hub; pip install huggingface_hub") from error
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=_PATTERNS, ignore_patterns=_OTHER_PATTERNS)
        )
    except Exception as error:  # many types: no network, no such name, no access
        raise UserError(f"hf:{name} cannot be downloaded ({str(error).splitlines()[0]})") from error
