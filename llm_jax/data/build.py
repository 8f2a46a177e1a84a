"""Builds the token cache: several processes write parts, which survive an interruption and are joined at the end."""

import array
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

from llm_jax import files as files_lib
from llm_jax import tokenizers
from llm_jax.data import catalog as catalog_lib
from llm_jax.data import local_engine, ray_engine, readers, streams
from llm_jax.data.catalog import Catalog
from llm_jax.data.encode import ENCODERS
from llm_jax.data.sources import File
from llm_jax.data.split import HeldOut
from llm_jax.errors import UserError
from llm_jax.files import new_file
from llm_jax.tokenizers import Tokenizer

_MIN_BYTES = 16 * 2**20  # minimum bytes of text per process
_PARTS = 512  # number of parts of about the same size, unless their bytes are out of these bounds
_SMALLEST, _LARGEST = 2**20, 64 * 2**20

_Run = tuple[File, np.ndarray, np.ndarray]  # documents of a file: starts and sizes, int64 (documents,) each
_Job = tuple[pathlib.Path, str, str, str, str, Iterable[_Run]]


def build(
    directory: pathlib.Path,
    catalog: Catalog,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    kind: str,
    workers: int,
    engine: str = "local",
) -> None:
    """Writes the tokens of all documents into `directory` atomically.

    Each split ("train", "validation") has tokens.bin, offsets.npy and bytes.npy by example, mask.bin if only some
    tokens of the kind of data are targets, and split.json. Finished parts are kept after an interruption, and the next
    call continues from them. Only one process builds at a time; others wait. Every engine writes the same bytes.

    Args:
      engine: "local": processes of this machine; "ray": a cluster (`ray_engine`), whose machines can read the files of
        the catalog.

    Raises:
      UserError: documents cannot be read or encoded; the disk is full or cannot be written.
    """
    parts = directory.with_name(f".{directory.name}.parts")
    custom_parts = {tokenizer.kind, *(file.format for file in catalog.files)}
    workers = local_engine.num_workers(workers, engine, custom_parts)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with _writing(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _alone(directory.with_name(f".{directory.name}.lock")):
            if directory.exists():
                return
            parts.mkdir(exist_ok=True)
            tokenizers.save(tokenizer, parts / "tokenizer")
            splits = _divided(parts, catalog, held_out)
            names: dict[str, list[str]] = {split.name: [] for split in splits}
            jobs: list[_Job] = []
            costs: list[int] = []
            for split in splits:
                for first, end, size in _shards(split, catalog.files):
                    name = f"{split.name}-{len(names[split.name]):06}"
                    names[split.name].append(name)
                    if not (parts / f"{name}.npz").exists():
                        documents = _Documents(split.path, _runs(split, catalog.files, first, end))
                        jobs.append((parts, name, dtype.name, kind, catalog.field, documents))
                        costs.append(size)
            if engine == ray_engine.NAME:
                _receive(parts, _tokenizer_files(parts / "tokenizer"), jobs, costs, custom_parts)
            else:
                for _ in local_engine.run_jobs(_part, jobs, costs, "tokenizing", workers=workers, min_bytes=_MIN_BYTES):
                    pass
            joined = parts / "joined"
            shutil.rmtree(joined, ignore_errors=True)
            for split in splits:
                _join(joined / split.name, parts, names[split.name], dtype)
            files_lib.rename(joined, directory, durable=True)
            shutil.rmtree(parts, ignore_errors=True)


@contextlib.contextmanager
def _writing(directory: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {directory} cannot be written ({error.strerror}); finished parts are kept, and the same "
            "command resumes from them"
        ) from error


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Context that only one process at a time can enter; the lock of a killed process is released."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process, which tokenizes the same text", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclasses.dataclass(frozen=True)
class _Split:
    """One split of the corpus: "train" or "validation".

    Attributes:
      path: the path, without suffix, of two files with the starts and the sizes of the documents.
      file_ends: int64 (files,), number of documents of the split up to the end of each file.
      byte_ends: int64 (files,), bytes of these documents.
    """

    name: str
    path: pathlib.Path
    file_ends: np.ndarray
    byte_ends: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Documents:
    """Documents of one split as runs of (file, first, end): small, because it is sent to a process."""

    path: pathlib.Path
    runs: tuple[tuple[File, int, int], ...]

    def __iter__(self) -> Iterator[_Run]:
        starts, sizes = _starts(self.path), _sizes(self.path)
        return ((file, starts[first:end], sizes[first:end]) for file, first, end in self.runs)


def _starts(path: pathlib.Path) -> np.ndarray:
    return catalog_lib.memory_map(path.with_suffix(".starts"), np.int64)


def _sizes(path: pathlib.Path) -> np.ndarray:
    return catalog_lib.memory_map(path.with_suffix(".sizes"), np.int64)


def _divided(parts: pathlib.Path, catalog: Catalog, held_out: HeldOut) -> list[_Split]:
    """Writes the starts and sizes of the documents of each split."""
    splits = []
    for name, is_held in (("train", False), ("validation", True)):
        count, size = np.zeros((2, len(catalog.files)), np.int64)
        path = parts / name
        with path.with_suffix(".starts").open("wb") as starts, path.with_suffix(".sizes").open("wb") as sizes:
            for indices in catalog.blocks():
                records = catalog[indices]
                chosen = held_out(records) == is_held
                file, records = catalog.file(indices)[chosen], records[chosen]
                np.add.at(count, file, 1)
                np.add.at(size, file, records["size"])
                starts.write(records["start"].tobytes())
                sizes.write(records["size"].tobytes())
        splits.append(_Split(name, path, np.cumsum(count), np.cumsum(size)))
    return splits


def _shards(split: _Split, files: tuple[File, ...]) -> Iterator[tuple[int, int, int]]:
    """(first, end, bytes) of runs of documents of about the same size.

    A file that can be read only from its beginning is not divided.
    """
    sizes, before, last = _sizes(split.path), 0, -1
    target = min(max(int(split.byte_ends[-1]) // _PARTS, _SMALLEST), _LARGEST)
    divisible = np.array([streams.seekable(f.path) and readers.get(f.format).seekable for f in files])
    first_of = np.concatenate([[0], split.byte_ends[:-1]]) // target  # the shard in which each file begins
    cuts: list[tuple[int, int]] = []  # (document, bytes before it)
    for block in catalog_lib.slices(0, len(sizes)):
        file = np.searchsorted(split.file_ends, np.arange(block.start, block.stop), side="right")
        begins = before + np.cumsum(sizes[block]) - sizes[block]
        shard = np.where(divisible[file], begins // target, first_of[file])
        new = np.flatnonzero(np.diff(shard, prepend=last))
        cuts += zip((block.start + new).tolist(), begins[new].tolist(), strict=True)
        before, last = int(begins[-1] + sizes[block][-1]), shard[-1]
    cuts.append((len(sizes), before))
    return ((first, end, until - start) for (first, start), (end, until) in itertools.pairwise(cuts))


def _runs(split: _Split, files: tuple[File, ...], first: int, end: int) -> tuple[tuple[File, int, int], ...]:
    """(file, first, end) of the documents `first` to `end` of a split, file by file."""
    low, high = np.searchsorted(split.file_ends, (first, end - 1), side="right").tolist()
    bounds = [first, *split.file_ends[low:high].tolist(), end]
    runs = zip(files[low : high + 1], itertools.pairwise(bounds), strict=True)
    return tuple((file, begin, until) for file, (begin, until) in runs if begin < until)


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
    """Tokenizes documents into NAME.tokens and NAME.mask; writes NAME.npz when they are complete."""
    saved = parts / "tokenizer"
    _encode(parts, name, dtype, kind, field, runs, _tokenizer(saved, saved.stat().st_ino))


def _encode(
    parts: pathlib.Path, name: str, dtype: str, kind: str, field: str, runs: Iterable[_Run], tokenizer: Tokenizer
) -> None:
    encoder = ENCODERS[kind]
    lengths, sizes, ends = array.array("q"), array.array("q"), array.array("b")
    with _writing(parts.parent), contextlib.ExitStack() as files:
        tokens = files.enter_context((parts / f"{name}.tokens").open("wb"))
        mask = files.enter_context((parts / f"{name}.mask").open("wb")) if encoder.masks else None
        for file, starts, document_sizes in runs:
            try:
                for example in encoder.encode(tokenizer, catalog_lib.texts(file, field, starts, document_sizes)):
                    ids = array.array("I", example.ids)  # takes half the time of a numpy array
                    tokens.write(np.asarray(ids, dtype).data)
                    if mask:
                        mask.write(example.mask)
                    lengths.append(len(example.ids))
                    sizes.append(example.size)
                    ends.append(example.ends_document)
            except UserError as error:  # add the file of the record, which an encoder does not know
                raise UserError(str(error) if file.path in str(error) else f"{file.path}: {error}") from error
        files.close()
        with new_file(parts / f"{name}.npz", source=f"data.cache_dir: {parts.parent}") as finished:
            counts = np.asarray(lengths, np.int64), np.asarray(sizes, np.int64)
            np.savez(finished, lengths=counts[0], sizes=counts[1], ends=np.asarray(ends, bool))


def _tokenizer_files(directory: pathlib.Path) -> tuple[tuple[str, bytes], ...]:
    """(name, content) of the files of a saved tokenizer."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return tuple((path.relative_to(directory).as_posix(), path.read_bytes()) for path in paths)


@functools.lru_cache(1)
def _received_tokenizer(saved: tuple[tuple[str, bytes], ...]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        for name, content in saved:
            path = pathlib.Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tokenizers.load(pathlib.Path(directory))


def _part_remotely(
    saved: tuple[tuple[str, bytes], ...], name: str, dtype: str, kind: str, field: str, runs: Iterable[_Run]
) -> dict[str, bytes]:
    """{name: content} of the files that `_part` writes, on a machine of a cluster."""
    with tempfile.TemporaryDirectory() as directory:
        parts = pathlib.Path(directory)
        _encode(parts, name, dtype, kind, field, runs, _received_tokenizer(saved))
        return {path.name: path.read_bytes() for path in parts.iterdir()}


def _receive(
    parts: pathlib.Path,
    saved: tuple[tuple[str, bytes], ...],
    jobs: list[_Job],
    costs: list[int],
    custom_parts: Iterable[str],
) -> None:
    """Runs the jobs of `_part` on a cluster, and writes the files of each part, NAME.npz last."""
    arguments = [(*rest, [(f, np.array(s), np.array(n)) for f, s, n in documents]) for _, *rest, documents in jobs]
    work = functools.partial(_part_remotely, saved)
    for _, contents in ray_engine.run_jobs(work, arguments, costs, "tokenizing", custom_parts):
        for name in sorted(contents, key=lambda name: name.endswith(".npz")):
            with new_file(parts / name, source=f"data.cache_dir: {parts.parent}") as file:
                file.write(contents[name])


def _join(directory: pathlib.Path, parts: pathlib.Path, names: list[str], dtype: np.dtype) -> None:
    """Joins the parts of one split."""
    directory.mkdir(parents=True)
    for ending in ("tokens", "mask"):
        if ending == "tokens" or any((parts / f"{name}.mask").exists() for name in names):
            with (directory / f"{ending}.bin").open("wb") as joined:
                for name in names:
                    with (parts / f"{name}.{ending}").open("rb") as part:
                        shutil.copyfileobj(part, joined, 2**20)
    offsets, sizes, ends, end, single = parts / "offsets", parts / "bytes", parts / "ends", 0, True
    with offsets.open("wb") as until, sizes.open("wb") as joined, ends.open("wb") as last:
        until.write(np.zeros(1, np.int64).tobytes())
        for name in names:
            with np.load(parts / f"{name}.npz") as part_sizes:
                cumulative = end + np.cumsum(part_sizes["lengths"])
                until.write(cumulative.tobytes())
                joined.write(part_sizes["sizes"].tobytes())
                last.write(part_sizes["ends"].tobytes())
                end, single = cumulative[-1], single and bool(part_sizes["ends"].all())
    for path, kind in ((offsets, np.int64), (sizes, np.int64), (ends, np.bool_)):
        if path != ends or not single:  # written where a document has several examples
            np.save(directory / f"{path.name}.npy", catalog_lib.memory_map(path, kind))
        path.unlink()
    (directory / "split.json").write_text(json.dumps({"dtype": dtype.name}))
