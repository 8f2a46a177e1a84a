"""A text as tokenizers split it into tokens."""

import dataclasses
import shutil
from collections.abc import Mapping

import numpy as np

from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Panel, Passage, Picture, Table
from llm_jax.tokenizers import Tokenizer, token_text
from llm_jax.tokenizers.byte import utf8

_LEGEND = "colours alternate from token to token; unknown text has the strongest colour"


@dataclasses.dataclass(frozen=True)
class TokenSplits(Drawable):
    """The tokens of a text by several tokenizers.

    Attributes:
      source: the text.
      tokenizers: by the names that they are shown with.
      with_ids: whether a table of ids, byte spans and texts is shown.
    """

    source: str
    tokenizers: Mapping[str, Tokenizer]
    with_ids: bool = False

    def summary(self, name: str) -> str:
        """Kind, size and number of tokens of a tokenizer in one line."""
        tokenizer = self.tokenizers[name]
        ids = tokenizer.encode(self.source)
        unknown = sum(i == tokenizer.unk for i in ids)
        return (
            f"{name}: {tokenizer.kind}, {tokenizer.vocab_size:,} ids; {len(ids)} tokens, "
            f"{len(ids) / max(1, len(self.source.split())):.2f} a word, {unknown} unknown"
        )

    def text(self, color: bool = False) -> str:
        painted = (token_text.colored(self.source, tokenizer, color) for tokenizer in self.tokenizers.values())
        parts = [f"{self.summary(name)}\n{text}\n" for name, text in zip(self.tokenizers, painted, strict=True)]
        if self.with_ids:
            columns = [[name, *token_text.table(self.source, tokenizer)] for name, tokenizer in self.tokenizers.items()]
            width = max(30, shutil.get_terminal_size().columns // len(columns) - 3)
            parts.append(token_text.side_by_side(columns, width))
        return "\n".join(parts)

    def picture(self) -> Picture:
        panels: list[Panel] = []
        for name, tokenizer in self.tokenizers.items():
            parts = list(token_text.parts(self.source, tokenizer))
            values = [2.0 if index == tokenizer.unk else (-1.0) ** k for k, (_, _, index, _) in enumerate(parts)]
            hints = tuple(f"id {index}, bytes {begin}-{end}" for _, _, index, (begin, end) in parts)
            tokens = tuple(between + own for between, own, _, _ in parts)
            panels.append(Passage(self.summary(name), tokens, np.array(values), "", 2.0, _LEGEND, hints))
            if self.with_ids:
                rows = tuple((index, f"{begin}-{end}", f"'{own}'") for _, own, index, (begin, end) in parts)
                panels.append(Table(f"tokens of {name}", ("id", "bytes", "text"), rows))
        return Picture("Tokens", tuple(panels))


def tokens(tokenizers: Tokenizer | Mapping[str, Tokenizer], text: str, ids: bool = False) -> TokenSplits:
    """Splits a text into tokens.

    Args:
      tokenizers: one, or several by name.
      ids: whether to show a table of ids, byte spans and texts too.

    Raises:
      UserError: unpaired surrogates in the text.
    """
    utf8(text)
    by_name = tokenizers if isinstance(tokenizers, Mapping) else {tokenizers.kind: tokenizers}
    return TokenSplits(text, by_name, ids)
