"""A text cut into tokens: `python -m llm_jax.tokenizers.show --tokenizer=A [--tokenizer=B] --text="some text"`.

On a terminal, tokens have alternating background colours and unknowns are red; elsewhere they stand between
bars, unknowns in brackets. `--ids` adds a table: id, bytes of the text, piece.
"""

import os
import shutil
import sys
from collections.abc import Sequence

from absl import flags

from llm_jax import cli, tokenizers
from llm_jax.tokenizers.byte import utf8

_COLOURS = ("48;5;24", "48;5;58", "48;5;54", "48;5;22")  # backgrounds of the 256-colour palette
_RED, _END = "\x1b[41m", "\x1b[0m"

flags.DEFINE_multi_string(
    "tokenizer", None, "byte, a directory of tokenizers.train, a checkpoint, asset:NAME; several times", required=True
)
flags.DEFINE_string("text", "", "the text; by default what comes on standard input")
flags.DEFINE_boolean("ids", False, "also the table of ids, byte spans and pieces")
flags.DEFINE_boolean("color", None, "by default where the output is a terminal and NO_COLOR is not set")


def main() -> None:
    f = flags.FLAGS
    text = f.text or sys.stdin.read()
    utf8(text)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ if f.color is None else f.color
    found = [(name, read(name)) for name in f.tokenizer]
    width = max(30, shutil.get_terminal_size().columns // len(found) - 3)
    for name, tokenizer in found:
        ids = tokenizer.encode(text)
        unknown = sum(i == tokenizer.unk for i in ids)
        words = max(1, len(text.split()))
        print(f"{name}: {tokenizer.kind}, {tokenizer.vocab_size:,} ids; {len(ids)} tokens", end="")
        print(f", {len(ids) / words:.2f} a word, {unknown} unknown")
        print(painted(text, tokenizer, colour), end="\n\n")
    if f.ids:
        print(side_by_side([[name, *table(text, t)] for name, t in found], width))


def read(name: str) -> tokenizers.Tokenizer:
    """The tokenizer that a name means.

    Raises:
      UserError: there is none.
    """
    if name == "byte":
        return tokenizers.get("byte").train([], 0)
    from llm_jax import checkpoints

    return checkpoints.load_tokenizer(name)


def painted(text: str, tokenizer: tokenizers.Tokenizer, colour: bool) -> str:
    """The text with its tokens told apart; what belongs to no token (dropped by a normalizer) stands bare.

    A token that stands for a part of a character is shown by its bytes.
    """
    whole, parts, last = utf8(text), [], 0
    for k, (index, (begin, end)) in enumerate(zip(tokenizer.encode(text), tokenizer.spans(text), strict=True)):
        begin = max(begin, last)
        between, own = _shown(whole[last:begin]), _shown(whole[begin:end]) or _shown(tokenizer.piece(index).encode())
        if colour:
            start = _RED if index == tokenizer.unk else f"\x1b[{_COLOURS[k % len(_COLOURS)]}m"
            parts.append(between + start + own + _END)
        else:
            parts.append(between + "|" + (f"[{own}]" if index == tokenizer.unk else own))
        last = max(last, end)
    return "".join(parts) + ("" if colour else "|") + _shown(whole[last:])


def table(text: str, tokenizer: tokenizers.Tokenizer) -> list[str]:
    """A line per token: id, span in bytes, piece."""
    both = zip(tokenizer.encode(text), tokenizer.spans(text), strict=True)
    return [f"{i:>7} {begin:>5}-{end:<5} {_shown(tokenizer.piece(i).encode())}" for i, (begin, end) in both]


def side_by_side(columns: Sequence[Sequence[str]], width: int) -> str:
    rows = range(max(map(len, columns)))
    lines = ([c[r] if r < len(c) else "" for c in columns] for r in rows)
    return "\n".join(" | ".join(f"{cell[:width]:<{width}}" for cell in line).rstrip() for line in lines)


def _shown(part: bytes) -> str:
    """Text with control characters (a terminal would obey them) and broken characters spelled out."""
    text = part.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    cli.run(main)
