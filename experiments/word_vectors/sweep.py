"""The similarity of word vectors: E1 to E4, on the Wikipedia sample and Shakespeare.

Trains skip-gram, CBOW and GloVe, and skip-gram on the same text with its words in random order. Intervals are 95 %
t-intervals of a mean over the seeds.
"""

import dataclasses
import pathlib
import tempfile
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import word2vec as word2vec_benchmark
from llm_jax import checkpoints, cli, configuration, files
from llm_jax.data import assets
from llm_jax.embeddings import glove, measure, texts, vectors, word2vec
from llm_jax.pictures import word_maps
from llm_jax.research import experiments, findings, verdicts
from llm_jax.research.findings import Figures, Finding
from llm_jax.schema import EmbeddingsConfig

KINDS = ("skipgram", "cbow", "glove")
SHUFFLED = "skipgram of shuffled text"
MEASURES = {
    "E1": "rank correlation with WordSim-353; one-hot: 0",
    "E2": "the same minus that of shuffled text; figures lower than gensim's",
    "E3": "cosines of cat and mat, cat and sat, in the input tables of real checkpoints",
    "E4": "queen among the ten nearest of king, skip-gram",
}
COLUMNS = ("wordsim", "simlex", "analogies", "king queen")
REAL = ("minilm-l6-v2", "smollm2-135m-instruct")
MAP = "king queen prince duke lord lady man woman father mother son daughter brother sister war peace army soldier "
MAP += "sea ship land river city house door heart eye hand head blood love hate god heaven earth sun moon night day"

flags.DEFINE_integer("seeds", 3, "models of each kind", lower_bound=2)
flags.DEFINE_integer("min_count", 5, "minimum number of occurrences of a word")
flags.DEFINE_integer("glove_epochs", 10, "epochs of GloVe")


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
            else:
                ids = np.random.default_rng(seed).permutation(text.ids) if kind == SHUFFLED else text.ids
                learned = word2vec.train(dataclasses.replace(text, ids=ids), settings)
            vectors.save(learned, root / f"{experiments.file_name(kind)}-{seed}.bin")
            sections = measure.analogies(learned, assets.path("analogies")).values()
            return {
                "wordsim": measure.agreement(learned, assets.path("wordsim")).correlation,
                "simlex": measure.agreement(learned, assets.path("simlex")).correlation,
                "analogies": sum(right for right, _ in sections) / sum(asked for _, asked in sections),
                "king queen": measure.cosine(learned, "king", "queen"),
                "near king": [word for word, _ in measure.neighbours(learned, "king", 10)],
            }

        figures, origins = experiments.measure(root, (*KINDS, SHUFFLED), f.seeds, train)
    parts = files.read_json(pathlib.Path(word2vec_benchmark.__file__).with_name("parts.json"))
    lower = {kind: word2vec_benchmark.lower(parts[f"word2vec_{kind}"]) for kind in ("skipgram", "cbow")}
    shown = vectors.load(root / "skipgram-0.bin")
    word_maps.draw(shown, [w for w in MAP.split() if w in shown], experiments.output(__file__) / "map.png")
    size = f"{text.num_words:,} words of {len(text.words):,} kinds, sha256 {text.sha256[:12]}."
    table = findings.condition_table("kind", figures, {name: findings.deviation(name) for name in COLUMNS})
    lines = ["", size, "", *table, ""]
    lines.append(f"Nearest to king (skip-gram, seed 0): {', '.join(figures['skipgram'][0]['near king'])}.")
    results = judge(figures, lower, {name: real_cosines(name) for name in REAL})
    print(experiments.publish(__file__, results, lines, origins=origins))


def real_cosines(name: str) -> dict[str, float]:
    """Cosines between words that are one token each in the input table of a checkpoint."""
    loaded = checkpoints.load(f"asset:{name}")
    space = " " if loaded.model.config.causal else ""  # byte pairs keep the space before a word
    words = ("cat", "mat", "sat", "king", "queen")
    ids = [loaded.tokenizer.encode(space + word) for word in words]
    assert all(len(i) == 1 for i in ids)
    table = vectors.WordVectors(words, np.asarray(loaded.params["embed"]["table"])[np.concatenate(ids)])
    return {f"{a} {b}": measure.cosine(table, a, b) for a, b in (("cat", "mat"), ("cat", "sat"), ("king", "queen"))}


def judge(figures: Figures, lower: dict[str, list[str]], cosines: dict[str, dict[str, float]]) -> list[Finding]:
    """The verdicts by the rules of statements.toml.

    Args:
      figures: of every kind by seed.
      lower: the figures that are lower than gensim's, by kind.
      cosines: between words in the input tables of checkpoints.
    """
    correlations, more = findings.means(figures, "wordsim"), findings.differences(figures, "wordsim", SHUFFLED)
    correlations.pop(SHUFFLED)
    related = [kind for kind in KINDS if correlations[kind].low > 0]
    taught = [kind for kind in KINDS if more[kind].low > 0 and not lower.get(kind)]
    lower_figures = {f"{kind} lower than gensim": names for kind, names in lower.items()}
    nearer = [table["cat mat"] > table["cat sat"] for table in cosines.values()]
    near = ["queen" in run["near king"] for run in figures["skipgram"]]
    judgements: dict[str, tuple[Any, str]] = {
        "E1": (correlations, verdicts.holds_when(related, KINDS, "the kind is")),
        "E2": (more | lower_figures, verdicts.holds_when(taught, KINDS, "the kind is")),
        "E3": (cosines, "holds" if all(nearer) else "undecided" if any(nearer) else "fails"),
        "E4": (near, "holds" if all(near) else "fails"),
    }
    return [findings.finding(name, MEASURES[name], *judgements[name], n=len(near)) for name in MEASURES]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"seeds": 2, "min_count": 100, "glove_epochs": 1}))
