"""Kinds of tokenizers by vocabulary size, on held-out text: T1 and T3."""

import itertools
import pathlib
import re

from absl import flags

from llm_jax import cli, tokenizers
from llm_jax.data import assets
from llm_jax.research import experiments, findings, plots, verdicts
from llm_jax.research.findings import Finding

PIECES = ("wordpiece", "unigram", "bpe", "char_bpe", "byte_bpe")
SINGLE = ("char", "byte")
SIZES = (1024, 2048, 4096, 8192)
WORD = re.compile(r"[A-Za-z]+")
ENOUGH = 0.99

flags.DEFINE_string("asset", "shakespeare", "name of the asset with the texts")
flags.DEFINE_list("sizes", list(map(str, SIZES)), "sizes of the vocabularies, the largest last")
flags.DEFINE_integer("share", 1, "one in this many paragraphs is used", lower_bound=1)
flags.DEFINE_string("runs", "runs/tokenization_lengths", "directory of the measured figures")

Table = dict[tuple[str, int], dict[str, float]]  # figures by kind and size of the vocabulary


def main() -> None:
    f = flags.FLAGS
    text = "\n\n".join(path.read_text() for path in sorted(assets.path(f.asset).glob("*.txt")))
    paragraphs = [p + "\n\n" for p in re.split(r"\n\s*\n", text) if p.strip()][:: f.share]
    held = paragraphs[::20]
    train = [p for i, p in enumerate(paragraphs) if i % 20]
    known, words = ({w for p in part for w in WORD.findall(p)} for part in (train, held))
    new = sorted(words - known)
    sizes = [int(size) for size in f.sizes]
    points = [(kind, size) for kind in ("word", *PIECES) for size in sizes] + [(kind, sizes[-1]) for kind in SINGLE]
    conditions = {f"{kind} {size}": (kind, size) for kind, size in points}

    def measure(condition: str, seed: int) -> dict[str, float]:
        kind, size = conditions[condition]
        tokenizer = tokenizers.get(kind).train(train, size)
        rows = [tokenizer.encode(p) for p in held]
        tokens = sum(map(len, rows))
        return {
            "ids": tokenizer.vocab_size,
            "tokens per word": tokens / sum(len(p.split()) for p in held),
            "unknown": sum(row.count(tokenizer.unk) for row in rows if tokenizer.unk is not None) / tokens,
            "new words that come back": sum(tokenizer.decode(tokenizer.encode(f" {w}")) == f" {w}" for w in new)
            / len(new),
        }

    figures, origins = experiments.measure(experiments.directory(f.runs, f.asset, f.share), conditions, 1, measure)
    table = {point: figures[name][0] for name, point in conditions.items()}
    draw(table, experiments.output(__file__) / "tradeoff.png")
    rows = (
        [kind, f"{row['ids']:,.0f}", f"{row['tokens per word']:.2f}", f"{row['unknown']:.2%}",
         f"{row['new words that come back']:.1%}"]
        for (kind, _), row in table.items()
    )  # fmt: skip
    head = ["kind", "ids", "tokens per word", "unknown tokens", "new words that come back"]
    counts = f"{sum(map(len, train)):,} characters of training text, {sum(map(len, held)):,} held out, "
    lines = ["", f"{counts}with {len(new):,} new words.", "", *findings.markdown_table(head, rows)]
    print(experiments.publish(__file__, judge(table), lines, origins=origins))


def judge(table: Table) -> list[Finding]:
    """The verdicts by the rules of statements.toml."""
    length = {key: row["tokens per word"] for key, row in table.items()}
    sizes = sorted({size for _, size in table})
    single = min(length[kind, sizes[-1]] for kind in SINGLE)
    ordered = all(length["word", s] < length[kind, s] < single for s in sizes for kind in PIECES)
    shrinks = all(
        length[kind, a] >= length[kind, b] for kind in ("word", *PIECES) for a, b in itertools.pairwise(sizes)
    )
    back = {kind: table[kind, sizes[-1]]["new words that come back"] for kind in ("word", *PIECES)}
    able = [kind for kind in PIECES if back[kind] >= ENOUGH]
    t1 = "holds" if ordered and shrinks else "fails"
    t3 = "fails" if back["word"] else verdicts.holds_when(able, PIECES, "the kind is")
    lengths = {f"{kind}, {size}": value for (kind, size), value in length.items()}
    return [
        findings.finding("T1", "tokens per word by kind and vocabulary", lengths, t1),
        findings.finding("T3", f"share of the new words that come back, {sizes[-1]} ids", back, t3),
    ]


def draw(table: Table, path: pathlib.Path) -> None:
    with plots.figure(path, figsize=(7, 4.5)) as axis:
        for kind in ("word", *PIECES, *SINGLE):
            rows = [row for (k, _), row in table.items() if k == kind]
            x, y = ([row[name] for row in rows] for name in ("ids", "tokens per word"))
            axis.plot(x, y, marker="o", markersize=4, label=kind)
        axis.set(xscale="log", yscale="log", xlabel="ids", ylabel="tokens per word, held-out text")


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={"sizes": ["512", "1024"], "share": 40}))
