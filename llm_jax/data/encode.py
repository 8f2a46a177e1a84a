"""Documents to examples: token ids, and which of them the loss counts. By `data.kind`."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from llm_jax import tokenizers
from llm_jax.tokenizers import Tokenizer


class Example(NamedTuple):
    """A sequence of its own.

    Attributes:
      ids: token ids.
      mask: 1 where a token counts as a target, by position; empty where all do.
      size: bytes in UTF-8 of the text that counts.
    """

    ids: Sequence[int]
    mask: bytes
    size: int


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How the texts of documents become examples.

    Attributes:
      encode: (tokenizer, texts) -> `examples` examples of each text, in the order of the texts.
      plain: the text of a document as a tokenizer is trained on it.
      masks: whether some tokens do not count.
      examples: of one document.
    """

    encode: Callable[[Tokenizer, Iterable[str]], Iterator[Example]]
    plain: Callable[[str], str]
    masks: bool
    examples: int = 1


def _documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Example]:
    for text in texts:
        yield Example(tokenizers.document(tokenizer, text), b"", len(text.encode()))


ENCODERS = {"text": Encoder(_documents, str, masks=False)}
