"""A corpus as token ids: every document is tokenized once, into memory-mapped files."""

import contextlib
import dataclasses
import hashlib
import json
import lzma
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llm_jax import bars, files, tokenizers
from llm_jax.data import catalog, shared_cache, split
from llm_jax.data.build import build
from llm_jax.data.encode import ENCODERS
from llm_jax.errors import UserError
from llm_jax.schema import DataConfig, TokenizerConfig, choice
from llm_jax.tokenizers import Tokenizer

FORMAT = 5  # version of the format of the cache; part of its key
_TOKENIZERS = 2  # version of the training of tokenizers; part of the key of those in the cache
_CONVERSATIONS = 2  # version of the conversion of records to conversations; part of the key of their examples
_SAMPLE = 128 * 2**20  # maximum bytes of training text of a tokenizer
_COMPRESSED = 16 * 2**20  # maximum bytes of held-out text that are compressed


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a corpus as a stream of tokens of documents (`tokenizers.document`) or examples.

    Attributes:
      tokens: (tokens,), uint16 or uint32, mapped from disk.
      offsets: int64 (documents + 1,), where each document begins, and the end. In a part of a stream they are positions
        in the whole stream; `tokens` then begins at `offsets[0]`.
      num_bytes: bytes in UTF-8 of the text whose tokens count as targets.
      mask: uint8 (tokens,), 1 where a token counts as a target; None: all tokens but the first of a document.
      directory: where to cache arrays computed from the split; None: no cache.
      choices: token ids of the possible answers, if the examples are questions with a few of them; otherwise ().
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
      sha256: hash of all documents.
      parts: the corpora of its sources by name, if there are several.
      test: examples with choices, on which accuracy is measured after training, or None.
    """

    train: Split
    validation: Split
    sha256: str
    parts: dict[str, "Corpus"] = dataclasses.field(default_factory=dict)
    test: Split | None = None


class Source:
    """The documents of a data config, scanned once and then read from the stored scan.

    Args:
      whole: whether all text is held out, for evaluation only.
      split_single_file: whether a single text file is split into several documents.
      engine: where text is scanned and tokenized: "local", or "ray" (see `ray_engine`).

    Attributes:
      sha256: hash of all documents.
      num_bytes: bytes of all texts in UTF-8.

    Raises:
      UserError: an unknown kind of data; see `catalog.read` and `split.held_out`.
    """

    def __init__(self, config: DataConfig, whole: bool = False, split_single_file: bool = True, engine: str = "local"):
        self._encoder = choice("data.kind", config.kind, ENCODERS)
        self.config, self._engine = config, engine
        self.cache = shared_cache.directory(config.cache_dir)
        field = config.field if config.kind == "text" else ""
        self.catalog, self._scans = catalog.read(
            config.source, field, config.cache_dir, config.workers, split_single_file, engine, config.format
        )
        self.held_out = split.EVERYTHING if whole else split.held_out(self.catalog, config.validation_fraction)
        for scan in self._scans:
            scan.write()
        self.sha256 = self.catalog.sha256
        self.num_bytes = self.catalog.num_bytes()
        self._key = f"{self.sha256[:24]}-{'whole' if whole else f'{config.validation_fraction:g}'}"
        if config.kind != "text":
            self._key = f"{config.kind}-{_CONVERSATIONS}-{self._key}"
        # The hash of a single file does not depend on `split_single_file`.
        is_whole = [[file.format for file in scan.files] == ["text"] for scan in self._scans]
        if is_whole == [True]:
            self._key = f"file-{self._key}"
        elif any(is_whole):
            self._key = f"files-{hashlib.sha256(bytes(is_whole)).hexdigest()[:8]}-{self._key}"

    def texts(self, held_out: bool, limit: int) -> Iterator[str]:
        """Yields the texts of one split in order, or a sample of documents if they have more than `limit` bytes.

        For up to 4 billion documents, an index takes 4 bytes of memory, and 8 bytes while the indices are collected.
        """
        blocks, total = [], 0
        for block in self.catalog.blocks():
            records = self.catalog[block]
            chosen = self.held_out(records) == held_out
            blocks.append(block[chosen].astype(np.min_scalar_type(len(self.catalog))))
            total += int(records["size"][chosen].sum())
        indices = np.concatenate(blocks)
        if total > limit:
            np.random.default_rng(0).shuffle(indices)
            indices = np.sort(indices[: max(1, self._fitting(indices, limit))])
        return map(self._encoder.plain, self.catalog.texts(indices))

    def _fitting(self, indices: np.ndarray, limit: int) -> int:
        """The number of documents, from the first on, that have fewer than `limit` bytes together."""
        count = total = 0
        for block in catalog.slices(0, len(indices)):
            ends = total + np.cumsum(self.catalog[indices[block]]["size"])
            count += (fit := int(np.searchsorted(ends, limit)))
            if fit < len(ends):
                break
            total = int(ends[-1])
        return count

    def tokenizer(self, config: TokenizerConfig, at_most: bool = False) -> Tokenizer:
        """The tokenizer of a config, trained on the training documents or read from the cache.

        Args:
          at_most: see `trained_tokenizer`.
        """
        return trained_tokenizer(self.config.cache_dir, self._key, config, self.texts(False, _SAMPLE), at_most)

    def corpus(self, tokenizer: Tokenizer) -> Corpus:
        """All documents as tokens, from the cache if they are in it.

        Raises:
          UserError: a text cannot be encoded or has changed since it was scanned; the cache cannot be written or is
            damaged.
        """
        directory = self.cache / "corpora" / f"{self._key}-{tokenizers.digest(tokenizer)[:24]}-{FORMAT}"
        shared_cache.fetch(self.config.cache_dir, directory)
        if not directory.exists():
            kind, workers = self.config.kind, self.config.workers
            build(directory, self.catalog, self.held_out, tokenizer, kind, workers, self._engine)
            if changed := next(filter(None, (scan.changed() for scan in self._scans)), ""):
                shutil.rmtree(directory, ignore_errors=True)
                raise UserError(f"{changed}: changed while it was being tokenized; start again")
            shared_cache.publish(self.config.cache_dir, directory)
        train, train_sizes = open_split(directory / "train")
        validation, held_sizes = open_split(directory / "validation")
        parts: dict[str, Corpus] = {}
        if len(self.catalog.names) == 1:
            return Corpus(train, validation, self.sha256, parts)
        # Numbers of documents, and of examples, before each source and after the last: of all and of the held-out ones.
        ends = np.array([0, *self.catalog.source_ends])
        held = np.zeros_like(ends)
        for block in self.catalog.blocks():
            held += np.searchsorted(block[self.held_out(self.catalog[block])], ends)
        train_ends = self._example_ends(directory / "train", ends - held)
        held_ends = self._example_ends(directory / "validation", held)
        for i, name in enumerate(self.catalog.names):
            train_part = _part(train, train_sizes, *train_ends[i : i + 2])
            parts[name] = Corpus(train_part, _part(validation, held_sizes, *held_ends[i : i + 2]), self.sha256)
        return Corpus(train, validation, self.sha256, parts)

    def _example_ends(self, directory: pathlib.Path, documents: np.ndarray) -> np.ndarray:
        """The number of examples of the first documents of a split, for each of these numbers of documents."""
        documents = self._encoder.examples * documents
        if not (directory / "ends.npy").exists():
            return documents
        # Some documents have more examples: the indices after the last example of each.
        ends = np.concatenate([[0], 1 + np.flatnonzero(np.load(directory / "ends.npy", mmap_mode="r"))])
        return ends[documents]

    def compressed_bits_per_byte(self) -> dict[str, float]:
        """Bits per byte of the held-out text, compressed as one stream of bytes, without headers and check sums.

        Empty unless the kind is "text" and text is held out. Headers would dominate the figures of short texts.
        """
        if self.config.kind != "text":
            return {}  # not comparable with the bits per byte of answers alone
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
        packers: dict[str, Any] = {
            "gzip -9": zlib.compressobj(9, wbits=-15),  # raw deflate
            "xz -9": lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters),
        }
        sizes = dict.fromkeys(packers, 0)
        total = 0
        for text in self.texts(True, _COMPRESSED):
            total += len(text.encode())
            for name, packer in packers.items():
                sizes[name] += len(packer.compress(text.encode()))
        if not total:
            return {}
        return {name: 8 * (sizes[name] + len(packer.flush())) / total for name, packer in packers.items()}


def trained_tokenizer(
    cache_dir: str, key: str, config: TokenizerConfig, texts: Iterable[str], at_most: bool
) -> Tokenizer:
    """The tokenizer of a config: read from the cache if it is there under `key`, else trained on `texts`.

    Args:
      cache_dir: the option `data.cache_dir`.
      at_most: whether `config.vocab_size` is only an upper bound for texts that are too small.

    Raises:
      UserError: an unknown kind, or one that cannot be trained on these texts; a cache that cannot be written.
    """
    kind = tokenizers.get(config.kind)
    kind_name = re.sub(r"[^\w.-]+", "_", kind.kind)  # a custom class has other options
    name = f"{kind_name}-{'at-most-' if at_most else ''}{config.vocab_size}-{key}-{_TOKENIZERS}"
    directory = shared_cache.directory(cache_dir) / "tokenizers" / name
    shared_cache.fetch(cache_dir, directory)
    if not directory.exists():
        try:
            tokenizer = kind.train(bars.bar(texts, "training the tokenizer", leave=False), config.vocab_size)
        except tokenizers.VocabularyTooLarge as error:
            if not at_most:
                raise
            tokenizer = error.largest()
        with new_cache(directory) as partial:
            tokenizers.save(tokenizer, partial)
        shared_cache.publish(cache_dir, directory)
    return tokenizers.load(directory)


def new_cache(directory: pathlib.Path) -> contextlib.AbstractContextManager[pathlib.Path]:
    """A new directory of the cache; see `files.new_directory`. Keeps the directory of a process that was faster."""
    return files.new_directory(directory, source=f"data.cache_dir: {directory.parent}", exist_ok=True)


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
    """A split of the token cache, and the bytes of its documents, int64 (documents,).

    Raises:
      UserError: the cache is damaged.
    """
    try:
        dtype = json.loads((directory / "split.json").read_text())["dtype"]
        offsets, sizes = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("offsets", "bytes"))
        tokens = catalog.memory_map(directory / "tokens.bin", dtype)
        mask = catalog.memory_map(directory / "mask.bin", np.uint8) if (directory / "mask.bin").exists() else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory.parent}: the token cache is damaged ({error}); delete this directory") from error
    if len(tokens) != offsets[-1] or (mask is not None and len(mask) != len(tokens)):
        raise UserError(f"{directory.parent}: the token cache is truncated; delete this directory")
    return Split(tokens, offsets, int(sizes.sum()), mask, directory), sizes


def _part(split: Split, sizes: np.ndarray, first: int, end: int) -> Split:
    """The documents `first` to `end` of a split; `sizes` are the bytes of all of its documents."""
    begin, stop = split.offsets[[first, end]] - split.offsets[0]
    mask = None if split.mask is None else split.mask[begin:stop]
    directory = split.directory and split.directory / f"{first}-{end}"
    num_bytes = int(sizes[first:end].sum())
    return Split(split.tokens[begin:stop], split.offsets[first : end + 1], num_bytes, mask, directory)
