"""Rows with hidden tokens that are to be found again (Devlin et al. 2019, BERT, arXiv:1810.04805, section 3.1).

`loss.masked` says what is hidden with the probability `loss.mask_prob`: "tokens", each by itself, or "words", all
pieces of one together. Of the chosen tokens 80 % become the mask, 10 % a random token and 10 % stay as they are; they
alone count. BOS, EOS and the unknown id are never chosen.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from llm_jax.data.corpus import Split
from llm_jax.data.rows import Row
from llm_jax.schema import LossConfig
from llm_jax.tokenizers import Tokenizer

_MASK, _RANDOM = 0.8, 0.1  # shares of the chosen tokens that become the mask, and a random token


def mask_id(tokenizer: Tokenizer) -> int:
    """The id that hides a token: the tokenizer's own, or the first that it does not have."""
    own = getattr(tokenizer, "mask", None)
    return tokenizer.vocab_size if own is None else own


def vocab_size(config: LossConfig, tokenizer: Tokenizer) -> int:
    """The ids that a model has to have."""
    hides = config.masked != "none"
    return max(tokenizer.vocab_size, mask_id(tokenizer) + 1) if hides else tokenizer.vocab_size


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What hiding must know of the ids.

    Attributes:
      mask: see `mask_id`.
      ordinary: int32, the ids that stand for text.
      begins, ends: bool (ids of the tokenizer,), whether the text of an id begins and ends inside a word. Two tokens
        are of one word where the first ends and the second begins so.
    """

    mask: int
    ordinary: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        # After a word, where a decoder shows by a space that an id begins another.
        before = tokenizer.encode("a")
        skip = len(tokenizer.decode(before))
        texts = [tokenizer.decode([*before, i])[skip:] for i in range(tokenizer.vocab_size)]
        ordinary = [i for i, text in enumerate(texts) if text and i != tokenizer.unk]
        return cls(
            mask_id(tokenizer),
            np.array(ordinary, np.int32),
            np.array([_in_word(text[:1]) for text in texts]),
            np.array([_in_word(text[-1:]) for text in texts]),
        )

    @functools.cached_property
    def hideable(self) -> np.ndarray:
        """bool (ids,), whether an id stands for text."""
        return np.isin(np.arange(len(self.begins)), self.ordinary)


def _in_word(character: str) -> bool:
    """Letters, digits and their marks; U+FFFD is a part of a character that is spelled out in bytes."""
    return bool(character) and (unicodedata.category(character)[0] in "LNM" or character in "_\ufffd")


@dataclasses.dataclass(frozen=True)
class Masked:
    """Rows whose inputs are their tokens, some hidden, and whose targets are the tokens at the same places.

    What is hidden is a function of (seed, index): another choice whenever a row comes again in a shuffled stream.
    """

    rows: Any  # of `data.rows`, of the kind "text"
    vocabulary: Vocabulary
    words: bool
    share: float
    seed: int

    @property
    def seq_len(self) -> int:
        return self.rows.seq_len

    @property
    def split(self) -> Split:
        return self.rows.split

    @property
    def bytes_per_target(self) -> float:
        """Of all the text over all its tokens: what is made of it is about the hidden text, not exactly."""
        return self.rows.bytes_per_target

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row, v = self.rows[index], self.vocabulary
        rng, tokens = np.random.default_rng((self.seed, index)), row["inputs"]
        units = np.arange(len(tokens))
        if self.words:
            goes_on = v.ends[tokens[:-1]] & v.begins[tokens[1:]] & (row["segments"][1:] == row["segments"][:-1])
            units[1:] -= np.cumsum(goes_on)
        drawn = rng.random(len(tokens)) < self.share
        chosen = drawn[units] & v.hideable[tokens] & (row["segments"] > 0)
        fate, random = rng.random(len(tokens)), rng.choice(v.ordinary, len(tokens))
        hidden = np.where(fate < _MASK, v.mask, np.where(fate < _MASK + _RANDOM, random, tokens))
        inputs = np.where(chosen, hidden, tokens).astype(np.int32)
        return row | {"inputs": inputs, "targets": tokens, "mask": chosen.astype(np.int32)}


def hider(config: LossConfig, tokenizer: Tokenizer) -> Callable[[Any, int], Any]:
    """(rows, seed) -> the rows as `loss.masked` hides their tokens, or the same rows."""
    if config.masked == "none":
        return lambda rows, seed: rows
    vocabulary = Vocabulary.of(tokenizer)
    return lambda rows, seed: Masked(rows, vocabulary, config.masked == "words", config.mask_prob, seed)
