"""Files as documents: text, JSON lines, CSV, TSV, Parquet and the data sets of `datasets`, plain or compressed.

A format scans a file once, which checks all of it and says where its documents are, and then reads any
of them. Neither holds more than a document, a line or a batch of rows in memory.
"""

import array
import bz2
import contextlib
import csv
import dataclasses
import functools
import gzip
import hashlib
import importlib
import json
import logging
import lzma
import pathlib
import tokenize
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from llm_jax.errors import UserError

_PIECE = 64 * 1024  # bytes; a single text file is cut into documents of about this size
_ROWS = 256  # of a table, read at a time
_AT_ONCE = 2**12  # numbers made of an array at a time
_NOT_THERE = "is not in it; it has {}. Name the field of the text with data.field"


# (start, size) of each document that is found, in their order: the byte of the unpacked file, or the row, where it
# begins, and the bytes of its text in UTF-8. What it returns in the end is the sha256 of the file's content,
# unpacked; of a table, of the field that is read.
Scan = Generator[tuple[int, int], None, str]


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to cut a file into documents.

    Attributes:
      scan: (path, field) -> its documents (`Scan`). Raises UserError for what cannot be read, naming the place.
      read: (path, field, starts, sizes) -> the texts that are there.
      whole: the file is one document.
    """

    scan: Callable[[str, str], Scan]
    read: Callable[[str, str, np.ndarray, np.ndarray], Iterator[str]]
    whole: bool = False


def of(path: pathlib.Path, alone: bool) -> str:
    """The name of a file's format. Text is one document; where it is the whole source (`alone`) it is cut."""
    return _BY_SUFFIX.get(plain_name(path).suffix.lower(), "pieces" if alone else "text")


def plain_name(path: pathlib.PurePath) -> pathlib.PurePath:
    """The path without the suffix of a compression."""
    return path.with_suffix("") if path.suffix in _PACKED else path


def seekable(path: str) -> bool:
    """Whether a part of the file can be read without all that stands before it."""
    return pathlib.Path(path).suffix not in _PACKED


# ---------------------------------------------------------------- bytes


def _zstd(path: str, mode: str) -> Any:
    for name in ("compression.zstd", "backports.zstd"):  # Python 3.14 has it itself
        try:
            return importlib.import_module(name).open(path, mode)
        except ImportError:
            continue
    raise UserError(f"{path}: reading .zst needs a package; pip install backports.zstd")


_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The file as a stream of unpacked bytes, what goes wrong with it in one line."""
    try:
        with _PACKED.get(pathlib.Path(path).suffix, open)(path, "rb") as stream:
            yield stream
    except Exception as error:
        known = isinstance(error, OSError | EOFError | zlib.error | lzma.LZMAError)
        if not known and type(error).__name__ != "ZstdError":  # whose class is there only where it can be read
            raise
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        raise UserError(f"{path}: cut short or damaged ({error})") from error


def _decode(path: str, data: bytes, start: int = 0) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {start + error.start}; convert it or leave it out") from error


# ---------------------------------------------------------------- text


def _scan_text(path: str, field: str) -> Scan:
    with _opened(path) as stream:
        data = stream.read()
    _decode(path, data)
    yield 0, len(data)
    return hashlib.sha256(data).hexdigest()


def _read_text(path: str, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    with _opened(path) as stream:
        for start, size in zip(one_by_one(starts), one_by_one(sizes), strict=True):
            stream.seek(start)
            yield _decode(path, stream.read(size), start)


def _scan_pieces(path: str, field: str) -> Scan:
    """Cuts at line breaks, into documents of about 64 KiB and at least fifty of them.

    A plain file's documents stand in the order of their starts as text ("0", "1024", "131072", "2048"),
    one that can only be read from its beginning has them as they come.
    """
    size = 0
    with _opened(path) as stream:
        if seekable(path):
            size = stream.seek(0, 2)
        else:
            while block := stream.read(2**20):
                size += len(block)
    target = min(_PIECE, max(1024, size // 50))
    digest, starts, sizes = hashlib.sha256(), array.array("q"), array.array("q")
    with _opened(path) as stream:
        start, rest = 0, b""
        while start < size:
            block = rest + stream.read(target - len(rest))
            end = len(block) if start + len(block) >= size else block.rfind(b"\n") + 1 or _whole_characters(block)
            piece, rest = block[:end], block[end:]
            if not piece:
                raise UserError(f"{path}: changed while it was being read; start again")
            _decode(path, piece, start)
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
    """One document, or none where the encoding is another than the file declares."""
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
        with tokenize.open(path) as file:  # obeys the encoding that the file declares
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


# ---------------------------------------------------------------- JSON lines


def _scan_lines(path: str, field: str) -> Scan:
    digest, place = hashlib.sha256(), 0
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            digest.update(line)
            if line.strip():
                yield place, _utf8_size(f"{path}, line {number}", _of_line(path, number, place, line, field))
            place += len(line)
    return digest.hexdigest()


def _read_lines(path: str, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    with _opened(path) as stream:
        for start in one_by_one(starts):
            stream.seek(start)
            yield _of_line(path, 0, start, stream.readline(), field)


def _of_line(path: str, number: int, place: int, line: bytes, field: str) -> str:
    text = _decode(path, line, place)
    where = f"{path}, line {number}" if number else f"{path}, byte {place}"
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if not field:
        return text.strip()
    if field not in record:
        raise UserError(f"{where}: the field '{field}' {_NOT_THERE.format(', '.join(record) or 'none')}")
    return _text(where, field, record[field])


def _text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str | None):
        raise UserError(f"{where}: the field '{field}' is {type(value).__name__}; expected text")
    return value or ""


def _utf8_size(where: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: an unpaired surrogate at character {error.start}; UTF-8 cannot hold it") from error


# ---------------------------------------------------------------- CSV and TSV

csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 128 KiB


@dataclasses.dataclass(frozen=True)
class _Delimited:
    """The form of a delimited file.

    Attributes:
      delimiter: between the values of a record.
      quoting: of the csv module.
      columns: names of the columns; (): the first line of the file names them.
    """

    delimiter: str
    quoting: int = csv.QUOTE_MINIMAL
    columns: tuple[str, ...] = ()


def _scan_delimited(form: _Delimited, path: str, field: str) -> Scan:
    digest = hashlib.sha256()
    with _opened(path) as stream:
        records = _delimited(form, path, stream, 0, digest.update)
        columns = form.columns or _columns(path, records)
        for number, start, values in records:
            where = f"{path}, line {number}"
            yield start, _utf8_size(where, _of_values(where, columns, values, field))
    return digest.hexdigest()


def _read_delimited(form: _Delimited, path: str, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    with _opened(path) as stream:
        columns = form.columns or _columns(path, _delimited(form, path, stream, 0))
        for start in one_by_one(starts):
            stream.seek(start)
            values = next((values for _, _, values in _delimited(form, path, stream, start)), [])
            yield _of_values(f"{path}, byte {start}", columns, values, field)


def _delimited(
    form: _Delimited, path: str, stream: Any, end: int, digest: Callable[[bytes], None] = lambda line: None
) -> Iterator[tuple[int, int, list[str]]]:
    """(number of its last line, byte where it starts, values) of each record from byte `end` of the stream on."""

    def lines() -> Iterator[str]:
        nonlocal end
        while line := stream.readline():
            digest(line)
            end += len(line)
            text = _decode(path, line, end - len(line))
            yield text.removeprefix("\ufeff") if end == len(line) else text

    start = end
    reader = csv.reader(lines(), delimiter=form.delimiter, quoting=form.quoting, strict=True)  # type: ignore[arg-type]
    try:
        for values in reader:
            if values:  # not a blank line
                yield reader.line_num, start, values
            start = end
    except csv.Error as error:
        raise UserError(f"{path}, record at byte {start}: not {_NAMES[form.delimiter]} ({error})") from error


_NAMES = {",": "CSV", "\t": "TSV"}


def _columns(path: str, records: Iterator[tuple[int, int, list[str]]]) -> tuple[str, ...]:
    columns = next((tuple(values) for _, _, values in records), ())
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: two columns of the first line have the same name; expected a header line")
    return columns


def _of_values(where: str, columns: tuple[str, ...], values: list[str], field: str) -> str:
    if len(values) != len(columns):
        raise UserError(f"{where}: {len(values)} values; expected {len(columns)} ({', '.join(columns)})")
    record = dict(zip(columns, values, strict=True))
    if not field:
        return json.dumps(record, ensure_ascii=False)
    if field not in record:
        raise UserError(f"{where}: the column '{field}' {_NOT_THERE.format(', '.join(columns))}")
    return record[field]


# ---------------------------------------------------------------- tables

# (path, field, rows or None for all) -> (first row, values of the field, or whole records) of runs of rows.
_Table = Callable[[str, str, np.ndarray | None], Iterator[tuple[int, list[Any]]]]


def _parquet(path: str, field: str, rows: np.ndarray | None) -> Iterator[tuple[int, list[Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs a package; pip install pyarrow") from error
    try:
        if seekable(path):
            file = parquet.ParquetFile(path)
        else:
            with _opened(path) as stream:
                file = parquet.ParquetFile(pyarrow.BufferReader(stream.read()))
        with file:
            _check_columns(path, field, file.schema_arrow.names)
            first = 0
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                if rows is None or _any_in(rows, first, end):
                    for batch in file.iter_batches(_ROWS, [group], [field] if field else None):
                        yield first, batch.column(0).to_pylist() if field else batch.to_pylist()
                        first += batch.num_rows
                first = end
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: no readable Parquet file ({str(error).splitlines()[0]})") from error


def data_set(name: str) -> Any:
    """The data set of `datasets` called NAME or NAME:SPLIT (by default, train).

    Raises:
      UserError: `datasets` is not installed, or has no such data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{name} needs a package; pip install datasets") from error
    path, _, split = name.partition(":")
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)  # retries; what comes of them is said below
    try:
        return datasets.load_dataset(path, split=split or "train")
    except Exception as error:  # of many kinds: network, builders, files
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data.source: hf:{name} cannot be loaded ({said})") from error


def _hub(path: str, field: str, rows: np.ndarray | None) -> Iterator[tuple[int, list[Any]]]:
    found = data_set(path)
    _check_columns(f"hf:{path}", field, found.column_names)
    if field:
        found = found.select_columns([field])
    for first in range(0, len(found), _ROWS):
        if rows is None or _any_in(rows, first, first + _ROWS):
            table = found.with_format("arrow")[first : first + _ROWS]
            yield first, table.column(0).to_pylist() if field else table.to_pylist()


def _check_columns(path: str, field: str, names: list[str]) -> None:
    if field and field not in names:
        raise UserError(f"{path}: the column '{field}' {_NOT_THERE.format(', '.join(names))}")


def _any_in(rows: np.ndarray, first: int, end: int) -> bool:
    return bool(np.searchsorted(rows, first) < np.searchsorted(rows, end))


def _scan_table(table: _Table, path: str, field: str) -> Scan:
    digest = hashlib.sha256()
    for first, values in table(path, field, None):
        for row, value in enumerate(values, first):
            text = _of_row(path, row, field, value)
            size = _utf8_size(f"{path}, row {row}", text)
            digest.update(b"%d\0" % size + text.encode())
            yield row, size
    return digest.hexdigest()


def _read_table(table: _Table, path: str, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    for first, values in table(path, field, starts):
        begin, end = np.searchsorted(starts, (first, first + len(values)))
        for row in starts[begin:end].tolist():
            yield _of_row(path, row, field, values[row - first])


def _of_row(path: str, row: int, field: str, value: Any) -> str:
    return _text(f"{path}, row {row}", field, value) if field else json.dumps(value, ensure_ascii=False, default=str)


def one_by_one(values: np.ndarray) -> Iterator[int]:
    """The values of a long (mapped) array, of which few are numbers of Python at a time."""
    for begin in range(0, len(values), _AT_ONCE):
        yield from values[begin : begin + _AT_ONCE].tolist()


_DELIMITED = {
    "csv": _Delimited(","),
    "tsv": _Delimited("\t"),
    "ratings": _Delimited("\t", csv.QUOTE_NONE, ("id", "rating", "text")),  # of the assets
}
FORMATS = {
    "text": Format(_scan_text, _read_text, whole=True),
    "pieces": Format(_scan_pieces, _read_text),
    "python": Format(_scan_python, _read_python, whole=True),
    "jsonl": Format(_scan_lines, _read_lines),
    "parquet": Format(functools.partial(_scan_table, _parquet), functools.partial(_read_table, _parquet)),
    "hf": Format(functools.partial(_scan_table, _hub), functools.partial(_read_table, _hub)),
} | {
    name: Format(functools.partial(_scan_delimited, form), functools.partial(_read_delimited, form))
    for name, form in _DELIMITED.items()
}
_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}
