"""Do vectors of words capture similarity? E1 to E4 on the Wikipedia sample and Shakespeare.

    PYTHONPATH=. python experiments/word_vectors/sweep.py [--seeds=3] [--min_count=5]

Trains skip-gram, CBOW and GloVe, and skip-gram on the same text with its words in random order. What is done is
kept under --runs and not done again. Writes results.json, map.png and the tables in README.md.

The rules of the verdicts were fixed before the run. Every interval is the 95 % t-interval of a mean over the seeds.

E1  holds if the correlation with WordSim-353 of every kind lies above 0 (one-hot vectors have cosine 0 for
    every pair, so no order and a correlation of 0); holds when the kind is one of those that do; else fails.
E2  holds if every kind's correlation is higher than that of the shuffled text of the same seed (paired), and no
    figure of experiments/benchmarks/parts.json is lower than gensim's; holds when the kind is one of those that
    do; else fails.
E3  "mat" does not stand in this text at all, so it is asked of the input tables of two real checkpoints: cosine of
    cat and mat minus that of cat and sat holds if it is above 0 in both, fails if below in both, else is undecided.
E4  holds if queen is among the ten nearest of king in every run of skip-gram; else fails.
"""

import dataclasses
import pathlib
import tempfile

import numpy as np
from absl import flags

from experiments.benchmarks import word2vec as word2vec_benchmark
from llm_jax import checkpoints, cli, configuration, files
from llm_jax.data import assets
from llm_jax.embeddings import glove, measure, texts, vectors, word2vec
from llm_jax.intervals import mean, paired
from llm_jax.pictures import word_maps
from llm_jax.research import experiments, findings, verdicts
from llm_jax.research.findings import Finding
from llm_jax.schema import EmbeddingsConfig

HERE = pathlib.Path(__file__).parent
KINDS = ("skipgram", "cbow", "glove")
SHUFFLED = "skipgram of shuffled text"
MAP = "king queen prince duke lord lady man woman father mother son daughter brother sister war peace army soldier "
MAP += "sea ship land river city house door heart eye hand head blood love hate god heaven earth sun moon night day"

flags.DEFINE_integer("seeds", 3, "runs of each kind", lower_bound=2)
flags.DEFINE_integer("min_count", 5, "rarer words are left out")
flags.DEFINE_integer("glove_epochs", 10, "passes of GloVe over the co-occurrences")
flags.DEFINE_string("runs", "runs/word_vectors", "where figures and vectors are kept")


def main() -> None:
    f = flags.FLAGS
    root = experiments.directory(f.runs, f.min_count, f.glove_epochs)
    config = configuration.load("word2vec", {"glove.window": 5}, EmbeddingsConfig)
    with tempfile.TemporaryDirectory() as scratch:
        text = texts.build(config.source, f.min_count, 0, pathlib.Path(scratch))
        counted = glove.cooccurrences(text, config.glove.window, config.glove.memory * 2**20, pathlib.Path(scratch))

        def train(kind: str, seed: int) -> dict:
            settings = dataclasses.replace(config, kind="skipgram" if kind == SHUFFLED else kind, seed=seed)
            if kind == "glove":
                learned = glove.train(text, dataclasses.replace(settings, epochs=f.glove_epochs), counted)
            elif kind == SHUFFLED:
                ids = np.random.default_rng(seed).permutation(text.ids)
                learned = word2vec.train(dataclasses.replace(text, ids=ids), settings)
            else:
                learned = word2vec.train(text, settings)
            vectors.save(learned, root / f"{experiments.file_name(kind)}-{seed}.bin")
            return figures(learned)

        table, origins = experiments.measure(root, (*KINDS, SHUFFLED), f.seeds, train)
    parts = files.read_json(HERE.parent / "benchmarks" / "parts.json")
    lower = {kind: word2vec_benchmark.lower(parts[f"word2vec_{kind}"]) for kind in ("skipgram", "cbow")}
    cosines = {name: real_cosines(name) for name in ("minilm-l6-v2", "smollm2-135m-instruct")}
    shown = vectors.load(root / "skipgram-0.bin")
    word_maps.draw(shown, [w for w in MAP.split() if w in shown], experiments.output(__file__) / "map.png")
    size = f"{text.num_words:,} words of {len(text.words):,} kinds, sha256 {text.sha256[:12]}."
    lines = ["", size, *tables(table)]
    print(experiments.publish(__file__, judge(table, lower, cosines), lines, origins=origins))


def figures(learned: vectors.WordVectors) -> dict:
    sections = measure.analogies(learned, assets.path("analogies")).values()
    return {
        "wordsim": measure.agreement(learned, assets.path("wordsim")).correlation,
        "simlex": measure.agreement(learned, assets.path("simlex")).correlation,
        "analogies": sum(right for right, _ in sections) / sum(asked for _, asked in sections),
        "king queen": measure.cosine(learned, "king", "queen"),
        "near king": [word for word, _ in measure.neighbours(learned, "king", 10)],
    }


def real_cosines(name: str) -> dict[str, float]:
    """Cosines between words that are one token each in the input table of a checkpoint."""
    loaded = checkpoints.load(f"asset:{name}")
    space = " " if loaded.model.config.causal else ""  # byte pairs keep the space before a word
    ids = {word: loaded.tokenizer.encode(space + word) for word in ("cat", "mat", "sat", "king", "queen")}
    assert all(len(i) == 1 for i in ids.values())
    rows = np.stack([np.asarray(loaded.params["embed"]["table"][i[0]]) for i in ids.values()])
    words = vectors.WordVectors(tuple(ids), rows)
    return {f"{a} {b}": measure.cosine(words, a, b) for a, b in (("cat", "mat"), ("cat", "sat"), ("king", "queen"))}


def judge(table: dict, lower: dict[str, list[str]], e3: dict[str, dict[str, float]]) -> list[Finding]:
    """The verdicts by the rules above.

    Args:
      table: the figures of every kind by seed.
      lower: the figures that are lower than gensim's, by kind.
      e3: cosines between words in the input tables of checkpoints.
    """
    wordsim = {kind: [r["wordsim"] for r in runs] for kind, runs in table.items()}
    e1 = {kind: mean(wordsim[kind]) for kind in KINDS}
    e2 = {kind: paired(wordsim[kind], wordsim[SHUFFLED]) for kind in KINDS}
    above = [c["cat mat"] > c["cat sat"] for c in e3.values()]
    verdict = "holds" if all(above) else "undecided" if any(above) else "fails"
    near = ["queen" in r["near king"] for r in table["skipgram"]]
    e1_verdict = verdicts.holds_when([k for k in KINDS if e1[k].low > 0], KINDS, "the kind is")
    e2_verdict = verdicts.holds_when([k for k in KINDS if e2[k].low > 0 and not lower.get(k)], KINDS, "the kind is")
    e2_values = e2 | {f"{kind} lower than gensim": names for kind, names in lower.items()}
    e4_verdict = "holds" if all(near) else "fails"
    rows = [
        ("E1", "rank correlation with WordSim-353; one-hot: 0", e1, e1_verdict),
        ("E2", "the same minus that of shuffled text; figures lower than gensim's", e2_values, e2_verdict),
        ("E3", "cosines of cat and mat, cat and sat, in the input tables of real checkpoints", e3, verdict),
        ("E4", "queen among the ten nearest of king, skip-gram", near, e4_verdict),
    ]
    return [findings.finding(*row, n=len(near)) for row in rows]


def tables(table: dict) -> list[str]:
    """Markdown."""
    names = ("wordsim", "simlex", "analogies", "king queen")
    rows = ([kind, *(findings.deviation_text([r[n] for r in runs]) for n in names)] for kind, runs in table.items())
    lines = ["", *findings.markdown_table(["kind", *names], rows)]
    lines += ["", f"Nearest to king (skip-gram, seed 0): {', '.join(table['skipgram'][0]['near king'])}."]
    return lines


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"seeds": 2, "min_count": 100, "glove_epochs": 1}))
