"""Rows as the model sees them: `python -m llm_jax.data.show --config=configs/default.py --rows=2`.

Every segment of a row is shown apart. Lines with + are text that the loss counts, lines with - are not; on a
terminal they are coloured (grey is not counted).
"""

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from llm_jax import cli
from llm_jax.errors import UserError
from llm_jax.tokenizers import Tokenizer

cli.define_config()
flags.DEFINE_integer("rows", 2, "how many rows to show")
flags.DEFINE_integer("first", 0, "the first of them; row step * train.batch_size begins the batch of a step")
flags.DEFINE_boolean("held_out", False, "held-out rows, in their order, instead of those that are trained on")

_COUNTED, _NOT = ("\033[32m", "\033[36m"), "\033[90m"  # green and cyan by turns; grey


def segments(row: dict[str, np.ndarray], masked: bool = False) -> Iterator[list[tuple[int, bool]]]:
    """The tokens of each segment of a row, and whether each counts as a target. Padding is left out.

    Args:
      masked: targets are the tokens at the places of the inputs, not those after them.
    """
    for segment in range(1, int(row["segments"].max()) + 1):
        where = np.flatnonzero(row["segments"] == segment)
        if masked:
            yield [(int(row["targets"][i]), bool(row["mask"][i])) for i in where]
            continue
        found = [(int(row["inputs"][where[0]]), False)]
        found += [(int(row["targets"][i]), bool(row["mask"][i])) for i in where[:-1]]
        if row["mask"][where[-1]]:  # else it begins the next document
            found.append((int(row["targets"][where[-1]]), True))
        yield found


def lines(tokenizer: Tokenizer, tokens: list[tuple[int, bool]], colours: tuple[str, str]) -> Iterator[str]:
    """Tokens as text, a line for every line and every change from what counts to what does not.

    Args:
      colours: what is written before text that counts, and that does not; "": no colours.
    """
    for counts, run in itertools.groupby(tokens, lambda token: token[1]):
        text = ""
        for special, part in itertools.groupby((i for i, _ in run), lambda i: i in (tokenizer.bos, tokenizer.eos)):
            ids = list(part)
            text += "".join(map(tokenizer.piece, ids)) if special else tokenizer.decode(ids)
        for line in text.split("\n"):
            shown = "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line)
            begin = colours[0] if counts else colours[1]
            yield f"{begin}{'+' if counts else '-'} {shown}" + ("\033[0m" if begin else "")


def main() -> None:
    from llm_jax import checkpoints
    from llm_jax.data import masking, rows
    from llm_jax.data.kinds import open_source

    f = flags.FLAGS
    if f.rows < 1 or f.first < 0:
        raise UserError(f"--rows={f.rows} --first={f.first}; expected at least 1 row, from 0")
    config = cli.load_config()
    source = open_source(config.data)
    named = config.init_from or config.tokenizer.path
    tokenizer = checkpoints.load_tokenizer(named) if named else source.tokenizer(config.tokenizer)
    corpus = source.corpus(tokenizer)
    found: Any = rows.training(config, corpus)
    if f.held_out:
        found, _ = rows.held_out(config.data, corpus, config.train.seq_len)
        f.rows = min(f.rows, len(found) - f.first)
    found = masking.hider(config.loss, tokenizer)(found, 0 if f.held_out else config.train.seed)
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for index in range(f.first, f.first + f.rows):
        row = found[index]
        shown = list(segments(row, config.loss.masked != "none"))
        padding = int((row["segments"] == 0).sum())
        print(
            f"row {index}: {config.train.seq_len - padding} tokens in {len(shown)} segments, "
            f"{int(row['mask'].sum())} targets count, {padding} of padding"
        )
        for number, tokens in enumerate(shown, 1):
            print(f"segment {number}: {len(tokens)} tokens")
            colours = (_COUNTED[number % 2], _NOT) if coloured else ("", "")
            print("\n".join(lines(tokenizer, tokens, colours)))


if __name__ == "__main__":
    cli.run(main)
