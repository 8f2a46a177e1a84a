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
import json
import pathlib
import runpy
import tempfile

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.benchmarks import word2vec as word2vec_benchmark
from llm_jax import checkpoints, cli, files, runtime
from llm_jax import configuration as config_lib
from llm_jax.data import assets
from llm_jax.embeddings import glove, measure, texts, vectors, word2vec
from llm_jax.errors import UserError
from llm_jax.intervals import mean, paired
from llm_jax.pictures import word_maps
from llm_jax.research import findings, verdicts
from llm_jax.research.findings import Finding
from llm_jax.schema import EmbeddingsConfig

HERE = pathlib.Path(__file__).parent
COMMAND = "PYTHONPATH=. python experiments/word_vectors/sweep.py"
KINDS = ("skipgram", "cbow", "glove")
SHUFFLED = "skipgram of shuffled text"
MAP = "king queen prince duke lord lady man woman father mother son daughter brother sister war peace army soldier "
MAP += "sea ship land river city house door heart eye hand head blood love hate god heaven earth sun moon night day"

flags.DEFINE_integer("seeds", 3, "runs of each kind")
flags.DEFINE_integer("min_count", 5, "rarer words are left out")
flags.DEFINE_integer("glove_epochs", 10, "passes of GloVe over the co-occurrences")
flags.DEFINE_string("runs", "runs/word_vectors", "where figures and vectors are kept")


def main() -> None:
    runtime.retain_freed_memory()
    f = flags.FLAGS
    if f.seeds < 2:
        raise UserError(f"--seeds={f.seeds}; expected at least 2")
    root = pathlib.Path(f.runs).expanduser() / f"{f.min_count}-{f.glove_epochs}"
    files.make_directory(root)
    path = HERE.parents[1] / "configs" / "word2vec.py"
    config = config_lib.build(runpy.run_path(str(path))["get_config"](), EmbeddingsConfig)
    config = dataclasses.replace(config, glove=dataclasses.replace(config.glove, window=5))
    with tempfile.TemporaryDirectory() as scratch:
        text = texts.build(config.source, f.min_count, 0, pathlib.Path(scratch))
        counted = glove.cooccurrences(text, config.glove.window, config.glove.memory * 2**20, pathlib.Path(scratch))
        jobs = [(kind, seed) for seed in range(f.seeds) for kind in (*KINDS, SHUFFLED)]
        for kind, seed in tqdm(jobs):
            done = root / f"{kind}-{seed}.json".replace(" ", "_")
            if done.exists():
                continue
            settings = dataclasses.replace(config, kind=kind, seed=seed)
            if kind == "glove":
                found = glove.train(text, dataclasses.replace(settings, epochs=f.glove_epochs), counted)
            elif kind == SHUFFLED:
                ids = np.array(text.ids)
                np.random.default_rng(seed).shuffle(ids)
                settings = dataclasses.replace(settings, kind="skipgram")
                found = word2vec.train(dataclasses.replace(text, ids=ids), settings)
            else:
                found = word2vec.train(text, settings)
            vectors.save(found, done.with_suffix(".bin"))
            files.write_json(done, figures(found))
    table = {
        kind: [json.loads((root / f"{kind}-{s}.json".replace(" ", "_")).read_text()) for s in range(f.seeds)]
        for kind in (*KINDS, SHUFFLED)
    }
    parts = files.read_json(HERE.parent / "benchmarks" / "parts.json")
    lower = {kind: word2vec_benchmark.lower(parts[f"word2vec_{kind}"]) for kind in ("skipgram", "cbow")}
    cosines = {name: real_cosines(name) for name in ("minilm-l6-v2", "smollm2-135m-instruct")}
    results = judge(table, lower, cosines)
    shown = vectors.load(root / "skipgram-0.bin")
    word_maps.draw(shown, [w for w in MAP.split() if w in shown], HERE / "map.png")
    lines = [
        f"{text.num_words:,} words of {len(text.words):,} kinds, sha256 {text.sha256[:12]}.",
        *tables(table),
    ]
    print(findings.publish(HERE, results, ["", *lines]))


def figures(found: vectors.WordVectors) -> dict:
    sections = measure.analogies(found, assets.path("analogies")).values()
    return {
        "wordsim": measure.agreement(found, assets.path("wordsim")).correlation,
        "simlex": measure.agreement(found, assets.path("simlex")).correlation,
        "analogies": sum(right for right, _ in sections) / sum(asked for _, asked in sections),
        "king queen": measure.cosine(found, "king", "queen"),
        "near king": [word for word, _ in measure.neighbours(found, "king", 10)],
    }


def real_cosines(name: str) -> dict[str, float]:
    """Cosines between words that are one token each in the input table of a checkpoint."""
    loaded = checkpoints.load(f"asset:{name}")
    space = " " if loaded.model.config.causal else ""  # byte pairs keep the space before a word
    ids = {word: loaded.tokenizer.encode(space + word) for word in ("cat", "mat", "sat", "king", "queen")}
    assert all(len(i) == 1 for i in ids.values())
    rows = np.stack([np.asarray(loaded.params["embed"]["table"][i[0]]) for i in ids.values()])
    found = vectors.WordVectors(tuple(ids), rows)
    return {f"{a} {b}": measure.cosine(found, a, b) for a, b in (("cat", "mat"), ("cat", "sat"), ("king", "queen"))}


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
    return [
        findings.finding(statement, measure, values, verdict, command=COMMAND, n=len(near))
        for statement, measure, values, verdict in (
            ("E1", "rank correlation with WordSim-353; one-hot: 0", e1, e1_verdict),
            ("E2", "the same minus that of shuffled text; figures lower than gensim's", e2_values, e2_verdict),
            ("E3", "cosines of cat and mat, cat and sat, in the input tables of real checkpoints", e3, verdict),
            ("E4", "queen among the ten nearest of king, skip-gram", near, e4_verdict),
        )
    ]


def tables(table: dict) -> list[str]:
    """Markdown."""
    names = ("wordsim", "simlex", "analogies", "king queen")
    lines = ["", "| kind | " + " | ".join(names) + " |", "|---" * 5 + "|"]
    for kind, runs in table.items():
        cells = ([r[n] for r in runs] for n in names)
        lines.append(f"| {kind} | " + " | ".join(f"{np.mean(c):.3f} ± {np.std(c, ddof=1):.3f}" for c in cells) + " |")
    lines += ["", f"Nearest to king (skip-gram, seed 0): {', '.join(table['skipgram'][0]['near king'])}."]
    return lines


if __name__ == "__main__":
    cli.run_script(main)
