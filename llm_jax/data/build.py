"""Builds the token cache: parts by several processes, each kept when it is finished, and then put together."""

import array
import contextlib
import fcntl
import functools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

import numpy as np

from llm_jax import tokenizers
from llm_jax.data import catalog as catalog_lib
from llm_jax.data import formats, processes
from llm_jax.data.catalog import Catalog
from llm_jax.data.encode import ENCODERS
from llm_jax.data.sources import File
from llm_jax.errors import UserError
from llm_jax.tokenizers import Tokenizer

_PAYS = 16 * 2**20  # bytes of text for which a process is worth its start
_PARTS = 512  # of about the same size, of these bytes at least and at most
_SMALLEST, _LARGEST = 2**20, 64 * 2**20

_Job = tuple[pathlib.Path, str, str, str, str, list[tuple[File, np.ndarray, np.ndarray]]]


def build(
    directory: pathlib.Path, catalog: Catalog, held: np.ndarray, tokenizer: Tokenizer, kind: str, workers: int
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
            sides = {"train": np.flatnonzero(~held), "validation": np.flatnonzero(held)}
            names: dict[str, list[str]] = {side: [] for side in sides}
            jobs: list[_Job] = []
            costs: list[int] = []
            for side, which in sides.items():
                for shard in _shards(catalog, which):
                    name = f"{side}-{len(names[side]):06}"
                    names[side].append(name)
                    if not (parts / f"{name}.npz").exists():
                        jobs.append((parts, name, dtype.name, kind, catalog.field, _runs(catalog, shard)))
                        costs.append(int(catalog.size[shard].sum()))
            for _ in processes.each(_part, jobs, costs, "tokenizing", workers=workers, pays=_PAYS):
                pass
            whole = parts / "whole"
            shutil.rmtree(whole, ignore_errors=True)
            for side in sides:
                _join(whole / side, parts, names[side], dtype)
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


def _shards(catalog: Catalog, which: np.ndarray) -> list[np.ndarray]:
    """Documents in runs of about the same size; a file that is read from its beginning only is never divided."""
    if not len(which):
        return []
    file, sizes = catalog.file[which], catalog.size[which]
    target = min(max(int(sizes.sum()) // _PARTS, _SMALLEST), _LARGEST)
    shard = (np.cumsum(sizes) - sizes) // target
    first = np.searchsorted(file, np.arange(len(catalog.files)))  # of each file
    divisible = np.array([formats.seekable(f.path) for f in catalog.files])
    shard = np.where(divisible[file], shard, shard[np.minimum(first[file], len(which) - 1)])
    return np.split(which, np.flatnonzero(np.diff(shard)) + 1)


def _runs(catalog: Catalog, which: np.ndarray) -> list[tuple[File, np.ndarray, np.ndarray]]:
    """Documents file by file: (file, starts, sizes)."""
    cuts = np.split(which, np.flatnonzero(np.diff(catalog.file[which])) + 1)
    return [(catalog.files[catalog.file[run[0]]], catalog.start[run], catalog.size[run]) for run in cuts]


@functools.lru_cache(1)
def _tokenizer(directory: pathlib.Path, inode: int) -> Tokenizer:
    return tokenizers.load(directory)


def _part(
    parts: pathlib.Path,
    name: str,
    dtype: str,
    kind: str,
    field: str,
    runs: list[tuple[File, np.ndarray, np.ndarray]],
) -> None:
    """Tokenizes documents into NAME.tokens and NAME.mask; NAME.npz says that they are finished."""
    encoder = ENCODERS[kind]
    saved = parts / "tokenizer"
    tokenizer = _tokenizer(saved, saved.stat().st_ino)
    lengths, sizes = [], []
    with _writing(parts.parent), contextlib.ExitStack() as files:
        tokens = files.enter_context((parts / f"{name}.tokens").open("wb"))
        mask = files.enter_context((parts / f"{name}.mask").open("wb")) if encoder.masks else None
        for file, starts, bytes_of in runs:
            try:
                for example in encoder.encode(tokenizer, catalog_lib.texts(file, field, starts, bytes_of)):
                    ids = array.array("I", example.ids)  # which takes half the time of numpy's
                    tokens.write(np.asarray(ids, dtype))
                    if mask:
                        mask.write(example.mask)
                    lengths.append(len(example.ids))
                    sizes.append(example.size)
            except UserError as error:  # what is wrong with a record is found without knowing its file
                raise UserError(str(error) if file.path in str(error) else f"{file.path}: {error}") from error
        partial = files.enter_context((parts / f"{name}.partial").open("wb"))
        np.savez(partial, lengths=np.asarray(lengths, np.int64), sizes=np.asarray(sizes, np.int64))
        files.close()
        (parts / f"{name}.partial").rename(parts / f"{name}.npz")


def _join(directory: pathlib.Path, parts: pathlib.Path, names: list[str], dtype: np.dtype) -> None:
    """Puts the parts of one side together."""
    directory.mkdir(parents=True)
    said = [np.load(parts / f"{name}.npz") for name in names]
    lengths, sizes = (np.concatenate([np.zeros(0, np.int64), *(s[key] for s in said)]) for key in ("lengths", "sizes"))
    for ending in ("tokens", "mask"):
        if ending == "tokens" or any((parts / f"{name}.mask").exists() for name in names):
            with (directory / f"{ending}.bin").open("wb") as joined:
                for name in names:
                    with (parts / f"{name}.{ending}").open("rb") as part:
                        shutil.copyfileobj(part, joined, 2**20)
                joined.flush()
                os.fsync(joined.fileno())
    np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    np.save(directory / "bytes.npy", sizes)
    (directory / "split.json").write_text(json.dumps({"dtype": dtype.name}))
