"""Rows of training data as the model sees them, with the tokens that the loss counts."""

import dataclasses
from typing import Any

import numpy as np

from llm_jax import checkpoints, tokenizers
from llm_jax.data import masking, row_text
from llm_jax.data import rows as rows_lib
from llm_jax.data.kinds import open_source
from llm_jax.errors import UserError
from llm_jax.pictures import forward
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Panel, Passage, Picture
from llm_jax.schema import Config
from llm_jax.tokenizers import Tokenizer

_COUNTED, _NOT_COUNTED = ("\033[32m", "\033[36m"), "\033[90m"  # green and cyan alternate; grey
_LEGEND = "coloured tokens are targets that the loss counts"


@dataclasses.dataclass(frozen=True)
class TrainingRows(Drawable):
    """Rows and their segments.

    Attributes:
      titles: for each row, its number and its numbers of tokens, segments and targets.
      segments: for each row, its segments, each a list of (token id, whether it counts as a target).
      heads: for each row, the title of each segment.
      tokenizer: of the ids.
    """

    titles: tuple[str, ...]
    segments: tuple[list[list[tuple[int, bool]]], ...]
    heads: tuple[list[str], ...]
    tokenizer: Tokenizer

    def text(self, color: bool = False) -> str:
        lines = []
        for title, segments, heads in zip(self.titles, self.segments, self.heads, strict=True):
            lines.append(title)
            for number, (tokens, head) in enumerate(zip(segments, heads, strict=True), 1):
                lines.append(head)
                colours = (_COUNTED[number % 2], _NOT_COUNTED) if color else ("", "")
                lines += row_text.lines(self.tokenizer, tokens, colours)
        return "\n".join(lines)

    def picture(self) -> Picture:
        panels: list[Panel] = []
        for title, segments, heads in zip(self.titles, self.segments, self.heads, strict=True):
            for number, (tokens, head) in enumerate(zip(segments, heads, strict=True), 1):
                labels = forward.labels(self.tokenizer, [index for index, _ in tokens])
                values = np.array([1.0 if counts else np.nan for _, counts in tokens])
                hints = tuple(f"id {index}, {'counts' if counts else 'does not count'}" for index, counts in tokens)
                name = f"{title}; {head}" if number == 1 else head
                panels.append(Passage(name, labels, values, "", 1.0, _LEGEND, hints))
        return Picture("Rows", tuple(panels))


def rows(config: Config, first: int = 0, count: int = 2, held_out: bool = False) -> TrainingRows:
    """Rows of the data of a configuration.

    Args:
      first: index of the first row; the batch of step i begins with row i * train.batch_size.
      held_out: held-out rows in their order instead of rows of the training data.

    Raises:
      UserError: the data cannot be read, or nothing is held out.
    """
    source = open_source(config.data)
    checkpoint = config.init_from or config.tokenizer.path
    at_most = "tokenizer.vocab_size" not in config.explicit
    tokenizer = checkpoints.load_tokenizer(checkpoint) if checkpoint else source.tokenizer(config.tokenizer, at_most)
    tokenizer = tokenizers.with_chat_template(tokenizer, config.tokenizer.chat_template)
    corpus = source.corpus(tokenizer)
    data: Any = rows_lib.training(config, corpus)
    if held_out:
        data, _ = rows_lib.held_out(config.data, corpus, config.train.seq_len)
        if data is None:
            raise UserError("--held_out: nothing is held out (data.validation_fraction=0)")
        if first >= len(data):
            raise UserError(f"--first={first}: {len(data)} rows are held out, numbered from 0")
        count = min(count, len(data) - first)
    data = masking.row_masker(config.loss, tokenizer)(data, 0 if held_out else config.train.seed)
    titles, segments_of_rows, heads = [], [], []
    for index in range(first, first + count):
        row: Any = data[index]
        segments = list(row_text.segments(row, config.loss.masked != "none"))
        padding = int((row["segments"] == 0).sum())
        titles.append(
            f"row {index}: {config.train.seq_len - padding} inputs in {len(segments)} "
            f"segment{'s' * (len(segments) != 1)}, {int(row['mask'].sum())} counted targets, {padding} padding tokens"
        )
        segments_of_rows.append(segments)
        inputs = np.bincount(row["segments"], minlength=len(segments) + 1)[1:]
        heads.append([_head(number, len(s), int(inputs[number - 1])) for number, s in enumerate(segments, 1)])
    return TrainingRows(tuple(titles), tuple(segments_of_rows), tuple(heads), tokenizer)


def _head(number: int, tokens: int, inputs: int) -> str:
    """The title of a segment, whose last token may be a target without being an input."""
    return f"segment {number}: {tokens} tokens" + " (the last token is only a target, not an input)" * (tokens > inputs)
