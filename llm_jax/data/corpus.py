"""A corpus as tokens: every document tokenized once, into files that are mapped and not read."""

import dataclasses
import json
import lzma
import pathlib
import shutil
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from llm_jax import tokenizers
from llm_jax.data import catalog, split
from llm_jax.data.build import build
from llm_jax.data.encode import ENCODERS
from llm_jax.errors import UserError
from llm_jax.files import new_directory
from llm_jax.schema import DataConfig, TokenizerConfig, choice
from llm_jax.tokenizers import Tokenizer

FORMAT = 3  # of the cache; part of its key
_SAMPLE = 128 * 2**20  # bytes of text that a tokenizer is trained on, at most
_COMPRESSED = 16 * 2**20  # bytes of held-out text that compressors are given, at most


@dataclasses.dataclass(frozen=True)
class Split:
    """One side of a corpus as a stream of tokens, of documents as `tokenizers.document` or of examples.

    Attributes:
      tokens: (tokens,), uint16 or uint32, mapped from disk.
      offsets: int64 (documents + 1,), where each document begins, and the end. Of a part of a stream they are
        places in that stream: the first is where `tokens` begin.
      num_bytes: in UTF-8 of the text that counts.
      mask: uint8 (tokens,), 1 where a token counts as a target; None: all but the first of a document.
      directory: where to keep what is computed of it; None: nowhere.
      choices: token ids of the possible answers, where the examples are questions with a few of them; (): they are not.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int
    mask: np.ndarray | None = None
    directory: pathlib.Path | None = None
    choices: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized source.

    Attributes:
      sha256: of all its documents.
      parts: its sources by name, if there are several.
      test: examples with choices, on which accuracy is measured after training; None: there are none.
    """

    train: Split
    validation: Split
    sha256: str
    parts: dict[str, "Corpus"] = dataclasses.field(default_factory=dict)
    test: Split | None = None


class Source:
    """The documents of a data config, scanned once and remembered.

    Args:
      whole: hold everything out and train on nothing, for text that is only evaluated on.
    """

    def __init__(self, config: DataConfig, whole: bool = False):
        self._encoder = choice("data.kind", config.kind, ENCODERS)
        self.config = config
        self.cache = cache_directory(config)
        field = config.field if config.kind == "text" else ""
        self.catalog, self._records = catalog.read(config.source, field, self.cache / "scans", config.workers)
        self.held = split.EVERYTHING if whole else split.held_out(self.catalog, config.validation_fraction)
        for record in self._records:
            record.write()
        self.sha256 = self.catalog.sha256
        self.num_bytes = self.catalog.num_bytes()
        self._key = f"{self.sha256[:24]}-{'whole' if whole else f'{config.validation_fraction:g}'}"
        if config.kind != "text":
            self._key = f"{config.kind}-{self._key}"

    def texts(self, held: bool, limit: int) -> Iterator[str]:
        """The texts of one side, in their order; a sample of documents where they have more than `limit` bytes.

        The list of them takes memory by document, 4 bytes up to 4 billion, and twice that while it is made.
        """
        found, total = [], 0
        for which in self.catalog.blocks():
            records = self.catalog[which]
            chosen = self.held(records) == held
            found.append(which[chosen].astype(np.min_scalar_type(len(self.catalog))))
            total += int(records["size"][chosen].sum())
        which = np.concatenate(found)
        if total > limit:
            np.random.default_rng(0).shuffle(which)
            which = np.sort(which[: max(1, self._fitting(which, limit))])
        return map(self._encoder.plain, self.catalog.texts(which))

    def _fitting(self, which: np.ndarray, limit: int) -> int:
        """How many of these documents, from the first on, have less than `limit` bytes together."""
        count = total = 0
        for some in catalog.slices(0, len(which)):
            ends = total + np.cumsum(self.catalog[which[some]]["size"])
            count += (fit := int(np.searchsorted(ends, limit)))
            if fit < len(ends):
                break
            total = int(ends[-1])
        return count

    def tokenizer(self, config: TokenizerConfig) -> Tokenizer:
        """The tokenizer of a config, trained on the training documents (once: it is kept in the cache)."""
        return trained_tokenizer(self.cache, self._key, config, self.texts(False, _SAMPLE))

    def corpus(self, tokenizer: Tokenizer) -> Corpus:
        """All documents as tokens, from the cache if they are there.

        Raises:
          UserError: text that cannot be encoded or has changed since it was scanned, a cache that cannot be
            written or is damaged.
        """
        directory = self.cache / "corpora" / f"{self._key}-{tokenizers.digest(tokenizer)[:24]}-{FORMAT}"
        if not directory.exists():
            build(directory, self.catalog, self.held, tokenizer, self.config.kind, self.config.workers)
            if changed := next(filter(None, (record.changed() for record in self._records)), ""):
                shutil.rmtree(directory, ignore_errors=True)
                raise UserError(f"{changed}: changed while it was being tokenized; start again")
        (train, trained), (validation, held) = open_split(directory / "train"), open_split(directory / "validation")
        parts: dict[str, Corpus] = {}
        if len(self.catalog.names) == 1:
            return Corpus(train, validation, self.sha256, parts)
        # Examples up to where the sources begin and end, on the held-out side and on the other.
        ends = np.array([0, *self.catalog.ends])
        place = np.zeros_like(ends)
        for which in self.catalog.blocks():
            place += np.searchsorted(which[self.held(self.catalog[which])], ends)
        trained_ends = self._example_ends(directory / "train", ends - place)
        held_ends = self._example_ends(directory / "validation", place)
        for i, name in enumerate(self.catalog.names):
            sides = _part(train, trained, *trained_ends[i : i + 2]), _part(validation, held, *held_ends[i : i + 2])
            parts[name] = Corpus(*sides, self.sha256)
        return Corpus(train, validation, self.sha256, parts)

    def _example_ends(self, directory: pathlib.Path, documents: np.ndarray) -> np.ndarray:
        """The number of examples of a side's first documents, for each of these numbers of documents."""
        documents = self._encoder.examples * documents
        if not (directory / "ends.npy").exists():
            return documents
        # Some documents have more examples: the indices after the last example of each.
        ends = np.concatenate([[0], 1 + np.flatnonzero(np.load(directory / "ends.npy", mmap_mode="r"))])
        return ends[documents]

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


def cache_directory(config: DataConfig) -> pathlib.Path:
    """The directory of tokenized corpora and trained tokenizers."""
    return pathlib.Path(config.cache_dir or "~/.cache/llm_jax").expanduser()


def trained_tokenizer(cache: pathlib.Path, key: str, config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of a config, trained on `texts`, or read from the cache if it is in it under `key`.

    Raises:
      UserError: an unknown kind, or one that cannot be trained on these texts; a cache that cannot be written.
    """
    kind = tokenizers.get(config.kind)
    directory = cache / "tokenizers" / f"{config.kind}-{config.vocab_size}-{key}"
    if not directory.exists():
        tokenizer = kind.train(tqdm(texts, "training the tokenizer", leave=False, disable=None), config.vocab_size)
        with new_directory(directory, source=f"data.cache_dir: {directory.parent}", exist_ok=True) as partial:
            tokenizers.save(tokenizer, partial)
    return tokenizers.load(directory)


def write_split(directory: pathlib.Path, split: Split) -> None:
    """Writes a split of examples in memory in the form that `open_split` reads."""
    assert split.mask is not None
    directory.mkdir(parents=True)
    dtype = np.dtype(np.uint16 if split.tokens.max(initial=0) < 2**16 else np.uint32)
    split.tokens.astype(dtype).tofile(directory / "tokens.bin")
    split.mask.astype(np.uint8).tofile(directory / "mask.bin")
    np.save(directory / "offsets.npy", split.offsets)
    np.save(directory / "bytes.npy", np.array([split.num_bytes], np.int64))
    (directory / "split.json").write_text(json.dumps({"dtype": dtype.name}))


def open_split(directory: pathlib.Path) -> tuple[Split, np.ndarray]:
    """A side of the cache, and the bytes of each of its documents."""
    try:
        dtype = json.loads((directory / "split.json").read_text())["dtype"]
        offsets, sizes = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("offsets", "bytes"))
        tokens = catalog.mapped(directory / "tokens.bin", dtype)
        mask = catalog.mapped(directory / "mask.bin", np.uint8) if (directory / "mask.bin").exists() else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory.parent}: the token cache is damaged ({error}); delete this directory") from error
    if len(tokens) != offsets[-1] or (mask is not None and len(mask) != len(tokens)):
        raise UserError(f"{directory.parent}: the token cache is cut short; delete this directory")
    return Split(tokens, offsets, int(sizes.sum()), mask, directory), sizes


def _part(split: Split, sizes: np.ndarray, first: int, end: int) -> Split:
    """Documents `first` to `end` of a split."""
    begin, stop = split.offsets[[first, end]] - split.offsets[0]
    mask = None if split.mask is None else split.mask[begin:stop]
    directory = split.directory and split.directory / f"{first}-{end}"
    num_bytes = int(sizes[first:end].sum())
    return Split(split.tokens[begin:stop], split.offsets[first : end + 1], num_bytes, mask, directory)
