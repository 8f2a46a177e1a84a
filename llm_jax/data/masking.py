"""Rows for masked language modelling (Devlin et al. 2019, BERT, arXiv:1810.04805, section 3.1).

`loss.masked` selects the units that are masked with probability `loss.mask_prob`: single "tokens", or whole "words". Of
the selected tokens, 80 % are replaced by the mask token and 10 % by a random token; 10 % are unchanged. Only selected
tokens are targets. BOS, EOS and the unknown token are never selected.
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
    """The id of the mask token: the tokenizer's, or the first id after its vocabulary."""
    own = getattr(tokenizer, "mask", None)
    return tokenizer.vocab_size if own is None else own


def vocab_size(config: LossConfig, tokenizer: Tokenizer) -> int:
    """The number of ids that a model needs: those of the tokenizer, and the mask token if tokens are masked."""
    masked = config.masked != "none"
    return max(tokenizer.vocab_size, mask_id(tokenizer) + 1) if masked else tokenizer.vocab_size


@dataclasses.dataclass(frozen=True)
class MaskingVocabulary:
    """The properties of token ids that masking depends on.

    Attributes:
      mask: see `mask_id`.
      ordinary: int32 (n,), the ids that stand for text.
      begins, ends: bool (vocab_size,), whether the text of an id begins and ends with a character of a word. Two
        neighbouring tokens belong to one word if the first ends and the second begins so.
    """

    mask: int
    ordinary: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        # Decoded after a word, an id that begins another word begins with a space.
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
    def maskable(self) -> np.ndarray:
        """bool (vocab_size,), whether an id stands for text."""
        return np.isin(np.arange(len(self.begins)), self.ordinary)


def _in_word(character: str) -> bool:
    """Whether a character is a letter, digit or mark, or U+FFFD, which is part of a character encoded in bytes."""
    return bool(character) and (unicodedata.category(character)[0] in "LNM" or character in "_\ufffd")


@dataclasses.dataclass(frozen=True)
class Masked:
    """Rows whose inputs are masked tokens, and whose targets are the tokens at the same positions.

    The masked positions are a function of (seed, index), so that they differ when a row is repeated in a stream.

    Attributes:
      rows: rows of the kind "text", or a stream of them.
      words: whether whole words are chosen instead of tokens.
      mask_prob: the probability that a unit is chosen.
    """

    rows: Any
    vocabulary: MaskingVocabulary
    words: bool
    mask_prob: float
    seed: int

    @property
    def seq_len(self) -> int:
        return self.rows.seq_len

    @property
    def split(self) -> Split:
        return self.rows.split

    @property
    def bytes_per_target(self) -> float:
        """Bytes of the whole text divided by the number of its tokens; approximates the value for masked tokens."""
        return self.rows.bytes_per_target

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row, v = self.rows[index], self.vocabulary
        rng, tokens = np.random.default_rng((self.seed, index)), row["inputs"]
        units = np.arange(len(tokens))
        if self.words:
            continues = v.ends[tokens[:-1]] & v.begins[tokens[1:]] & (row["segments"][1:] == row["segments"][:-1])
            units[1:] -= np.cumsum(continues)
        drawn = rng.random(len(tokens)) < self.mask_prob
        chosen = drawn[units] & v.maskable[tokens] & (row["segments"] > 0)
        uniform, random = rng.random(len(tokens)), rng.choice(v.ordinary, len(tokens))
        replacements = np.where(uniform < _MASK, v.mask, np.where(uniform < _MASK + _RANDOM, random, tokens))
        inputs = np.where(chosen, replacements, tokens).astype(np.int32)
        return row | {"inputs": inputs, "targets": tokens, "mask": chosen.astype(np.int32)}


def row_masker(config: LossConfig, tokenizer: Tokenizer) -> Callable[[Any, int], Any]:
    """Returns a function (rows, seed) -> rows masked by `loss.masked`."""
    if config.masked == "none":
        return lambda rows, seed: rows
    vocabulary = MaskingVocabulary.of(tokenizer)
    return lambda rows, seed: Masked(rows, vocabulary, config.masked == "words", config.mask_prob, seed)
