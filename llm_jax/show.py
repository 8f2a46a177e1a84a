"""Shows rows of training data and tokens of text: `python -m llm_jax.show rows|tokens [--FLAG=VALUE ...]`."""

import os
import shutil
import sys
from typing import Any

from llm_jax import cli, tokenizers
from llm_jax.errors import UserError
from llm_jax.schema import Config

ROWS = cli.Flags()
ROWS.integer("rows", 2, "number of rows to show")
ROWS.integer("first", 0, "index of the first row; the batch of step i begins with row i * train.batch_size")
ROWS.boolean("held_out", False, "show held-out rows in their order instead of rows of the training data")

TOKENS = cli.Flags()
TOKENS.multi_string(
    "tokenizer",
    None,
    "byte, a directory of train_tokenizer, a checkpoint or asset:NAME; may be repeated to compare",
    required=True,
)
TOKENS.string("text", "", "text to split; by default standard input")
TOKENS.boolean("ids", False, "also print a table of ids, byte spans and pieces")
TOKENS.boolean("color", None, "print colours; by default on a terminal, unless NO_COLOR is set")

_COUNTED, _NOT_COUNTED = ("\033[32m", "\033[36m"), "\033[90m"  # green and cyan alternate; grey


def show_rows(f: cli.Flags) -> None:
    """Rows as the model sees them: `python -m llm_jax.show rows --config=default --rows=2`.

    Every segment of a row is shown by itself. Lines with + are tokens that the loss counts, lines with - are not; on a
    terminal they are coloured (grey is not counted). Special tokens have their names, and a newline is shown as ↵. In a
    conversation, everything that the chat template writes for an answer counts: the end mark, and the newline after it
    where the template has one, unless the template marks what it generates.
    """
    from llm_jax import checkpoints
    from llm_jax.data import masking, row_text, rows
    from llm_jax.data.kinds import open_source

    if f.rows < 1 or f.first < 0:
        raise UserError(f"--rows={f.rows} --first={f.first}; expected at least 1 row, from 0")
    config = f.config
    source = open_source(config.data)
    checkpoint = config.init_from or config.tokenizer.path
    at_most = "tokenizer.vocab_size" not in config.explicit
    tokenizer = checkpoints.load_tokenizer(checkpoint) if checkpoint else source.tokenizer(config.tokenizer, at_most)
    corpus = source.corpus(tokenizer)
    count = f.rows
    data: Any = rows.training(config, corpus)
    if f.held_out:
        data, _ = rows.held_out(config.data, corpus, config.train.seq_len)
        if data is None:
            raise UserError("--held_out: nothing is held out (data.validation_fraction=0)")
        count = min(count, len(data) - f.first)
    data = masking.hider(config.loss, tokenizer)(data, 0 if f.held_out else config.train.seed)
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for index in range(f.first, f.first + count):
        row: Any = data[index]
        segments = list(row_text.segments(row, config.loss.masked != "none"))
        padding = int((row["segments"] == 0).sum())
        print(
            f"row {index}: {config.train.seq_len - padding} tokens in {len(segments)} segments, "
            f"{int(row['mask'].sum())} targets count, {padding} of padding"
        )
        for number, tokens in enumerate(segments, 1):
            print(f"segment {number}: {len(tokens)} tokens")
            colours = (_COUNTED[number % 2], _NOT_COUNTED) if coloured else ("", "")
            print("\n".join(row_text.lines(tokenizer, tokens, colours)))


def show_tokens(f: cli.Flags) -> None:
    """Text split into tokens: `python -m llm_jax.show tokens --tokenizer=A [--tokenizer=B] --text="some text"`.

    On a terminal, tokens have alternating background colours and unknown tokens are red; elsewhere bars separate the
    tokens and brackets mark unknown ones. --ids adds a table: id, bytes of the text, piece.
    """
    from llm_jax import checkpoints
    from llm_jax.tokenizers import token_text
    from llm_jax.tokenizers.byte import utf8

    text = f.text or sys.stdin.read()
    utf8(text)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ if f.color is None else f.color
    byte = tokenizers.get("byte").train([], 0)
    loaded = [(name, byte if name == "byte" else checkpoints.load_tokenizer(name)) for name in f.tokenizer]
    width = max(30, shutil.get_terminal_size().columns // len(loaded) - 3)
    for name, tokenizer in loaded:
        ids = tokenizer.encode(text)
        unknown = sum(i == tokenizer.unk for i in ids)
        words = max(1, len(text.split()))
        print(f"{name}: {tokenizer.kind}, {tokenizer.vocab_size:,} ids; {len(ids)} tokens", end="")
        print(f", {len(ids) / words:.2f} a word, {unknown} unknown")
        print(token_text.painted(text, tokenizer, colour), end="\n\n")
    if f.ids:
        columns = [[name, *token_text.table(text, tokenizer)] for name, tokenizer in loaded]
        print(token_text.side_by_side(columns, width))


SUBCOMMANDS = {
    "rows": cli.Command("show rows", show_rows, ROWS, config=Config),
    "tokens": cli.Command("show tokens", show_tokens, TOKENS),
}
COMMAND = SUBCOMMANDS

if __name__ == "__main__":
    cli.start(COMMAND)
