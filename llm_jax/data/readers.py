"""Files as documents: text, JSON, JSON lines, CSV, TSV, Parquet and data sets of `datasets`, plain or compressed.

A format has two functions: `scan` validates the whole file and returns the positions of its documents; `read` returns
the texts of given documents. Both keep one document, line or batch of rows in memory, and the
whole array of a .json file. `data.format` selects a format of `FORMATS`, or a custom function (`custom_format`).
"""

import array
import dataclasses
import functools
import hashlib
import pathlib
import tokenize
from collections.abc import Callable, Iterator

import numpy as np

from llm_jax import extensions
from llm_jax.data import custom_format, records
from llm_jax.data.records import Scan
from llm_jax.data.streams import decode, iterate, open_stream, plain_name, seekable
from llm_jax.errors import UserError

_PIECE = 64 * 1024  # bytes; a single text file is split into documents of about this size


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """A way to divide a file into documents.

    Attributes:
      scan: (path, field) -> its documents (`Scan`); with the field "", a document is a whole record, as JSON. Raises
        UserError if the file cannot be read, naming the line, row or byte.
      read: (path, field, starts, sizes) -> the texts of these documents; starts are ascending.
      whole: whether the file is one document.
      seekable: whether `read` reads only the documents at the given positions.
    """

    scan: Callable[[str, str], Scan]
    read: Callable[[str, str, np.ndarray, np.ndarray], Iterator[str]]
    whole: bool = False
    seekable: bool = True


OPTION = "data.format"
AUTO = "auto"  # the value of data.format that selects the format of each file by its suffix


def get(name: str) -> FileFormat:
    """The format with a name of `FORMATS`, or that of a specification with the hash of its source.

    Raises:
      UserError: see `extensions.load`.
    """
    return FORMATS[name] if name in FORMATS else _custom(name)


@functools.lru_cache(64)
def _custom(specification: str) -> FileFormat:
    extension = extensions.load(OPTION, extensions.require_hash(OPTION, specification))
    extension.bind(extension.target)  # checks the options
    scan = functools.partial(custom_format.scan, extension)
    return FileFormat(scan, functools.partial(custom_format.read, extension), seekable=False)


def resolve(name: str) -> str:
    """Converts a value of `data.format` to a name for `get`; "" for "auto".

    Raises:
      UserError: no such format; see also `extensions.load`.
    """
    selected = extensions.select(OPTION, name, SELECTABLE)
    if not isinstance(selected, extensions.Extension):
        return "" if selected == AUTO else selected
    get(selected.specification)
    return selected.specification


def format_of(path: str, alone: bool) -> str:
    """The name of the format of a file, in `FORMATS`.

    Text is one document, or several pieces if the file is the only one of its source (`alone`). A .json file holds an
    array of records or JSON lines; in a directory it may also be text.

    Raises:
      UserError: a .json file that is alone and holds neither.
    """
    suffix = plain_name(pathlib.PurePosixPath(path)).suffix.lower()
    if suffix == ".json" and (form := records.json_form(path)):
        return form
    if suffix == ".json" and alone:
        raise UserError(f"{path}: expected an array of JSON objects, or one object a line")
    return _BY_SUFFIX.get(suffix, "pieces" if alone else "text")


# ---------------------------------------------------------------- text


def _scan_text(path: str, field: str) -> Scan:
    with open_stream(path) as stream:
        data = stream.read()
    decode(path, data)
    yield 0, len(data)
    return hashlib.sha256(data).hexdigest()


def _read_text(path: str, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    with open_stream(path) as stream:
        for start, size in zip(iterate(starts), iterate(sizes), strict=True):
            stream.seek(start)
            yield decode(path, stream.read(size), start)


def _scan_pieces(path: str, field: str) -> Scan:
    """Splits at line breaks into documents of about 64 KiB, or into about fifty if the file is smaller.

    Documents have at least 1 KiB, or 64 bytes in a file of up to 1 KiB, so that a part of the file can be held out.

    The documents of an uncompressed file are in the order of their starts as text ("0", "1024", "131072", "2048");
    those of a compressed file, which cannot be read from an arbitrary position, are in file order.
    """
    size = 0
    with open_stream(path) as stream:
        if seekable(path):
            size = stream.seek(0, 2)
        else:
            while block := stream.read(2**20):
                size += len(block)
    target = min(_PIECE, max(1024 if size > 1024 else 64, size // 50))
    digest, starts, sizes = hashlib.sha256(), array.array("q"), array.array("q")
    with open_stream(path) as stream:
        start, rest = 0, b""
        while start < size:
            block = rest + stream.read(target - len(rest))
            end = len(block) if start + len(block) >= size else block.rfind(b"\n") + 1 or _whole_characters(block)
            piece, rest = block[:end], block[end:]
            if not piece:
                raise UserError(f"{path}: changed while it was being read; start again")
            decode(path, piece, start)
            digest.update(piece)
            starts.append(start)
            sizes.append(end)
            start += end
    order = sorted(range(len(starts)), key=lambda i: str(starts[i])) if seekable(path) else range(len(starts))
    yield from ((starts[i], sizes[i]) for i in order)
    return digest.hexdigest()


def _whole_characters(block: bytes) -> int:
    end = len(block)
    while end > 1 and block[end - 1] & 0xC0 == 0x80:
        end -= 1
    return max(end - 1, 1)


def _scan_python(path: str, field: str) -> Scan:
    """One document, or none if the file has another encoding than it declares."""
    try:
        data = _source(path).encode()
    except (SyntaxError, UnicodeDecodeError):
        return ""
    yield 0, len(data)
    return hashlib.sha256(data).hexdigest()


def _read_python(path: str, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    yield from (_source(path) for _ in starts)


def _source(path: str) -> str:
    try:
        with tokenize.open(path) as file:  # uses the encoding that the file declares
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


FORMATS = {
    "text": FileFormat(_scan_text, _read_text, whole=True),
    "pieces": FileFormat(_scan_pieces, _read_text),
    "python": FileFormat(_scan_python, _read_python, whole=True),
} | {name: FileFormat(scan, read) for name, (scan, read) in records.FORMS.items()}
SELECTABLE = (AUTO, *(name for name in FORMATS if name not in ("hf", "ratings")))  # values of the option
_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}
