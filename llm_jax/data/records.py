"""Files of records: JSON lines, JSON arrays, CSV, TSV, Parquet and data sets of `datasets`.

Every form has two functions, `scan` and `read`; see `readers.FileFormat`.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from llm_jax import object_store
from llm_jax.data.streams import BOM, decode, iterate, open_stream, seekable, utf8_size
from llm_jax.errors import UserError

_ROWS = 256  # rows of a table that are read at a time
_SNIFFED = 2**16  # bytes at the beginning of a .json file that decide its format
_MISSING = (
    "is not in it; it has {}. Name the field of the text with data.field (evaluate: --field); chats are "
    "data.kind=instructions (evaluate: --kind=instructions)"
)

# Yields (start, size) of each document in order: the position where it begins (a byte of the uncompressed file, or a
# row), and the bytes of its text in UTF-8. Returns the sha256 of the uncompressed content or, for a table, of the field
# that is read.
Scan = Generator[tuple[int, int], None, str]


# ---------------------------------------------------------------- JSON lines


def json_lines(path: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number of its line, record) of each object of a file of JSON lines.

    Lines end with \\n or \\r\\n only. A byte order mark and blank lines are allowed.

    Raises:
      UserError: the file cannot be read, or a line is not a JSON object; it is named.
    """
    start = 0
    with open_stream(str(path)) as stream:
        for number, line in enumerate(stream, 1):
            if text := _line_text(str(path), start, line):
                yield number, _record(f"{path}, line {number}", text)
            start += len(line)


def _line_text(path: str, start: int, line: bytes) -> str:
    """A line without surrounding white space and byte order mark; its JSON keeps every other character."""
    text = decode(path, line, start)
    return (text if start else text.removeprefix(BOM)).strip()


def _record(location: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{location}: expected a JSON object, found {type(record).__name__}")
    return record


def _scan_lines(path: str, field: str) -> Scan:
    digest, start = hashlib.sha256(), 0
    with open_stream(path) as stream:
        for number, line in enumerate(stream, 1):
            digest.update(line)
            if _line_text(path, start, line):
                yield start, utf8_size(f"{path}, line {number}", _of_line(path, number, start, line, field))
            start += len(line)
    return digest.hexdigest()


def _read_lines(path: str, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    with open_stream(path) as stream:
        for start in iterate(starts):
            stream.seek(start)
            yield _of_line(path, 0, start, stream.readline(), field)


def _of_line(path: str, number: int, start: int, line: bytes, field: str) -> str:
    location = f"{path}, line {number}" if number else f"{path}, byte {start}"
    text = _line_text(path, start, line)
    record = _record(location, text)
    return field_text(location, field, record) if field else text


def field_text(location: str, field: str, record: dict[str, Any]) -> str:
    """The text in a field of a record; "" for None. Raises UserError if there is no such field, or no text in it."""
    if field not in record:
        raise UserError(f"{location}: the field '{field}' {_MISSING.format(', '.join(record) or 'none')}")
    return _text(location, field, record[field])


def _text(location: str, field: str, value: Any) -> str:
    if not isinstance(value, str | None):
        raise UserError(f"{location}: the field '{field}' is {type(value).__name__}; expected text")
    return value or ""


def json_form(path: str) -> str:
    """The format of a .json file that holds records: "json" or "jsonl"; otherwise ""."""
    with open_stream(path) as stream:
        begin = stream.read(_SNIFFED).decode(errors="replace").removeprefix(BOM).lstrip()
        if re.match(r"\[\s*\{", begin):
            return "json"
        stream.seek(0)
        for line in stream:
            text = line.decode(errors="replace").removeprefix(BOM)
            if text.strip():
                try:
                    return "jsonl" if isinstance(json.loads(text), dict) else ""
                except (ValueError, RecursionError):
                    return ""
    return ""


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
    with open_stream(path) as stream:
        records = _delimited(form, path, stream, 0, digest.update)
        columns = form.columns or _columns(path, records)
        for number, start, values in records:
            location = f"{path}, line {number}"
            yield start, utf8_size(location, _of_values(location, columns, values, field))
    return digest.hexdigest()


def _read_delimited(form: _Delimited, path: str, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    with open_stream(path) as stream:
        columns = form.columns or _columns(path, _delimited(form, path, stream, 0))
        for start in iterate(starts):
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
            text = decode(path, line, end - len(line))
            yield text.removeprefix(BOM) if end == len(line) else text

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


def _of_values(location: str, columns: tuple[str, ...], values: list[str], field: str) -> str:
    if len(values) != len(columns):
        raise UserError(f"{location}: {len(values)} values; expected {len(columns)} ({', '.join(columns)})")
    record = dict(zip(columns, values, strict=True))
    if not field:
        return json.dumps(record, ensure_ascii=False)
    if field not in record:
        raise UserError(f"{location}: the column '{field}' {_MISSING.format(', '.join(columns))}")
    return record[field]


# ---------------------------------------------------------------- tables

# (path, field, rows or None for all) -> yields (first row, values of the field, or whole records) of blocks of rows.
_Table = Callable[[str, str, np.ndarray | None], Iterator[tuple[int, list[Any]]]]


def _json_array(path: str, field: str, rows: np.ndarray | None) -> Iterator[tuple[int, list[Any]]]:
    with open_stream(path) as stream:
        text = decode(path, stream.read()).removeprefix(BOM)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {row}: expected a JSON object, found {type(record).__name__}")
    yield 0, [field_text(f"{path}, row {row}", field, r) for row, r in enumerate(records)] if field else records


def _parquet(path: str, field: str, rows: np.ndarray | None) -> Iterator[tuple[int, list[Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs a package; pip install pyarrow") from error
    try:
        if seekable(path):
            file = parquet.ParquetFile(object_store.stream(path) if object_store.is_object(path) else path)
        else:
            with open_stream(path) as stream:
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
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def load_data_set(name: str) -> Any:
    """The data set of `datasets` with the name NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; the default split is "train".

    Raises:
      UserError: `datasets` is not installed, or cannot load the data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{name} needs a package; pip install datasets") from error
    path, *rest = re.split(r":(?![^\[]*\])", name)  # not at the colon of a slice, train[:10%]
    split = rest[-1] if rest else ""
    config = ":".join(rest[:-1])  # some data sets have several, such as wikitext
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)  # without a warning for every retry
    try:
        return datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # of the network, of builders, of files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cure = "; expected hf:NAME:CONFIG:SPLIT" if "config" in reason.lower() else ""
        raise UserError(f"data.source: hf:{name} cannot be loaded ({reason}){cure}") from error


def _hub(path: str, field: str, rows: np.ndarray | None) -> Iterator[tuple[int, list[Any]]]:
    dataset = load_data_set(path)
    _check_columns(f"hf:{path}", field, dataset.column_names)
    if field:
        dataset = dataset.select_columns([field])
    for first in range(0, len(dataset), _ROWS):
        if rows is None or _any_in(rows, first, first + _ROWS):
            table = dataset.with_format("arrow")[first : first + _ROWS]
            yield first, table.column(0).to_pylist() if field else table.to_pylist()


def _check_columns(path: str, field: str, names: list[str]) -> None:
    if field and field not in names:
        raise UserError(f"{path}: the column '{field}' {_MISSING.format(', '.join(names))}")


def _any_in(rows: np.ndarray, first: int, end: int) -> bool:
    return bool(np.searchsorted(rows, first) < np.searchsorted(rows, end))


def _scan_table(table: _Table, path: str, field: str) -> Scan:
    digest = hashlib.sha256()
    for first, values in table(path, field, None):
        for row, value in enumerate(values, first):
            text = _of_row(path, row, field, value)
            size = utf8_size(f"{path}, row {row}", text)
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


_DELIMITED = {
    "csv": _Delimited(","),
    "tsv": _Delimited("\t"),
    "ratings": _Delimited("\t", csv.QUOTE_NONE, ("id", "rating", "text")),  # of the assets
}
_TABLES = {"json": _json_array, "parquet": _parquet, "hf": _hub}
# name -> (scan, read)
FORMS: dict[str, tuple[Callable[..., Scan], Callable[..., Iterator[str]]]] = {
    "jsonl": (_scan_lines, _read_lines),
    **{
        n: (functools.partial(_scan_delimited, f), functools.partial(_read_delimited, f)) for n, f in _DELIMITED.items()
    },
    **{n: (functools.partial(_scan_table, t), functools.partial(_read_table, t)) for n, t in _TABLES.items()},
}
