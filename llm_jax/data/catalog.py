"""The documents of a corpus: position, size and group of each, in memory-mapped files.

Scans are processed in blocks and stored on disk: their memory grows with the number of files, not with the number of
documents.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from numpy.typing import DTypeLike

from llm_jax import files, object_store
from llm_jax.data import local_engine, ray_engine, readers, shared_cache, sources
from llm_jax.data.sources import File
from llm_jax.data.streams import iterate
from llm_jax.errors import UserError
from llm_jax.files import PARTIAL

_FORMAT = 2  # version of the format of stored scans
_MIN_BYTES = 256 * 2**20  # minimum bytes to scan per process
_RACE = 2 * 10**9  # nanoseconds; a file that has just changed may change again with the same time stamp
_REQUESTS = 16  # simultaneous requests to an object store
_BLOCK = 2**14  # documents in memory at a time

# A document: where it begins in its file (`readers.Scan`), the bytes of its text in UTF-8, and a hash of the name of
# its group.
RECORD = np.dtype([("start", np.int64), ("size", np.int64), ("group", np.uint64)])


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The documents of a corpus in their order: source by source, file by file.

    Attributes:
      names: names of the sources.
      files: the files of all sources.
      file_ends: int64 (files,), number of documents up to the end of each file.
      records: RECORD (documents,) of each source.
      source_ends: number of documents up to the end of each source.
      field: name of the text field in records; "": documents are whole records, as JSON.
      sha256: hash of all names and texts.
    """

    names: tuple[str, ...]
    files: tuple[File, ...]
    file_ends: np.ndarray
    records: tuple[np.ndarray, ...]
    source_ends: tuple[int, ...]
    field: str
    sha256: str

    def __len__(self) -> int:
        return self.source_ends[-1]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """RECORD (n,) of the documents with the indices int (n,)."""
        source = np.searchsorted(self.source_ends, indices, side="right")
        records = np.empty(len(indices), RECORD)
        for i, begin in enumerate((0, *self.source_ends[:-1])):
            inside = source == i
            records[inside] = self.records[i][indices[inside] - begin]
        return records

    def file(self, indices: np.ndarray) -> np.ndarray:
        """int (n,): the index in `files` of the file of each document, by its index."""
        return np.searchsorted(self.file_ends, indices, side="right")

    def blocks(self) -> Iterator[np.ndarray]:
        """The indices of all documents, in blocks of int (n,)."""
        return (np.arange(s.start, s.stop) for s in slices(0, len(self)))

    def is_cut(self) -> bool:
        """Whether a text file has become several documents."""
        counts = zip([0, *self.file_ends], self.file_ends, self.files, strict=False)
        return any(file.format == "pieces" and end - begin > 1 for begin, end, file in counts)

    def num_bytes(self) -> int:
        """Bytes of all texts in UTF-8."""
        return sum(int(records["size"].sum()) for records in self.records)

    def name(self, index: int) -> str:
        """The name of a document: its file, and where it begins in it."""
        indices = np.array([index])
        return self.files[self.file(indices)[0]].document(int(self[indices]["start"][0]))

    def texts(self, indices: np.ndarray) -> Iterator[str]:
        """The texts of the documents with ascending indices int (n,).

        Raises:
          UserError: a file cannot be read, or has changed since it was scanned.
        """
        file = self.file(indices)
        for part in np.split(indices, np.flatnonzero(np.diff(file)) + 1) if len(indices) else ():
            records = self[part]
            columns = (np.ascontiguousarray(records[name]) for name in ("start", "size"))
            yield from texts(self.files[self.file(part[:1])[0]], self.field, *columns)


def texts(file: File, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    """The texts of documents of one file, by their starts and sizes, int64 (documents,) each.

    Raises:
      UserError: the size of a text has changed since it was scanned.
    """
    documents = readers.get(file.format).read(file.path, field, starts, sizes)
    for size, text in zip(iterate(sizes), documents, strict=True):
        if len(text.encode()) != size:
            raise UserError(f"{file.path}: changed while it was being read; start again")
        yield text


def read(
    source: str,
    field: str,
    cache_dir: str,
    workers: int,
    split_single_file: bool = True,
    engine: str = "local",
    form: str = readers.AUTO,
) -> tuple[Catalog, list["SourceScan"]]:
    """The catalog of `data.source`, and the scans of its sources.

    Args:
      field: see `Catalog.field`.
      cache_dir: the option `data.cache_dir`; scans are stored there, with the sizes and times of the files.
      workers: processes that scan; see `local_engine.run_jobs`.
      split_single_file: see `sources.files`.
      engine: "local", or "ray" (see `ray_engine`).
      form: the option `data.format`.

    Raises:
      UserError: a source is missing, cannot be read, or has no text; the scan cannot be written.
    """
    names = tuple(sources.weights(source))
    prefix, workers = len(names) > 1, local_engine.num_workers(workers, engine, [form])
    scans = [
        SourceScan.make(name, form, prefix, field, cache_dir, workers, split_single_file, engine) for name in names
    ]
    sha256 = hashlib.sha256()
    for scan in scans:
        for file, digest in zip(scan.files, scan.digests, strict=True):
            if digest:
                sha256.update(f"{file.name}\0{digest}\0".encode())
    sha256.update(field.encode())
    catalog = Catalog(
        names=names,
        files=tuple(file for scan in scans for file in scan.files),
        file_ends=np.cumsum([count for scan in scans for count in scan.counts]),
        records=tuple(scan.records for scan in scans),
        source_ends=tuple(itertools.accumulate(len(scan.records) for scan in scans)),
        field=field,
        sha256=sha256.hexdigest(),
    )
    return catalog, scans


@dataclasses.dataclass(frozen=True)
class SourceScan:
    """The scan of one source.

    Attributes:
      stamps: size and time of each file.
      digests: sha256 of each file.
      counts: number of documents of each file.
      records: RECORD of all documents, mapped from disk.
      path: where the scan is stored.
      cache_dir: the option `data.cache_dir`.
      is_new: whether it differs from the stored one.
    """

    files: list[File]
    stamps: list[tuple[int | str, int]]
    digests: list[str]
    counts: list[int]
    records: np.ndarray
    path: pathlib.Path
    cache_dir: str
    is_new: bool

    @classmethod
    def make(
        cls,
        name: str,
        form: str,
        prefix: bool,
        field: str,
        cache_dir: str,
        workers: int,
        split_single_file: bool,
        engine: str,
    ) -> "SourceScan":
        """Scans the files that are not in the stored scan, or have changed since."""
        files = sources.files(name, prefix, split_single_file=split_single_file, form=form)
        stamps = _stamps(files)
        directory = shared_cache.directory(cache_dir) / "scans"
        where = "" if object_store.is_object(name) else str(pathlib.Path.cwd())
        key = json.dumps([name, where, prefix, field, _FORMAT])
        path = directory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.scan"
        shared_cache.fetch(cache_dir, path)
        stored, records = _stored(path)
        keys = [_key(file, stamp) for file, stamp in zip(files, stamps, strict=True)]
        scans = {i: stored[key] for i, key in enumerate(keys) if key in stored}
        is_new = list(stored) != keys
        if is_new:
            with _scratch(directory) as scratch:
                unscanned = [i for i in range(len(files)) if i not in scans]
                jobs = [(files[i], field) for i in unscanned]
                costs = [s if isinstance(s, int) else n for s, n in (stamps[i] for i in unscanned)]
                title = f"reading {name}"
                if engine == ray_engine.NAME:
                    scanned = ray_engine.run_jobs(_scan_remotely, jobs, costs, title, {file.format for file in files})
                    results = {i: _append_received(scratch, digest, records) for i, (digest, records) in scanned}
                else:
                    local = [(*job, scratch) for job in jobs]
                    results = dict(
                        local_engine.run_jobs(_scan, local, costs, title, workers=workers, min_bytes=_MIN_BYTES)
                    )
                maps = {part.name: memory_map(part, RECORD) for part in scratch.iterdir()}
                scans |= {unscanned[i]: (digest, maps[part][at]) for i, (digest, part, at) in results.items()}
                with tempfile.TemporaryFile(dir=directory) as joined:
                    for i in range(len(files)):
                        _append(joined, scans[i][1])
                    joined.flush()
                    records = memory_map(joined, RECORD)  # the mapping keeps the file without a name
        if not len(records):
            content = (
                f"{len(files):,} file{'s' * (len(files) > 1)} without text"
                if files
                else "no file, or only hidden files"
            )
            raise UserError(f"data.source={name}: contains no text ({content})")
        digests, parts = zip(*(scans[i] for i in range(len(files))), strict=True)
        return cls(files, stamps, list(digests), [len(p) for p in parts], records, path, cache_dir, is_new)

    def write(self) -> None:
        """Stores a new scan, without files that changed just now. Raises UserError if it cannot be written."""
        if not self.is_new:
            return
        now = time.time_ns()
        sure = [isinstance(s[0], str) or s[1] + _RACE < now for s in self.stamps]
        rows = zip(self.files, self.stamps, self.digests, self.counts, strict=True)
        table = [[_key(file, stamp), digest, count] for file, stamp, digest, count in itertools.compress(rows, sure)]
        header = json.dumps(table).encode()
        with files.new_file(self.path, source=f"data.cache_dir: {self.path.parent}") as file:
            file.write(header + b" " * (-len(header) - 1 & 7) + b"\n")  # records begin at multiples of 8
            for end, count, is_sure in zip(itertools.accumulate(self.counts), self.counts, sure, strict=True):
                _append(file, self.records[end - count : end * is_sure])
        shared_cache.publish(self.cache_dir, self.path)

    def changed(self) -> str:
        """The path of a file that has changed since it was scanned, or ""."""
        stamps = zip(self.files, self.stamps, _stamps(self.files), strict=True)
        return next((file.path for file, before, now in stamps if now != before), "")


def memory_map(file: pathlib.Path | IO[bytes], dtype: DTypeLike, offset: int = 0) -> np.ndarray:
    """A memory-mapped array (n,) of a file from `offset` to its end, which may be empty."""
    size = os.stat(file if isinstance(file, pathlib.Path) else file.fileno()).st_size
    return np.memmap(file, dtype, "r", offset).view(np.ndarray) if size > offset else np.zeros(0, dtype)


def slices(begin: int, end: int) -> Iterator[slice]:
    """Consecutive slices of bounded size."""
    return (slice(i, min(i + _BLOCK, end)) for i in range(begin, end, _BLOCK))


def _append(file: IO[bytes], values: np.ndarray) -> None:
    for block in slices(0, len(values)):
        file.write(values[block].tobytes())


@contextlib.contextmanager
def _written(directory: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"data.cache_dir: {directory} cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def _scratch(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary directory in `directory`; afterwards, new parents of it that are empty are removed as well."""
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


def _stored(path: pathlib.Path) -> tuple[dict[str, tuple[str, np.ndarray]], np.ndarray]:
    """The stored scan: (sha256, RECORD of its documents) of each file by its key, and RECORD of all documents."""
    try:
        with path.open("rb") as opened:
            table = json.loads(opened.readline())
            records = memory_map(opened, RECORD, opened.tell())
    except (OSError, ValueError):
        return {}, np.zeros(0, RECORD)  # missing, or truncated
    scans, begin = {}, 0
    for key, digest, count in table:
        scans[key] = (digest, records[begin : begin + count])
        begin += count
    return (scans, records) if begin == len(records) else ({}, np.zeros(0, RECORD))


def _scan(file: File, field: str, scratch: pathlib.Path) -> tuple[str, str, slice]:
    """Appends the documents of a file to a file of this process: (sha256, name of that file, slice of it)."""
    digest = ""

    def scan() -> Iterator[tuple[int, int]]:
        nonlocal digest
        digest = yield from readers.get(file.format).scan(file.path, field)

    path = scratch / str(os.getpid())
    documents = ((start, size) for start, size in scan() if size)
    with path.open("ab") as written:
        first = written.tell() // RECORD.itemsize
        while block := list(itertools.islice(documents, _BLOCK)):
            records = np.empty(len(block), RECORD)
            records["start"], records["size"] = zip(*block, strict=True)
            records["group"] = [int.from_bytes(_hash(file.group or file.document(start))[:8]) for start, _ in block]
            written.write(records.tobytes())
        return digest, path.name, slice(first, written.tell() // RECORD.itemsize)


def _scan_remotely(file: File, field: str) -> tuple[str, np.ndarray]:
    """The sha256 of a file and RECORD of its documents, on a machine of a cluster."""
    with tempfile.TemporaryDirectory() as scratch:
        digest, name, _ = _scan(file, field, pathlib.Path(scratch))
        return digest, np.fromfile(pathlib.Path(scratch, name), RECORD)


def _append_received(scratch: pathlib.Path, digest: str, records: np.ndarray) -> tuple[str, str, slice]:
    """Stores the documents that another machine has found, and returns the same as `_scan`."""
    path = scratch / "received"
    with path.open("ab") as written:
        first = written.tell() // RECORD.itemsize
        _append(written, records)
        return digest, path.name, slice(first, first + len(records))


def _stamps(files: Sequence[File]) -> list[tuple[int | str, int]]:
    """`File.stamp` of each file. For objects, which need a request each, several requests run at a time."""
    if not any(object_store.is_object(file.path) for file in files):
        return [file.stamp() for file in files]
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(File.stamp, files))


def _hash(group: str) -> bytes:
    return hashlib.sha256(group.encode()).digest()
