"""A small directory of text, the same on every machine, and the expected tokens of its corpora."""

import hashlib
import pathlib
import random

from llm_jax.data.corpus import Source
from llm_jax.schema import TokenizerConfig
from tests.data.configs import data_config

WORDS = "the model reads a token été 日本 and then 😀 the token after it returns one line of text".split()
# What `data.source` says, over the tree's root.
SOURCES = ("one.txt", "tree", "tree/**/*.md", "tree/big.txt,one.txt,tree/a")


def write(root: pathlib.Path) -> None:
    """One file that is cut (line breaks of every kind, lines longer than a piece) and a directory of files."""
    draw = random.Random(7)

    def text(lines: int, end: str) -> str:
        return end.join(" ".join(draw.choice(WORDS) for _ in range(draw.randrange(12))) for _ in range(lines))

    (root / "one.txt").write_bytes((text(900, "\r\n") + "é" * 9000 + text(900, "\n")).encode())
    for i in range(40):
        path = root / "tree" / "abc"[i % 3] / ("a.md", "b.txt", "c")[i % 2] / f"{i}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(draw.randrange(60), "\n"))
    (root / "tree" / "big.txt").write_text(text(2500, "\n"))
    (root / "tree" / ".hidden").write_text("not seen")


def figures(cache: pathlib.Path) -> dict[str, dict[str, object]]:
    """By source (in the working directory) and tokenizer: bytes, documents and a hash of the tokens of each side."""
    found: dict[str, dict[str, object]] = {}
    for names in SOURCES:
        for fraction in (0.2, 0.001):  # the second is less than any document
            source = Source(data_config(names, cache, validation_fraction=fraction, workers=0))
            for kind in ("byte", "char"):
                corpus = source.corpus(source.tokenizer(TokenizerConfig(kind, 20, "", "")))
                sides = (corpus.train, corpus.validation)
                found[f"{names} {fraction} {kind}"] = {
                    "bytes": [side.num_bytes for side in sides],
                    "documents": [len(side.offsets) - 1 for side in sides],
                    "tokens": [hashlib.sha256(side.tokens.astype("<u4").tobytes()).hexdigest() for side in sides],
                }
    return found
