"""Builds the token cache: parts by several processes, each kept when it is finished, and then put together."""

import array
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from llm_jax import tokenizers
from llm_jax.data import catalog as catalog_lib
from llm_jax.data import processes, readers
from llm_jax.data.catalog import Catalog
from llm_jax.data.encode import ENCODERS
from llm_jax.data.sources import File
from llm_jax.data.split import HeldOut
from llm_jax.errors import UserError
from llm_jax.files import new_file
from llm_jax.tokenizers import Tokenizer

_PAYS = 16 * 2**20  # bytes of text for which a process is worth its start
_PARTS = 512  # of about the same size, of these bytes at least and at most
_SMALLEST, _LARGEST = 2**20, 64 * 2**20

_Run = tuple[File, np.ndarray, np.ndarray]  # documents of a file: starts, sizes
_Job = tuple[pathlib.Path, str, str, str, str, Iterable[_Run]]


def build(
    directory: pathlib.Path, catalog: Catalog, held: HeldOut, tokenizer: Tokenizer, kind: str, workers: int
) -> None:
    """Writes the tokens of all documents into `directory`, which appears when it is whole.

    Of each side ("train", "validation"): tokens.bin, offsets.npy and bytes.npy by example, mask.bin where the
    kind of data says which tokens count, split.json. Parts that are finished stay when the work breaks off, and
    are taken when it is begun again; of several builders all but one wait.

    Raises:
      UserError: as reading and encoding do; a disk that is full or cannot be written.
    """
    parts = directory.with_name(f".{directory.name}.parts")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with _writing(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _alone(directory.with_name(f".{directory.name}.lock")):
            if directory.exists():
                return
            parts.mkdir(exist_ok=True)
            tokenizers.save(tokenizer, parts / "tokenizer")
            sides = _divided(parts, catalog, held)
            names: dict[str, list[str]] = {side.name: [] for side in sides}
            jobs: list[_Job] = []
            costs: list[int] = []
            for side in sides:
                for first, end, size in _shards(side, catalog.files):
                    name = f"{side.name}-{len(names[side.name]):06}"
                    names[side.name].append(name)
                    if not (parts / f"{name}.npz").exists():
                        places = _Places(side.path, _runs(side, catalog.files, first, end))
                        jobs.append((parts, name, dtype.name, kind, catalog.field, places))
                        costs.append(size)
            for _ in processes.each(_part, jobs, costs, "tokenizing", workers=workers, pays=_PAYS):
                pass
            whole = parts / "whole"
            shutil.rmtree(whole, ignore_errors=True)
            for side in sides:
                _join(whole / side.name, parts, names[side.name], dtype)
            whole.rename(directory)
            shutil.rmtree(parts, ignore_errors=True)


@contextlib.contextmanager
def _writing(directory: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {directory} cannot be written ({error.strerror}); what is finished is kept, and the "
            "same command goes on from there"
        ) from error


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """One process at a time is in here; the lock of a killed one is free."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that tokenizes the same text", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclasses.dataclass(frozen=True)
class _Side:
    """One side of the corpus. Beside the parts, its documents' places stand in two files, `path` and an ending.

    Attributes:
      until: int64 (files,), its documents up to the end of each file.
      bytes_until: int64 (files,), their bytes.
    """

    name: str
    path: pathlib.Path
    until: np.ndarray
    bytes_until: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Places:
    """Documents, by file and where they stand in the files of their side: all that a process is told of them."""

    path: pathlib.Path
    runs: tuple[tuple[File, int, int], ...]

    def __iter__(self) -> Iterator[_Run]:
        starts, sizes = _starts(self.path), _sizes(self.path)
        return ((file, starts[first:end], sizes[first:end]) for file, first, end in self.runs)


def _starts(path: pathlib.Path) -> np.ndarray:
    return catalog_lib.mapped(path.with_suffix(".starts"), np.int64)


def _sizes(path: pathlib.Path) -> np.ndarray:
    return catalog_lib.mapped(path.with_suffix(".sizes"), np.int64)


def _divided(parts: pathlib.Path, catalog: Catalog, held: HeldOut) -> list[_Side]:
    """Writes which documents are on which side."""
    found = []
    for name, is_held in (("train", False), ("validation", True)):
        count, size = np.zeros((2, len(catalog.files)), np.int64)
        path = parts / name
        with path.with_suffix(".starts").open("wb") as starts, path.with_suffix(".sizes").open("wb") as sizes:
            for which in catalog.blocks():
                records = catalog[which]
                chosen = held(records) == is_held
                file, records = catalog.file(which)[chosen], records[chosen]
                np.add.at(count, file, 1)
                np.add.at(size, file, records["size"])
                starts.write(records["start"].tobytes())
                sizes.write(records["size"].tobytes())
        found.append(_Side(name, path, np.cumsum(count), np.cumsum(size)))
    return found


def _shards(side: _Side, files: tuple[File, ...]) -> Iterator[tuple[int, int, int]]:
    """Documents in runs of about the same size: (first, end, bytes).

    A file that is read from its beginning only is never divided.
    """
    sizes, before, last = _sizes(side.path), 0, -1
    target = min(max(int(side.bytes_until[-1]) // _PARTS, _SMALLEST), _LARGEST)
    divisible = np.array([readers.seekable(f.path) for f in files])
    first_of = np.concatenate([[0], side.bytes_until[:-1]]) // target  # the shard in which each file begins
    cuts: list[tuple[int, int]] = []  # (document, the bytes before it)
    for some in catalog_lib.slices(0, len(sizes)):
        file = np.searchsorted(side.until, np.arange(some.start, some.stop), side="right")
        begins = before + np.cumsum(sizes[some]) - sizes[some]
        shard = np.where(divisible[file], begins // target, first_of[file])
        new = np.flatnonzero(np.diff(shard, prepend=last))
        cuts += zip((some.start + new).tolist(), begins[new].tolist(), strict=True)
        before, last = int(begins[-1] + sizes[some][-1]), shard[-1]
    cuts.append((len(sizes), before))
    return ((first, end, until - start) for (first, start), (end, until) in itertools.pairwise(cuts))


def _runs(side: _Side, files: tuple[File, ...], first: int, end: int) -> tuple[tuple[File, int, int], ...]:
    """Documents file by file: (file, first, end)."""
    low, high = np.searchsorted(side.until, (first, end - 1), side="right").tolist()
    bounds = [first, *side.until[low:high].tolist(), end]
    found = zip(files[low : high + 1], itertools.pairwise(bounds), strict=True)
    return tuple((file, begin, until) for file, (begin, until) in found if begin < until)


@functools.lru_cache(1)
def _tokenizer(directory: pathlib.Path, inode: int) -> Tokenizer:
    return tokenizers.load(directory)


def _part(
    parts: pathlib.Path,
    name: str,
    dtype: str,
    kind: str,
    field: str,
    runs: Iterable[_Run],
) -> None:
    """Tokenizes documents into NAME.tokens and NAME.mask; NAME.npz says that they are finished."""
    encoder = ENCODERS[kind]
    saved = parts / "tokenizer"
    tokenizer = _tokenizer(saved, saved.stat().st_ino)
    lengths, sizes, ends = array.array("q"), array.array("q"), array.array("b")
    with _writing(parts.parent), contextlib.ExitStack() as files:
        tokens = files.enter_context((parts / f"{name}.tokens").open("wb"))
        mask = files.enter_context((parts / f"{name}.mask").open("wb")) if encoder.masks else None
        for file, starts, bytes_of in runs:
            try:
                for example in encoder.encode(tokenizer, catalog_lib.texts(file, field, starts, bytes_of)):
                    ids = array.array("I", example.ids)  # which takes half the time of numpy's
                    tokens.write(np.asarray(ids, dtype).data)
                    if mask:
                        mask.write(example.mask)
                    lengths.append(len(example.ids))
                    sizes.append(example.size)
                    ends.append(example.ends_document)
            except UserError as error:  # what is wrong with a record is found without knowing its file
                raise UserError(str(error) if file.path in str(error) else f"{file.path}: {error}") from error
        files.close()
        with new_file(parts / f"{name}.npz", source=f"data.cache_dir: {parts.parent}") as finished:
            counts = np.asarray(lengths, np.int64), np.asarray(sizes, np.int64)
            np.savez(finished, lengths=counts[0], sizes=counts[1], ends=np.asarray(ends, bool))


def _join(directory: pathlib.Path, parts: pathlib.Path, names: list[str], dtype: np.dtype) -> None:
    """Puts the parts of one side together."""
    directory.mkdir(parents=True)
    for ending in ("tokens", "mask"):
        if ending == "tokens" or any((parts / f"{name}.mask").exists() for name in names):
            with (directory / f"{ending}.bin").open("wb") as joined:
                for name in names:
                    with (parts / f"{name}.{ending}").open("rb") as part:
                        shutil.copyfileobj(part, joined, 2**20)
                joined.flush()
                os.fsync(joined.fileno())
    offsets, sizes, ends, end, single = parts / "offsets", parts / "bytes", parts / "ends", 0, True
    with offsets.open("wb") as until, sizes.open("wb") as joined, ends.open("wb") as last:
        until.write(np.zeros(1, np.int64).tobytes())
        for name in names:
            with np.load(parts / f"{name}.npz") as part:
                cumulative = end + np.cumsum(part["lengths"])
                until.write(cumulative.tobytes())
                joined.write(part["sizes"].tobytes())
                last.write(part["ends"].tobytes())
                end, single = cumulative[-1], single and bool(part["ends"].all())
    for path, kind in ((offsets, np.int64), (sizes, np.int64), (ends, np.bool_)):
        if path != ends or not single:  # written where a document has several examples
            np.save(directory / f"{path.name}.npy", catalog_lib.mapped(path, kind))
        path.unlink()
    (directory / "split.json").write_text(json.dumps({"dtype": dtype.name}))
