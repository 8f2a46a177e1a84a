"""The token cache: every document tokenized once, into files that are mapped and not read."""

import dataclasses
import json
import lzma
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from llm_jax import tokenizers
from llm_jax.config import DataConfig, TokenizerConfig
from llm_jax.data import sources
from llm_jax.errors import UserError
from llm_jax.tokenizers import Tokenizer

_FORMAT = 1  # of the cache; part of its key


@dataclasses.dataclass(frozen=True)
class Split:
    """One side of a corpus as a stream of tokens: documents as `tokenizers.document`.

    Attributes:
      tokens: (tokens,), uint16 or uint32, mapped from disk.
      offsets: int64 (documents + 1,), where each document begins; the last is the length.
      num_bytes: of the text in UTF-8.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized source. `sha256` is of all its documents."""

    train: Split
    validation: Split
    sha256: str


class Source:
    """The documents of a data config, read and hashed once.

    Args:
      whole: hold everything out and train on nothing, for text that is only evaluated on.
    """

    def __init__(self, config: DataConfig, whole: bool = False):
        found = sources.documents(config.source)
        self.train, self.validation = ([], found) if whole else sources.split(found, config.validation_fraction)
        self.sha256 = sources.fingerprint(found)
        self.num_bytes = sum(d.size for d in found)
        self.cache = pathlib.Path(config.cache_dir or "~/.cache/llm_jax").expanduser()
        self._key = f"{self.sha256[:24]}-{'whole' if whole else f'{config.validation_fraction:g}'}"

    def tokenizer(self, config: TokenizerConfig) -> Tokenizer:
        """The tokenizer of a config, trained on the training documents (once: it is kept in the cache)."""
        kind = tokenizers.get(config.kind)
        directory = self.cache / "tokenizers" / f"{config.kind}-{config.vocab_size}-{self._key}"
        if not directory.exists():
            tokenizer = kind.train(
                tqdm(_texts(self.train), "training the tokenizer", leave=False, disable=None), config.vocab_size
            )
            with _appearing(directory) as partial:
                tokenizers.save(tokenizer, partial)
        return tokenizers.load(directory)

    def corpus(self, tokenizer: Tokenizer) -> Corpus:
        """All documents as tokens, from the cache if they are there."""
        directory = self.cache / "corpora" / f"{self._key}-{tokenizers.digest(tokenizer)[:24]}-{_FORMAT}"
        if not directory.exists():
            with _appearing(directory) as partial:
                for name, found in (("train", self.train), ("validation", self.validation)):
                    _write(partial / name, found, tokenizer)
        return Corpus(_open(directory / "train"), _open(directory / "validation"), self.sha256)

    def compressed_bits_per_byte(self) -> dict[str, float]:
        """What general compressors at their best reach on the held-out text, as one stream of bytes."""
        packers: dict[str, Any] = {"gzip -9": zlib.compressobj(9, wbits=31), "xz -9": lzma.LZMACompressor(preset=9)}
        sizes = dict.fromkeys(packers, 0)
        total = 0
        for text in _texts(self.validation):
            total += len(text.encode())
            for name, packer in packers.items():
                sizes[name] += len(packer.compress(text.encode()))
        return {name: 8 * (sizes[name] + len(packer.flush())) / total for name, packer in packers.items()}


def _texts(found: Sequence[sources.Document]):
    return (document.read() for document in found)


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


def _write(directory: pathlib.Path, found: Sequence[sources.Document], tokenizer: Tokenizer) -> None:
    directory.mkdir()
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    offsets, num_bytes = [0], 0
    with (
        (directory / "tokens.bin").open("wb") as file,
        tqdm(
            total=sum(d.size for d in found),
            desc=f"tokenizing {directory.name}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None,
        ) as bar,
    ):
        for document in found:
            text = document.read()
            ids = np.asarray(tokenizers.document(tokenizer, text), dtype)
            file.write(ids.tobytes())
            offsets.append(offsets[-1] + len(ids))
            num_bytes += len(text.encode())
            bar.update(document.size)
    np.save(directory / "offsets.npy", np.asarray(offsets, np.int64))
    (directory / "split.json").write_text(json.dumps({"dtype": np.dtype(dtype).name, "num_bytes": num_bytes}))


def _open(directory: pathlib.Path) -> Split:
    try:
        said = json.loads((directory / "split.json").read_text())
        offsets = np.load(directory / "offsets.npy")
        empty = not (directory / "tokens.bin").stat().st_size  # which cannot be mapped
        tokens = np.zeros(0, said["dtype"]) if empty else np.memmap(directory / "tokens.bin", said["dtype"], mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory.parent}: the token cache is damaged ({error}); delete this directory") from error
    if len(tokens) != offsets[-1]:
        raise UserError(f"{directory.parent}: the token cache is cut short; delete this directory")
    return Split(tokens, offsets, said["num_bytes"])
