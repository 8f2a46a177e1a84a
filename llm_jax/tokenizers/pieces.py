"""BPE and unigram vocabularies by sentencepiece (Kudo and Richardson 2018, arXiv:1808.06226), with byte fallback."""

import functools
import io
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import sentencepiece

from llm_jax.errors import UserError
from llm_jax.tokenizers.base import SPECIAL, BuiltInTokenizer, VocabularyTooLarge, consecutive_spans
from llm_jax.tokenizers.byte import utf8
from llm_jax.tokenizers.sentencepiece_json import (
    NORMAL,
    SCORE_UNIT,
    SPACE,
    USER_DEFINED,
    proto,
    user_defined_score,
)

_SMALLEST = len(SPECIAL) + 256 + 1
# Sentences end at line breaks, so that no merge contains one: frequent ones are added as symbols.
_BREAKS = ("\t", *("\n" * n + " " * indent for n in (1, 2) for indent in (0, 4, 8, 12, 16)))
_SENTENCE_BYTES = 4096
_SENTENCES = 1_000_000  # the largest number of lines that a vocabulary is trained on
# sentencepiece's message about an impossible size -> ours; its own advice names options that do not exist here.
_SIZES = (
    (re.compile(r"Please set it to a value <= (\d+)"), "larger than this text allows, which is {}"),
    (re.compile(r"\d+ vs (\d+)"), "smaller than the characters of this text need, which is {}"),
)
_SPECIAL_OPTIONS: dict[str, Any] = {f"{name.strip('<>')}_id": i for i, name in enumerate(SPECIAL)} | {
    f"{name.strip('<>')}_piece": name for name in SPECIAL
}


class _TooLarge(UserError):
    """More ids than the text allows."""


def sample(lines: Iterable[str], count: int) -> list[str]:
    """A uniform sample of `count` lines, or all of fewer: a reservoir (Vitter 1985, algorithm R) with a fixed seed.

    sentencepiece's own sampling gives a different vocabulary in every process.
    """
    generator, reservoir = random.Random(0), []
    for i, line in enumerate(lines):
        if i < count:
            reservoir.append(line)
        elif (place := generator.randrange(i + 1)) < count:
            reservoir[place] = line
    return reservoir


def _trained(kind: str, sentences: list[str], vocab_size: int, **options: Any) -> bytes:
    """The serialized model. Raises UserError for a size that the text does not allow, `_TooLarge` for a large one."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,  # rarer characters are encoded as bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=list(_BREAKS),
            max_sentence_length=_SENTENCE_BYTES,
            num_threads=1,
            minloglevel=2,
            **_SPECIAL_OPTIONS,
            **options,
        )
    except (RuntimeError, OSError) as error:
        message = str(error).strip().splitlines()[-1]
        matches = ((pattern.search(message), reason) for pattern, reason in _SIZES)
        default = f"not possible with this text ({message})"
        reason = next((reason.format(match[1]) for match, reason in matches if match), default)
        form = _TooLarge if _SIZES[0][0].search(message) else UserError
        raise form(f"a {kind} vocabulary of {vocab_size} is {reason}") from error
    return model.getvalue()


def _with_exact_scores(model: bytes) -> bytes:
    """A unigram model whose scores are multiples of `SCORE_UNIT`, those of user-defined pieces included.

    Two segmentations of the same pieces then have equal scores in any order of addition and in any precision, so that
    the `tokenizers` library chooses the same one as sentencepiece.
    """
    p = proto.ModelProto.FromString(model)
    highest = max(x.score for x in p.pieces if x.type == NORMAL)
    for x in p.pieces:
        if x.type == USER_DEFINED and " " not in x.piece:
            x.type, x.score = NORMAL, user_defined_score(x.piece, highest)
        x.score = round(x.score / SCORE_UNIT) * SCORE_UNIT
    return p.SerializeToString()


class BpeTokenizer(BuiltInTokenizer):
    """Merges of characters, the most frequent pair first (Sennrich et al. 2016, arXiv:1508.07909)."""

    kind: ClassVar[str] = "bpe"
    exact: ClassVar[bool] = True
    bos, eos, unk = 1, 2, None  # characters without a piece are encoded as bytes

    def __init__(self, model: bytes):
        self._model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"the sentencepiece model cannot be read: {error}") from error
        self._space = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @property
    def vocab_size(self) -> int:
        return self._pieces.vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        if vocab_size < _SMALLEST + len(_BREAKS):
            raise UserError(
                f"a {cls.kind} vocabulary of {vocab_size} is too small; the special ids, bytes and "
                f"line breaks take {_SMALLEST + len(_BREAKS)}"
            )
        lines = (
            line[i : i + _SENTENCE_BYTES // 4]
            for text in texts
            for line in text.splitlines()
            for i in range(0, len(line), _SENTENCE_BYTES // 4)
        )
        if not (sentences := sample(lines, _SENTENCES)):
            raise UserError(f"no {cls.kind} vocabulary can be trained: the text is empty")
        try:
            return cls._trained_on(sentences, vocab_size, hard_vocab_limit=True)
        except _TooLarge as error:
            largest = functools.partial(cls._trained_on, sentences, vocab_size, hard_vocab_limit=False)
            raise VocabularyTooLarge(str(error), largest) from error

    @classmethod
    def _trained_on(cls, sentences: list[str], vocab_size: int, **options: Any) -> Self:
        tokenizer = cls(cls._model_of(sentences, vocab_size, **options))
        if tokenizer._pieces.piece_to_id(SPACE) == tokenizer._pieces.unk_id():
            # Spaces are too rare in the text to have a piece, and their bytes would be those of SPACE itself.
            tokenizer = cls(cls._model_of(sentences, vocab_size, required_chars=SPACE, **options))
        return tokenizer

    @classmethod
    def _model_of(cls, sentences: list[str], vocab_size: int, **options: Any) -> bytes:
        return _trained(cls.kind, sentences, vocab_size, **options)

    def encode(self, text: str) -> list[int]:
        utf8(text)
        # In pieces SPACE represents a space, so the character itself is encoded as bytes.
        first, *others = self._pieces.encode(text.split(SPACE))
        return first + [i for ids in others for i in self._space + ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.decode([int(i) for i in ids if len(SPECIAL) <= i < self.vocab_size])

    def spans(self, text: str) -> list[tuple[int, int]]:
        ids = self.encode(text)
        return consecutive_spans(
            1 if self._pieces.is_byte(i) else len(_text(self._pieces.id_to_piece(i)).encode()) for i in ids
        )

    def piece(self, index: int) -> str:
        return _text(self._pieces.id_to_piece(int(index))).replace("\n", "\\n").replace("\t", "\\t")

    def files(self) -> dict[str, bytes]:
        return {f"{self.kind}.model": self._model}

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Self:
        return cls(files[f"{cls.kind}.model"])


class UnigramTokenizer(BpeTokenizer):
    """The most likely segmentation under a unigram model of pieces (Kudo 2018, arXiv:1804.10959)."""

    kind: ClassVar[str] = "unigram"

    @classmethod
    def _model_of(cls, sentences: list[str], vocab_size: int, **options: Any) -> bytes:
        return _with_exact_scores(super()._model_of(sentences, vocab_size, **options))


def _text(piece: str) -> str:
    return piece.replace(SPACE, " ")
