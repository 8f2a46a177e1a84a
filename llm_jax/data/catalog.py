"""What is in a corpus: the place, size and group of every document in arrays, and which of them are held out."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np

from llm_jax.data import processes, sources
from llm_jax.data.formats import FORMATS
from llm_jax.data.sources import File
from llm_jax.errors import UserError

_FORMAT = 1  # of the remembered scans
_PAYS = 256 * 2**20  # bytes to scan for which a process is worth its start
_RACE = 2 * 10**9  # nanoseconds; a file that has just changed may change again under the same time


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The documents of a corpus in their order: source by source, file by file.

    Attributes:
      names: of the sources.
      files: all of them.
      file: int32 (documents,), whose document it is.
      start: int64 (documents,), where it begins in its file (`formats.Scan`).
      size: int64 (documents,), bytes of its text in UTF-8.
      group: uint64 (documents,), a hash of the name of its group.
      ends: int (sources,), the documents up to the end of each source.
      field: what the text is called in records.
      sha256: of all names and texts.
    """

    names: tuple[str, ...]
    files: tuple[File, ...]
    file: np.ndarray
    start: np.ndarray
    size: np.ndarray
    group: np.ndarray
    ends: tuple[int, ...]
    field: str
    sha256: str

    def __len__(self) -> int:
        return len(self.file)

    def name(self, document: int) -> str:
        return self.files[self.file[document]].document(int(self.start[document]))

    def texts(self, which: np.ndarray) -> Iterator[str]:
        """The texts of documents, by ascending indices.

        Raises:
          UserError: a file that cannot be read, or has changed since it was scanned.
        """
        file = self.file[which]
        for part in np.split(which, np.flatnonzero(np.diff(file)) + 1) if len(which) else ():
            yield from texts(self.files[self.file[part[0]]], self.field, self.start[part], self.size[part])


def texts(file: File, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    """The texts of one file's documents, which must have the sizes that they had."""
    found = FORMATS[file.format].read(file.path, field, starts, sizes)
    for size, text in zip(sizes.tolist(), found, strict=True):
        if len(text.encode()) != size:
            raise UserError(f"{file.path}: changed while it was being read; start again")
        yield text


def read(source: str, field: str, memory: pathlib.Path, workers: int) -> tuple[Catalog, list["Record"]]:
    """The catalog of `data.source`, and the scans of its sources that it was made from.

    Args:
      memory: where scans are remembered, by the sizes and times of files.

    Raises:
      UserError: a source that is not there, cannot be read, or has no text.
    """
    names = tuple(sources.weights(source))
    records = [Record.make(name, len(names) > 1, field, memory, workers) for name in names]
    bases = np.cumsum([0, *(len(r.files) for r in records)])
    ends = np.cumsum([len(r.start) for r in records])
    digest = hashlib.sha256()
    for record in records:
        for file, found in zip(record.files, record.digests, strict=True):
            if found:
                digest.update(f"{file.name}\0{found}\0".encode())
    digest.update(field.encode())
    catalog = Catalog(
        names=names,
        files=tuple(f for r in records for f in r.files),
        file=np.concatenate([r.file + base for r, base in zip(records, bases, strict=False)], dtype=np.int32),
        start=_joined([r.start for r in records]),
        size=_joined([r.size for r in records]),
        group=_joined([r.group for r in records]),
        ends=tuple(ends.tolist()),
        field=field,
        sha256=digest.hexdigest(),
    )
    return catalog, records


@dataclasses.dataclass(frozen=True)
class Record:
    """The scan of one source: as `Catalog`, with the sizes and times of its files. `is_new`: not (all) from memory."""

    files: list[File]
    stamps: list[tuple[int | str, int]]
    digests: list[str]
    file: np.ndarray
    start: np.ndarray
    size: np.ndarray
    group: np.ndarray
    path: pathlib.Path
    is_new: bool

    @classmethod
    def make(cls, name: str, prefix: bool, field: str, memory: pathlib.Path, workers: int) -> "Record":
        """From memory, as far as the files are as they were, and else by scanning them."""
        files = sources.files(name, prefix)
        stamps = [file.stamp() for file in files]
        key = json.dumps([name, str(pathlib.Path.cwd()), prefix, field, _FORMAT])
        path = memory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        known = _remembered(path)
        wanted = [_key(file, stamp) for file, stamp in zip(files, stamps, strict=True)]
        todo = [i for i, key in enumerate(wanted) if key not in known]
        found = {i: known[key] for i, key in enumerate(wanted) if key in known}
        jobs = [(files[i], field) for i in todo]
        costs = [s if isinstance(s, int) else n for s, n in (stamps[i] for i in todo)]
        for i, scan in processes.each(_scan, jobs, costs, f"reading {name}", workers=workers, pays=_PAYS):
            found[todo[i]] = scan
        parts = [found[i] for i in range(len(files))]
        if not sum(len(part[1]) for part in parts):
            raise UserError(f"data.source={name}: there is no text in it")
        digests, starts, sizes, groups = zip(*parts, strict=True)
        return cls(
            files,
            stamps,
            list(digests),
            np.repeat(np.arange(len(files), dtype=np.int32), [len(s) for s in starts]),
            _joined(starts),
            _joined(sizes),
            _joined(groups),
            path,
            bool(todo) or len(known) != len(files),
        )

    def write(self) -> None:
        """Remembers what is new, but for files that changed just now. Raises UserError where it cannot be written."""
        if not self.is_new:
            return
        now = time.time_ns()
        sure = np.array([isinstance(s[0], str) or s[1] + _RACE < now for s in self.stamps])
        counts = np.bincount(self.file, minlength=len(self.files))
        table = [
            [_key(file, stamp), digest, int(count)]
            for file, stamp, digest, count, kept in zip(
                self.files, self.stamps, self.digests, counts, sure, strict=True
            )
            if kept
        ]
        kept = sure[self.file]
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as opened:
                np.savez(
                    opened,
                    table=np.frombuffer(json.dumps(table).encode(), np.uint8),
                    start=self.start[kept],
                    size=self.size[kept],
                    group=self.group[kept],
                )
            partial.rename(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise UserError(f"data.cache_dir: {self.path.parent} cannot be written ({error.strerror})") from error

    def changed(self) -> str:
        """The path of a file that is no longer what was scanned, or ""."""
        return next((f.path for f, s in zip(self.files, self.stamps, strict=True) if f.stamp() != s), "")


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One after the other; a single one is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


_Part = tuple[str, np.ndarray, np.ndarray, np.ndarray]  # sha256, start, size, group


def _key(file: File, stamp: tuple[int | str, int]) -> str:
    return json.dumps([file.name, file.path, file.format, *stamp])


def _remembered(path: pathlib.Path) -> dict[str, _Part]:
    try:
        with np.load(path) as saved:
            table = json.loads(saved["table"].tobytes())
            start, size, group = saved["start"], saved["size"], saved["group"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}  # none, or one that was cut short
    found, begin = {}, 0
    for key, digest, count in table:
        part = slice(begin, begin + count)
        found[key] = (digest, start[part], size[part], group[part])
        begin += count
    return found if begin == len(start) else {}


def _scan(file: File, field: str) -> _Part:
    digest, starts, sizes = FORMATS[file.format].scan(file.path, field)
    some = sizes > 0
    starts, sizes = starts[some], sizes[some]
    names = (file.group or file.document(start) for start in starts.tolist())
    return digest, starts, sizes, np.fromiter((int.from_bytes(_hash(n)[:8]) for n in names), np.uint64, len(starts))


def _hash(group: str) -> bytes:
    return hashlib.sha256(group.encode()).digest()


def held_out(catalog: Catalog, fraction: float) -> np.ndarray:
    """Which documents are held out, bool (documents,): whole groups in the order of their hash, up to `fraction`
    of the bytes.

    Groups that alone would exceed the rest of the share are passed over; at least one group is held
    out and one is trained on.

    Raises:
      UserError: the fraction is not inside (0, 1), or there is one group only.
    """
    if not 0 < fraction < 1:
        raise UserError(f"config key 'data.validation_fraction' is {fraction}; expected a number between 0 and 1")
    groups, which = np.unique(catalog.group, return_inverse=True)
    if len(groups) < 2:
        raise UserError(f"the corpus is one document ({catalog.name(0)}); at least two are needed to hold one out")
    sizes = np.zeros(len(groups), np.int64)
    np.add.at(sizes, which, catalog.size)
    room, held, rest = fraction * int(sizes.sum()), np.zeros(len(groups), bool), np.arange(len(groups))
    while len(rest := rest[sizes[rest] <= room]):
        total = np.cumsum(sizes[rest])
        fit = int(np.searchsorted(total, room, side="right"))
        held[rest[:fit]] = True
        room -= int(total[fit - 1])
        rest = rest[fit:]
    if not held.any():
        least = np.flatnonzero((sizes == sizes.min())[which])
        names = {catalog.files[catalog.file[i]].group or catalog.name(i): which[i] for i in least.tolist()}
        held[names[min(names)]] = True
    return held[which]
