"""A corpus as tokens: every document tokenized once, into files that are mapped and not read."""

import dataclasses
import json
import lzma
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from llm_jax import tokenizers
from llm_jax.config import DataConfig, TokenizerConfig, choice
from llm_jax.data import catalog
from llm_jax.data.build import build
from llm_jax.data.encode import ENCODERS
from llm_jax.errors import UserError
from llm_jax.tokenizers import Tokenizer

_FORMAT = 2  # of the cache; part of its key
_SAMPLE = 128 * 2**20  # bytes of text that a tokenizer is trained on, at most
_COMPRESSED = 16 * 2**20  # bytes of held-out text that compressors are given, at most


@dataclasses.dataclass(frozen=True)
class Split:
    """One side of a corpus as a stream of tokens, of documents as `tokenizers.document` or of examples.

    Attributes:
      tokens: (tokens,), uint16 or uint32, mapped from disk.
      offsets: int64 (documents + 1,), where each document begins; the last is the length.
      num_bytes: in UTF-8 of the text that counts.
      mask: uint8 (tokens,), 1 where a token counts as a target; None: all but the first of a document.
      directory: where to keep what is computed of it; None: nowhere.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int
    mask: np.ndarray | None = None
    directory: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized source. `sha256` is of all its documents; `parts` are its sources by name, if there are several."""

    train: Split
    validation: Split
    sha256: str
    parts: dict[str, "Corpus"] = dataclasses.field(default_factory=dict)


class Source:
    """The documents of a data config, scanned once and remembered.

    Args:
      whole: hold everything out and train on nothing, for text that is only evaluated on.
    """

    def __init__(self, config: DataConfig, whole: bool = False):
        self._encoder = choice("data.kind", config.kind, ENCODERS)
        self.config = config
        self.cache = pathlib.Path(config.cache_dir or "~/.cache/llm_jax").expanduser()
        field = config.field if config.kind == "text" else ""
        self.catalog, self._records = catalog.read(config.source, field, self.cache / "scans", config.workers)
        everything = np.ones(len(self.catalog), bool)
        self.held = everything if whole else catalog.held_out(self.catalog, config.validation_fraction)
        for record in self._records:
            record.write()
        self.sha256 = self.catalog.sha256
        self.num_bytes = int(self.catalog.size.sum())
        self._key = f"{self.sha256[:24]}-{'whole' if whole else f'{config.validation_fraction:g}'}"
        if config.kind != "text":
            self._key = f"{config.kind}-{self._key}"

    def texts(self, held: bool, limit: int) -> Iterator[str]:
        """The texts of one side, in their order; a sample of documents where they have more than `limit` bytes."""
        which = np.flatnonzero(self.held == held)
        if self.catalog.size[which].sum() > limit:
            drawn = np.random.default_rng(0).permutation(which)
            which = np.sort(drawn[: max(1, np.searchsorted(np.cumsum(self.catalog.size[drawn]), limit))])
        return map(self._encoder.plain, self.catalog.texts(which))

    def tokenizer(self, config: TokenizerConfig) -> Tokenizer:
        """The tokenizer of a config, trained on the training documents (once: it is kept in the cache)."""
        kind = tokenizers.get(config.kind)
        directory = self.cache / "tokenizers" / f"{config.kind}-{config.vocab_size}-{self._key}"
        if not directory.exists():
            texts = tqdm(self.texts(False, _SAMPLE), "training the tokenizer", leave=False, disable=None)
            tokenizer = kind.train(texts, config.vocab_size)
            with _appearing(directory) as partial:
                tokenizers.save(tokenizer, partial)
        return tokenizers.load(directory)

    def corpus(self, tokenizer: Tokenizer) -> Corpus:
        """All documents as tokens, from the cache if they are there.

        Raises:
          UserError: text that cannot be encoded or has changed since it was scanned, a cache that cannot be
            written or is damaged.
        """
        directory = self.cache / "corpora" / f"{self._key}-{tokenizers.digest(tokenizer)[:24]}-{_FORMAT}"
        if not directory.exists():
            build(directory, self.catalog, self.held, tokenizer, self.config.kind, self.config.workers)
            if changed := next(filter(None, (record.changed() for record in self._records)), ""):
                shutil.rmtree(directory, ignore_errors=True)
                raise UserError(f"{changed}: changed while it was being tokenized; start again")
        (train, trained), (validation, held) = _open(directory / "train"), _open(directory / "validation")
        parts, begin = {}, 0
        for name, end in zip(self.catalog.names, self.catalog.ends, strict=True):
            # Examples up to where the source begins and ends, on the held-out side and on the other.
            place = self._encoder.examples * np.array([np.count_nonzero(self.held[:n]) for n in (begin, end)])
            other = self._encoder.examples * np.array([begin, end]) - place
            parts[name] = Corpus(_part(train, trained, *other), _part(validation, held, *place), self.sha256)
            begin = end
        return Corpus(train, validation, self.sha256, parts if len(parts) > 1 else {})

    def compressed_bits_per_byte(self) -> dict[str, float]:
        """What general compressors at their best reach on the held-out text, as one stream of bytes."""
        if self.config.kind != "text":
            return {}  # the answers alone are what a model's figure is of
        packers: dict[str, Any] = {"gzip -9": zlib.compressobj(9, wbits=31), "xz -9": lzma.LZMACompressor(preset=9)}
        sizes = dict.fromkeys(packers, 0)
        total = 0
        for text in self.texts(True, _COMPRESSED):
            total += len(text.encode())
            for name, packer in packers.items():
                sizes[name] += len(packer.compress(text.encode()))
        return {name: 8 * (sizes[name] + len(packer.flush())) / total for name, packer in packers.items()}


class _appearing:
    """A temporary directory that takes its final name, whole, when the block ends without an error."""

    def __init__(self, final: pathlib.Path):
        self.final = final

    def __enter__(self) -> pathlib.Path:
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self.partial = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=self.final.parent))
        except OSError as error:
            raise UserError(f"data.cache_dir: {self.final.parent} cannot be written ({error.strerror})") from error
        return self.partial

    def __exit__(self, kind, value, trace) -> None:
        try:
            if kind is None:
                os.rename(self.partial, self.final)
        except OSError:  # another process has finished the same work first
            if not self.final.exists():
                raise
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(value, OSError):
            raise UserError(f"data.cache_dir: {self.final.parent} cannot be written ({value.strerror})") from value


def _open(directory: pathlib.Path) -> tuple[Split, np.ndarray]:
    """A side of the cache, and the bytes of each of its documents."""
    try:
        dtype = json.loads((directory / "split.json").read_text())["dtype"]
        offsets, sizes = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("offsets", "bytes"))
        tokens = _map(directory / "tokens.bin", dtype)
        mask = _map(directory / "mask.bin", "uint8") if (directory / "mask.bin").exists() else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory.parent}: the token cache is damaged ({error}); delete this directory") from error
    if len(tokens) != offsets[-1] or (mask is not None and len(mask) != len(tokens)):
        raise UserError(f"{directory.parent}: the token cache is cut short; delete this directory")
    return Split(tokens, offsets, int(sizes.sum()), mask, directory), sizes


def _map(path: pathlib.Path, dtype: str) -> np.ndarray:
    empty = not path.stat().st_size  # which cannot be mapped
    return np.zeros(0, dtype) if empty else np.memmap(path, dtype, mode="r")


def _part(split: Split, sizes: np.ndarray, first: int, end: int) -> Split:
    """Documents `first` to `end` of a split."""
    begin, stop = split.offsets[first], split.offsets[end]
    mask = None if split.mask is None else split.mask[begin:stop]
    directory = split.directory and split.directory / f"{first}-{end}"
    num_bytes = int(sizes[first:end].sum())
    return Split(split.tokens[begin:stop], split.offsets[first : end + 1] - begin, num_bytes, mask, directory)
