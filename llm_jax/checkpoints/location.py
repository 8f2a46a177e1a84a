"""Names of checkpoints: paths, asset:NAME and hf:ORG/NAME."""

import os
import pathlib

from llm_jax.data import assets
from llm_jax.errors import UserError

_PREFIXES = ("asset:", "hf:")
# The files that are downloaded from the hub: weights, configs, and every file of a tokenizer.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt"]
_OTHER_PATTERNS = ["consolidated*", "original/*", "onnx/*"]  # the same weights in the layouts of other programs


def is_remote(name: str) -> bool:
    """Whether a name is asset:NAME or hf:ORG/NAME rather than a path."""
    return name.startswith(_PREFIXES)


def resolve(name: str | os.PathLike[str]) -> pathlib.Path:
    """The file or directory that a name stands for; assets and models of the hub are downloaded.

    Args:
      name: a path, "asset:NAME" (`llm_jax.assets`) or "hf:ORG/NAME" (needs the package huggingface_hub).

    Raises:
      UserError: an unknown name, a failed download, or a .gguf file that does not exist. Other paths are
        returned whether they exist or not.
    """
    name = str(name)
    if name.startswith("asset:"):
        return assets.path(name.removeprefix("asset:"))
    if name.startswith("hf:"):
        return _download(name.removeprefix("hf:"))
    try:
        path = pathlib.Path(name).expanduser()
        if not path.exists() and path.suffix == ".gguf":
            raise OSError("expected a GGUF file")
    except (RuntimeError, OSError, ValueError) as error:
        shown = name if len(name) <= 300 else f"{name[:80]}..."
        raise UserError(f"{shown}: no such file or directory ({error})") from error
    return path


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
