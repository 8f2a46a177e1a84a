"""Bytes of UTF-8 as tokens: 3 special ids, then the 256 bytes."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

from llm_jax.errors import UserError
from llm_jax.tokenizers.base import SPECIAL, BuiltInTokenizer, consecutive_spans

_FIRST = 3


def utf8(text: str) -> bytes:
    """The UTF-8 of `text`. Raises UserError for other types, and with the position of an unpaired surrogate."""
    try:
        return text.encode()
    except AttributeError as error:
        raise UserError(f"a text is a {type(text).__name__}; expected a str (encode texts one by one)") from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"text has an unpaired surrogate at character {error.start}; UTF-8 cannot represent it"
        ) from error


class ByteTokenizer(BuiltInTokenizer):
    """One token per byte."""

    kind: ClassVar[str] = "byte"
    exact: ClassVar[bool] = True
    vocab_size = _FIRST + 256
    bos, eos, unk = 1, 2, None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        return cls()

    def encode(self, text: str) -> list[int]:
        return [_FIRST + b for b in utf8(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - _FIRST for i in ids if _FIRST <= i < self.vocab_size).decode(errors="replace")

    def spans(self, text: str) -> list[tuple[int, int]]:
        return consecutive_spans(1 for _ in utf8(text))

    def piece(self, index: int) -> str:
        return SPECIAL[index] if index < _FIRST else repr(bytes([index - _FIRST]))[2:-1]

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Self:
        return cls()
