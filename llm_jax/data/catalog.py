"""What is in a corpus: the place, size and group of every document, in files that are mapped and not read.

A scan goes through memory a block at a time and is kept on disk, so that what it takes does not grow with the number
of documents (it does with that of files).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import IO

import numpy as np
from numpy.typing import DTypeLike

from llm_jax.data import processes, sources
from llm_jax.data.readers import FORMATS, one_by_one
from llm_jax.data.sources import File
from llm_jax.errors import UserError
from llm_jax.files import PARTIAL, new_file

_FORMAT = 2  # of the remembered scans
_PAYS = 256 * 2**20  # bytes to scan for which a process is worth its start
_RACE = 2 * 10**9  # nanoseconds; a file that has just changed may change again under the same time
_BLOCK = 2**14  # documents in memory at a time

# A document: where it begins in its file (`formats.Scan`), the bytes of its text in UTF-8, and a hash of the name of
# its group.
RECORD = np.dtype([("start", np.int64), ("size", np.int64), ("group", np.uint64)])


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The documents of a corpus in their order: source by source, file by file.

    Attributes:
      names: of the sources.
      files: all of them.
      until: int64 (files,), the documents up to the end of each file.
      records: of each source, RECORD (documents,).
      ends: int (sources,), the documents up to the end of each source.
      field: what the text is called in records.
      sha256: of all names and texts.
    """

    names: tuple[str, ...]
    files: tuple[File, ...]
    until: np.ndarray
    records: tuple[np.ndarray, ...]
    ends: tuple[int, ...]
    field: str
    sha256: str

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, which: np.ndarray) -> np.ndarray:
        """RECORD of documents, int (n,) by index."""
        source = np.searchsorted(self.ends, which, side="right")
        found = np.empty(len(which), RECORD)
        for i, begin in enumerate((0, *self.ends[:-1])):
            inside = source == i
            found[inside] = self.records[i][which[inside] - begin]
        return found

    def file(self, which: np.ndarray) -> np.ndarray:
        """Whose documents these are, by index in `files`."""
        return np.searchsorted(self.until, which, side="right")

    def blocks(self) -> Iterator[np.ndarray]:
        """The indices of all documents, some at a time."""
        return (np.arange(s.start, s.stop) for s in slices(0, len(self)))

    def num_bytes(self) -> int:
        """Of all texts."""
        return sum(int(records["size"].sum()) for records in self.records)

    def name(self, document: int) -> str:
        which = np.array([document])
        return self.files[self.file(which)[0]].document(int(self[which]["start"][0]))

    def texts(self, which: np.ndarray) -> Iterator[str]:
        """The texts of documents, by ascending indices.

        Raises:
          UserError: a file that cannot be read, or has changed since it was scanned.
        """
        file = self.file(which)
        for part in np.split(which, np.flatnonzero(np.diff(file)) + 1) if len(which) else ():
            records = self[part]
            places = (np.ascontiguousarray(records[name]) for name in ("start", "size"))
            yield from texts(self.files[self.file(part[:1])[0]], self.field, *places)


def texts(file: File, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    """The texts of one file's documents, which must have the sizes that they had."""
    found = FORMATS[file.format].read(file.path, field, starts, sizes)
    for size, text in zip(one_by_one(sizes), found, strict=True):
        if len(text.encode()) != size:
            raise UserError(f"{file.path}: changed while it was being read; start again")
        yield text


def read(source: str, field: str, memory: pathlib.Path, workers: int) -> tuple[Catalog, list["Record"]]:
    """The catalog of `data.source`, and the scans of its sources that it was made from.

    Args:
      memory: where scans are remembered, by the sizes and times of files.

    Raises:
      UserError: a source that is not there, cannot be read, or has no text; no room to write the scan.
    """
    names = tuple(sources.weights(source))
    records = [Record.make(name, len(names) > 1, field, memory, workers) for name in names]
    digest = hashlib.sha256()
    for record in records:
        for file, found in zip(record.files, record.digests, strict=True):
            if found:
                digest.update(f"{file.name}\0{found}\0".encode())
    digest.update(field.encode())
    catalog = Catalog(
        names=names,
        files=tuple(f for r in records for f in r.files),
        until=np.cumsum([n for r in records for n in r.counts]),
        records=tuple(r.records for r in records),
        ends=tuple(itertools.accumulate(len(r.records) for r in records)),
        field=field,
        sha256=digest.hexdigest(),
    )
    return catalog, records


@dataclasses.dataclass(frozen=True)
class Record:
    """The scan of one source.

    Attributes:
      stamps: the sizes and times of its files.
      digests: sha256 of each file.
      counts: documents of each file.
      records: RECORD of all of them, mapped from disk.
      path: where it is remembered.
      is_new: not (all) from memory.
    """

    files: list[File]
    stamps: list[tuple[int | str, int]]
    digests: list[str]
    counts: list[int]
    records: np.ndarray
    path: pathlib.Path
    is_new: bool

    @classmethod
    def make(cls, name: str, prefix: bool, field: str, memory: pathlib.Path, workers: int) -> "Record":
        """From memory, as far as the files are as they were, and else by scanning them."""
        files = sources.files(name, prefix)
        stamps = [file.stamp() for file in files]
        key = json.dumps([name, str(pathlib.Path.cwd()), prefix, field, _FORMAT])
        path = memory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.scan"
        known, records = _remembered(path)
        wanted = [_key(file, stamp) for file, stamp in zip(files, stamps, strict=True)]
        found = {i: known[key] for i, key in enumerate(wanted) if key in known}
        is_new = list(known) != wanted
        if is_new:
            with _scratch(memory) as scratch:
                todo = [i for i in range(len(files)) if i not in found]
                jobs = [(files[i], field, scratch) for i in todo]
                costs = [s if isinstance(s, int) else n for s, n in (stamps[i] for i in todo)]
                said = dict(processes.each(_scan, jobs, costs, f"reading {name}", workers=workers, pays=_PAYS))
                maps = {part.name: mapped(part, RECORD) for part in scratch.iterdir()}
                found |= {todo[i]: (digest, maps[part][at]) for i, (digest, part, at) in said.items()}
                with tempfile.TemporaryFile(dir=memory) as joined:
                    for i in range(len(files)):
                        _append(joined, found[i][1])
                    joined.flush()
                    records = mapped(joined, RECORD)  # which keeps what has no name any more
        if not len(records):
            raise UserError(f"data.source={name}: there is no text in it")
        digests, parts = zip(*(found[i] for i in range(len(files))), strict=True)
        return cls(files, stamps, list(digests), [len(p) for p in parts], records, path, is_new)

    def write(self) -> None:
        """Remembers what is new, but for files that changed just now. Raises UserError where it cannot be written."""
        if not self.is_new:
            return
        now = time.time_ns()
        sure = [isinstance(s[0], str) or s[1] + _RACE < now for s in self.stamps]
        said = zip(self.files, self.stamps, self.digests, self.counts, strict=True)
        table = [[_key(file, stamp), digest, count] for file, stamp, digest, count in itertools.compress(said, sure)]
        header = json.dumps(table).encode()
        with new_file(self.path, source=f"data.cache_dir: {self.path.parent}") as opened:
            opened.write(header + b" " * (-len(header) - 1 & 7) + b"\n")  # records stand at multiples of 8
            for end, count, kept in zip(itertools.accumulate(self.counts), self.counts, sure, strict=True):
                _append(opened, self.records[end - count : end * kept])

    def changed(self) -> str:
        """The path of a file that is no longer what was scanned, or ""."""
        return next((f.path for f, s in zip(self.files, self.stamps, strict=True) if f.stamp() != s), "")


def mapped(file: pathlib.Path | IO[bytes], dtype: DTypeLike, offset: int = 0) -> np.ndarray:
    """A file from `offset` to its end as an array that is not read; an empty one, which cannot be mapped, too."""
    size = os.stat(file if isinstance(file, pathlib.Path) else file.fileno()).st_size
    return np.memmap(file, dtype, "r", offset).view(np.ndarray) if size > offset else np.zeros(0, dtype)


def slices(begin: int, end: int) -> Iterator[slice]:
    return (slice(i, min(i + _BLOCK, end)) for i in range(begin, end, _BLOCK))


def _append(file: IO[bytes], values: np.ndarray) -> None:
    for some in slices(0, len(values)):
        file.write(values[some].tobytes())


@contextlib.contextmanager
def _written(directory: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"data.cache_dir: {directory} cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def _scratch(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory in `directory`, and at the end none, nor those above it that are new and have nothing in them."""
    new = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    try:
        with _written(directory):
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=directory) as scratch:
                yield pathlib.Path(scratch)
    finally:
        with contextlib.suppress(OSError):
            for parent in new:
                parent.rmdir()


def _key(file: File, stamp: tuple[int | str, int]) -> str:
    return json.dumps([file.name, file.path, file.format, *stamp])


def _remembered(path: pathlib.Path) -> tuple[dict[str, tuple[str, np.ndarray]], np.ndarray]:
    """(sha256, RECORD) of each file, and RECORD of all."""
    try:
        with path.open("rb") as opened:
            table = json.loads(opened.readline())
            records = mapped(opened, RECORD, opened.tell())
    except (OSError, ValueError):
        return {}, np.zeros(0, RECORD)  # none, or one that was cut short
    found, begin = {}, 0
    for key, digest, count in table:
        found[key] = (digest, records[begin : begin + count])
        begin += count
    return (found, records) if begin == len(records) else ({}, np.zeros(0, RECORD))


def _scan(file: File, field: str, scratch: pathlib.Path) -> tuple[str, str, slice]:
    """Adds the documents of a file to what this process has written. (sha256, name of that, where in it they are)."""
    digest = ""

    def found() -> Iterator[tuple[int, int]]:
        nonlocal digest
        digest = yield from FORMATS[file.format].scan(file.path, field)

    path = scratch / str(os.getpid())
    documents = (place for place in found() if place[1])
    with path.open("ab") as written:
        first = written.tell() // RECORD.itemsize
        while some := list(itertools.islice(documents, _BLOCK)):
            records = np.empty(len(some), RECORD)
            records["start"], records["size"] = zip(*some, strict=True)
            records["group"] = [int.from_bytes(_hash(file.group or file.document(start))[:8]) for start, _ in some]
            written.write(records.tobytes())
        return digest, path.name, slice(first, written.tell() // RECORD.itemsize)


def _hash(group: str) -> bytes:
    return hashlib.sha256(group.encode()).digest()
