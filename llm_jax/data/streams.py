"""Files as streams of uncompressed bytes, and their bytes as text."""

import bz2
import contextlib
import gzip
import importlib
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llm_jax import object_store
from llm_jax.errors import UserError

BOM = "\ufeff"
_CONVERTED = 2**12  # entries of an array that are converted to Python numbers at a time


def plain_name(path: pathlib.PurePath) -> pathlib.PurePath:
    """The path without the suffix of a compression format."""
    return path.with_suffix("") if path.suffix in PACKED else path


def seekable(path: str) -> bool:
    """Whether a part of the file can be read without reading everything before it."""
    return pathlib.Path(path).suffix not in PACKED


def _zstd(path: str, mode: str) -> Any:
    for name in ("compression.zstd", "backports.zstd"):  # the first is in the standard library of Python 3.14
        try:
            return importlib.import_module(name).open(path, mode)
        except ImportError:
            continue
    raise UserError(f"{path}: reading .zst needs a package; pip install backports.zstd")


PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[Any]:
    """The file, or the object of an object store, as a stream of uncompressed bytes.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with contextlib.ExitStack() as stack:
            file: Any = path
            if object_store.is_object(path):
                stack.enter_context(object_store.user_errors(path, "cannot be read"))
                file = stack.enter_context(object_store.stream(path))
            if packed := PACKED.get(pathlib.Path(path).suffix):
                file = stack.enter_context(packed(file, "rb"))
            elif file is path:
                file = stack.enter_context(open(path, "rb"))
            yield file
    except Exception as error:
        known = isinstance(error, OSError | EOFError | zlib.error | lzma.LZMAError)
        if not known and type(error).__name__ != "ZstdError":  # a class that exists only where the package does
            raise
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        raise UserError(f"{path}: truncated or damaged ({error})") from error


def decode(path: str, data: bytes, start: int = 0) -> str:
    """Decodes UTF-8 that begins at byte `start` of a file. Raises UserError with the position of invalid bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        cure = "convert it or leave it out (a glob such as 'texts/**/*.txt' chooses files)"
        raise UserError(f"{path}: not UTF-8 text at byte {start + error.start}; {cure}") from error


def utf8_size(location: str, text: str) -> int:
    """The number of bytes of a text in UTF-8. Raises UserError, with its location, for an unpaired surrogate."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise UserError(
            f"{location}: an unpaired surrogate at character {error.start}; UTF-8 cannot hold it"
        ) from error


def iterate(values: np.ndarray) -> Iterator[int]:
    """Yields the values of a long (mapped) array (n,) as Python numbers, converted in blocks."""
    for begin in range(0, len(values), _CONVERTED):
        yield from values[begin : begin + _CONVERTED].tolist()
