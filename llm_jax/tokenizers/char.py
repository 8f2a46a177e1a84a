"""Characters as tokens: 4 special ids, then the most frequent characters of the training text."""

import collections
import json
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

from llm_jax.errors import UserError
from llm_jax.tokenizers.base import SPECIAL, BuiltInTokenizer, consecutive_spans
from llm_jax.tokenizers.byte import utf8


class CharTokenizer(BuiltInTokenizer):
    """One token per character. Characters outside the vocabulary become the unknown id, which decodes to U+FFFD."""

    kind: ClassVar[str] = "char"
    exact: ClassVar[bool] = False
    bos, eos, unk = 1, 2, 3

    def __init__(self, characters: Sequence[str]):
        self._characters = tuple(characters)
        self._ids = {c: len(SPECIAL) + i for i, c in enumerate(self._characters)}

    @property
    def vocab_size(self) -> int:
        return len(SPECIAL) + len(self._characters)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            counts.update(text)
        capacity = vocab_size - len(SPECIAL)
        if capacity < 1 or not counts:
            raise UserError(
                f"a character vocabulary of {vocab_size} ids has no room for the {len(counts)} characters of the text; "
                f"expected more than {len(SPECIAL)} ids and some text"
            )
        ranked = sorted(counts, key=lambda c: (-counts[c], c))
        return cls(sorted(ranked[:capacity]))

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return [self._ids.get(c, self.unk) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        places = (i - len(SPECIAL) for i in ids if self.unk <= i < self.vocab_size)
        return "".join(self._characters[i] if i >= 0 else "\ufffd" for i in places)

    def spans(self, text: str) -> list[tuple[int, int]]:
        return consecutive_spans(len(c.encode()) for c in text)

    def piece(self, index: int) -> str:
        return SPECIAL[index] if index < len(SPECIAL) else repr(self._characters[index - len(SPECIAL)])[1:-1]

    def files(self) -> dict[str, bytes]:
        return {"characters.json": json.dumps(self._characters).encode()}

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Self:
        return cls(json.loads(files["characters.json"]))
