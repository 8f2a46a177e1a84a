"""Word, WordPiece, character-level BPE and byte-level BPE vocabularies by the `tokenizers` library.

A token includes the space before it, so that the concatenation of tokens is the text. Text outside the vocabulary
becomes the unknown id, which decodes to U+FFFD; byte-level BPE represents all text.
"""

import collections
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import tokenizers as library

from llm_jax.errors import UserError
from llm_jax.tokenizers.base import SPECIAL, BuiltInTokenizer, VocabularyTooLarge, byte_spans, consecutive_spans
from llm_jax.tokenizers.byte import utf8

_HYPHENATED = r" ?\w+(?:[-'’]\w+)*| ?[^\w\s]|\s"  # "Fine-tuning" is one word
_SEPARATED = r" ?\w+| ?[^\w\s]|\s"  # every punctuation mark is a token of its own
# Ideographs are words of their own, as in BERT (BasicTokenizer._is_chinese_char in its tokenization.py).
_IDEOGRAPHS = (
    r"\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2CEAF}\x{2F800}-\x{2FA1F}"
)
_WORD_LENGTH = 100  # in characters: the library takes a longer word as unknown
_PIECED = (
    rf" ?[{_IDEOGRAPHS}]| ?[\w&&[^{_IDEOGRAPHS}]]{{1,{_WORD_LENGTH - 1}}}| ?[^\w\s]|\s"  # words that become pieces
)
CONTINUES = "##"  # begins a WordPiece that does not begin a word
_UNKNOWN = SPECIAL[3]


class WordTokenizer(BuiltInTokenizer):
    """The most frequent words, hyphenated ones whole, and punctuation marks."""

    kind: ClassVar[str] = "word"
    exact: ClassVar[bool] = False
    bos: ClassVar[int] = 1
    eos: ClassVar[int] = 2
    unk: ClassVar[int | None] = 3

    def __init__(self, text: str):
        try:
            self._tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"the {self.kind} vocabulary cannot be read ({error})") from error
        self._text = text
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token is text
        self._pieces = [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        self._bytes = [b"" if i < len(SPECIAL) else self._bytes_of(piece) for i, piece in enumerate(self._pieces)]
        if self.unk is not None:
            self._bytes[self.unk] = "\ufffd".encode()

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        corpus = list(texts)
        model, trainer = cls._untrained(corpus, vocab_size)
        model.train_from_iterator(corpus, trainer, length=len(corpus))
        model = _with_special_only(model)
        tokenizer = cls(model.to_str())
        if (size := tokenizer.vocab_size) != vocab_size:
            message = f"tokenizer.vocab_size is {vocab_size}; this text gives a {cls.kind} vocabulary of {size} ids, "
            raise VocabularyTooLarge(message + f"{len(SPECIAL)} special ones included", lambda: tokenizer)
        return tokenizer

    @classmethod
    def _untrained(cls, texts: Sequence[str], vocab_size: int) -> tuple[library.Tokenizer, Any]:
        """The tokenizer without a vocabulary, and its trainer."""
        if vocab_size <= len(SPECIAL):
            raise UserError(f"a word vocabulary of {vocab_size} is too small; the special ids take {len(SPECIAL)}")
        model = library.Tokenizer(library.models.WordLevel(unk_token=_UNKNOWN))
        model.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(_HYPHENATED), "isolated")
        return model, library.trainers.WordLevelTrainer(vocab_size=vocab_size, **_TRAINER_OPTIONS)

    @classmethod
    def _bytes_of(cls, piece: str) -> bytes:
        return piece.encode()

    def encode(self, text: str) -> list[int]:
        utf8(text)
        # Without offsets, which take a quarter of the time.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes[i] for i in ids if 0 <= i < len(self._bytes)).decode(errors="replace")

    def spans(self, text: str) -> list[tuple[int, int]]:
        utf8(text)
        return byte_spans(text, self._tokenizer.encode(text, add_special_tokens=False).offsets)

    def piece(self, index: int) -> str:
        if index < len(SPECIAL):
            return SPECIAL[index]
        return repr(self._pieces[index])[1:-1]

    def files(self) -> dict[str, bytes]:
        return {f"{self.kind}.json": self._text.encode()}

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Self:
        return cls(files[f"{cls.kind}.json"].decode())


class WordPieceTokenizer(WordTokenizer):
    """The longest piece first, from the left (Wu et al. 2016, arXiv:1609.08144; as in BERT).

    Every character outside the alphabet is one unknown id. Vocabularies that version 0.1.0 trained have one for every
    word with such a character; their file states how they split text.
    """

    kind: ClassVar[str] = "wordpiece"

    @classmethod
    def _untrained(cls, texts: Sequence[str], vocab_size: int) -> tuple[library.Tokenizer, Any]:
        alphabet = _alphabet(cls.kind, texts, (vocab_size - len(SPECIAL)) // 2)
        # In a fixed order: the library numbers continuations as it meets them, which differs from run to run.
        tokens = [*SPECIAL, *(CONTINUES + c for c in sorted(alphabet))]
        model = library.Tokenizer(library.models.WordPiece(unk_token=_UNKNOWN, continuing_subword_prefix=CONTINUES))
        patterns = (f"[^{_ranges(alphabet)}]", _PIECED)
        splits = [library.pre_tokenizers.Split(library.Regex(pattern), "isolated") for pattern in patterns]
        model.pre_tokenizer = library.pre_tokenizers.Sequence(splits)
        return model, library.trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            continuing_subword_prefix=CONTINUES,
            **_TRAINER_OPTIONS | {"special_tokens": tokens},
        )

    @classmethod
    def _bytes_of(cls, piece: str) -> bytes:
        return piece.removeprefix(CONTINUES).encode()


class CharBpeTokenizer(WordTokenizer):
    """Merges of characters within words (Sennrich et al. 2016, arXiv:1508.07909); rare characters are unknown."""

    kind: ClassVar[str] = "char_bpe"

    @classmethod
    def _untrained(cls, texts: Sequence[str], vocab_size: int) -> tuple[library.Tokenizer, Any]:
        alphabet = _alphabet(cls.kind, texts, (vocab_size - len(SPECIAL)) // 2)
        model = library.Tokenizer(library.models.BPE(unk_token=_UNKNOWN))
        model.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(_SEPARATED), "isolated")
        return model, library.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, limit_alphabet=len(alphabet), **_TRAINER_OPTIONS
        )


class ByteBpeTokenizer(WordTokenizer):
    """Merges of the bytes of UTF-8 (Radford et al. 2019, GPT-2), within GPT-2's splitting of text."""

    kind: ClassVar[str] = "byte_bpe"
    exact: ClassVar[bool] = True
    unk: ClassVar[int | None] = None

    @classmethod
    def _untrained(cls, texts: Sequence[str], vocab_size: int) -> tuple[library.Tokenizer, Any]:
        if vocab_size < len(SPECIAL) + 256:
            smallest = len(SPECIAL) + 256
            raise UserError(
                f"a byte_bpe vocabulary of {vocab_size} is too small; special ids and bytes take {smallest}"
            )
        model = library.Tokenizer(library.models.BPE())
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        return model, library.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=list(BYTES), **_TRAINER_OPTIONS
        )

    @classmethod
    def _bytes_of(cls, piece: str) -> bytes:
        return bytes(BYTES[c] for c in piece)

    def spans(self, text: str) -> list[tuple[int, int]]:
        return consecutive_spans(len(self._bytes[i]) for i in self.encode(text))

    def piece(self, index: int) -> str:
        if index < len(SPECIAL):
            return SPECIAL[index]
        try:
            return repr(self._bytes[index].decode())[1:-1]
        except UnicodeDecodeError:
            return repr(self._bytes[index])[2:-1]


def _byte_names() -> dict[str, int]:
    """The character that represents each byte: itself if printable, else the next one from U+0100 (GPT-2)."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other_bytes = [b for b in range(256) if b not in printing]
    return {chr(b): b for b in printing} | {chr(0x100 + i): b for i, b in enumerate(other_bytes)}


BYTES = _byte_names()
_TRAINER_OPTIONS: dict[str, Any] = {"special_tokens": list(SPECIAL), "show_progress": False}


def _with_special_only(trained: library.Tokenizer) -> library.Tokenizer:
    """The tokenizer with the special tokens of `SPECIAL` and no others."""
    state = json.loads(trained.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return library.Tokenizer.from_str(json.dumps(state))


def _alphabet(kind: str, texts: Iterable[str], capacity: int) -> list[str]:
    """The `capacity` most frequent characters; the library breaks ties differently from run to run."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text)
    if capacity < 1 or not counts:
        raise UserError(f"no {kind} vocabulary can be trained: {len(counts)} characters of text, room for {capacity}")
    return sorted(counts, key=lambda c: (-counts[c], c))[:capacity]


def _ranges(characters: Iterable[str]) -> str:
    """The characters as ranges of a character class of a regular expression."""
    points = sorted(map(ord, characters))
    runs = itertools.groupby(enumerate(points), key=lambda item: item[1] - item[0])
    ends = ([point for _, point in run] for _, run in runs)
    return "".join(f"\\x{{{run[0]:X}}}-\\x{{{run[-1]:X}}}" for run in ends)
