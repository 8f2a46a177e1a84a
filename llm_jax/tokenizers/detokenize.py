"""Incremental detokenization: the text that generated ids add to the text of their prompt.

Ids are never decoded alone. SentencePiece-like vocabularies strip the space of a first word, and byte-fallback tokens
form characters only together, so that the text of a continuation is what the text of prompt and continuation has
beyond the prompt's.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from llm_jax.tokenizers.base import Tokenizer

_BROKEN = "\ufffd"  # what decoders write for a character whose bytes are incomplete
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte-fallback token
_WINDOWS = (16, 64, 256)  # ids of the prompt that are decoded with a continuation; of a longer context if need be


@dataclasses.dataclass(frozen=True)
class Detokenizer:
    """Decodes continuations of one prompt. Build it with `after`.

    Attributes:
      tokenizer: the vocabulary.
      context: the last ids of the prompt.
      before: their text.
    """

    tokenizer: Tokenizer
    context: tuple[int, ...]
    before: str

    def text(self, ids: Sequence[int]) -> str:
        """The text of a continuation."""
        decoded = self.tokenizer.decode([*self.context, *ids])
        if decoded.startswith(self.before):
            return decoded[len(self.before) :]
        # The ids complete a character that the prompt began, or change how its last bytes are read.
        return decoded[len(common_prefix(self.before, decoded)) :]

    def stable_prefix(self, ids: Sequence[int]) -> str:
        """The longest known prefix of `text(ids)` that no later id changes.

        Left out are characters at the end whose bytes may be incomplete. Decoders of the `tokenizers` library read a
        run of byte-fallback tokens as a whole, all of it broken if any byte is: such a run is left out to its end.
        """
        text = self.text(ids)
        tokenizer: Any = self.tokenizer
        if (invalid := _invalid_byte(tokenizer)) is not None:
            text = common_prefix(text, self.text([*ids, invalid]))
        return text.rstrip(_BROKEN)


def after(tokenizer: Tokenizer, prompt: Sequence[int]) -> Detokenizer:
    """The detokenizer of continuations of `prompt`."""
    ids = tuple(int(i) for i in prompt)
    decoded = tokenizer.decode(list(ids))
    for window in _WINDOWS:
        for start in range(len(ids) - window, max(0, len(ids) - window - 4), -1):  # a character has up to 4 bytes
            context = ids[start:]
            before = tokenizer.decode(list(context))
            if before.strip() and decoded.endswith(before) and not _BYTE.fullmatch(tokenizer.piece(ids[start])):
                return Detokenizer(tokenizer, context, before)
    return Detokenizer(tokenizer, ids, decoded)


def common_prefix(a: str, b: str) -> str:
    """The longest common prefix of two texts."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


@functools.lru_cache(maxsize=8)
def _invalid_byte(tokenizer: Any) -> int | None:
    """The byte-fallback token of a byte that no UTF-8 text has, or None."""
    return next((i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == "<0xFF>"), None)
