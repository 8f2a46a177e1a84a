"""Rows of training data as text that shows what the loss counts."""

import itertools
import re
from collections.abc import Iterator

import numpy as np

from llm_jax.tokenizers import Tokenizer


def segments(row: dict[str, np.ndarray], masked: bool = False) -> Iterator[list[tuple[int, bool]]]:
    """Returns the tokens of each segment of a row, and whether each token is a counted target. Padding is omitted.

    Args:
      masked: whether targets are the tokens at the positions of the inputs instead of the next tokens.
    """
    for segment in range(1, int(row["segments"].max()) + 1):
        indices = np.flatnonzero(row["segments"] == segment)
        if masked:
            yield [(int(row["targets"][i]), bool(row["mask"][i])) for i in indices]
            continue
        tokens = [(int(row["inputs"][indices[0]]), False)]
        tokens += [(int(row["targets"][i]), bool(row["mask"][i])) for i in indices[:-1]]
        if row["mask"][indices[-1]]:  # else it begins the next document
            tokens.append((int(row["targets"][indices[-1]]), True))
        yield tokens


def lines(tokenizer: Tokenizer, tokens: list[tuple[int, bool]], colours: tuple[str, str]) -> Iterator[str]:
    """Formats tokens as text, with a new line for every line break and every change between counted and other tokens.

    Tokens that decode to nothing, such as special tokens, are shown by their names, and newlines as "↵".

    Args:
      colours: escape codes before counted and before other text; "": no colours.
    """
    for counts, run in itertools.groupby(tokens, lambda token: token[1]):
        text = ""
        for named, part in itertools.groupby((i for i, _ in run), lambda i: not tokenizer.decode([i])):
            ids = list(part)
            text += "".join(map(tokenizer.piece, ids)) if named else tokenizer.decode(ids)
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            shown = "".join(_visible(c) for c in line)
            begin = colours[0] if counts else colours[1]
            yield f"{begin}{'+' if counts else '-'} {shown}" + ("\033[0m" if begin else "")


def _visible(character: str) -> str:
    if character == "\n":
        return "↵"
    return character if character.isprintable() or character == "\t" else repr(character)[1:-1]
