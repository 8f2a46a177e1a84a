"""word2vec here and in gensim: the same corpus, window, width, epochs, negatives and core, turn by turn in one run.

    pip install gensim    # in an environment of its own beside requirements.txt
    PYTHONPATH=. python experiments/benchmarks/word2vec.py [--seeds=3]

Quality binds: the mean rank correlation with WordSim-353 and SimLex-999 must not be lower than gensim's by more
than twice the standard error of the difference over the seeds. Speed is a ratio of words a second (words of the
text, before the frequent ones are thinned out), compilation left out. It is written to word2vec.json.
"""

import dataclasses
import json
import os
import pathlib
import runpy
import statistics
import tempfile
import time

from absl import flags

from llm_jax import cli
from llm_jax import configuration as config_lib
from llm_jax.schema import EmbeddingsConfig

HERE = pathlib.Path(__file__).parent

flags.DEFINE_integer("seeds", 3, "turns of each kind")
flags.DEFINE_integer("core", 0, "the one core that both run on, counted among those at hand")


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[flags.FLAGS.core % len(cores)]})  # before JAX counts its threads

    import gensim
    import jax
    import numpy as np

    from llm_jax.data import assets
    from llm_jax.embeddings import measure, texts, word2vec
    from llm_jax.embeddings.vectors import WordVectors

    config = config_lib.build(
        runpy.run_path(str(HERE.parents[1] / "configs" / "word2vec.py"))["get_config"](), EmbeddingsConfig
    )
    w = config.word2vec
    turns: dict[str, list[dict[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        text = texts.build(config.source, config.min_count, 0, pathlib.Path(scratch))
        ends = np.flatnonzero(text.ids == texts.BREAK)
        begins = [0, *(ends[:-1] + 1)]
        paragraphs = [[text.words[i] for i in text.ids[a:b]] for a, b in zip(begins, ends, strict=True)]
        for kind in ("skipgram", "cbow"):
            settings = dataclasses.replace(config, kind=kind)
            word2vec.train(text, dataclasses.replace(settings, epochs=1))  # compiles
            for seed in range(flags.FLAGS.seeds):
                found = {}
                start = time.perf_counter()
                ours = word2vec.train(text, dataclasses.replace(settings, seed=seed))
                found["ours"] = {"seconds": time.perf_counter() - start} | quality(measure, assets, ours)
                model = gensim.models.Word2Vec(
                    vector_size=config.width,
                    window=w.window,
                    negative=w.negatives,
                    sample=w.sample,
                    alpha=w.lr,
                    min_alpha=w.final_lr,
                    min_count=1,
                    sg=int(kind == "skipgram"),
                    workers=1,
                    seed=seed + 1,
                )
                model.build_vocab(paragraphs)
                start = time.perf_counter()
                model.train(paragraphs, total_examples=len(paragraphs), epochs=config.epochs)
                seconds = time.perf_counter() - start
                theirs = WordVectors(tuple(model.wv.index_to_key), model.wv.vectors)
                found["gensim"] = {"seconds": seconds} | quality(measure, assets, theirs)
                turns.setdefault(kind, []).append(found)
                print(kind, seed, {who: {n: round(v, 3) for n, v in f.items()} for who, f in found.items()}, flush=True)
    words = config.epochs * text.num_words
    table = {kind: summary(found, words) for kind, found in turns.items()}
    for kind, row in table.items():
        print(f"{kind}: {row['ratio']:.2f} times gensim's words/s; " + "; ".join(lines(row)))
    said = {"corpus": text.sha256, "words": text.num_words, "vocabulary": len(text.words)}
    said |= {"jax": jax.__version__, "gensim": gensim.__version__, "table": table}
    (HERE / "word2vec.json").write_text(json.dumps(said, indent=1) + "\n")


def quality(measure, assets, vectors) -> dict[str, float]:
    sections = measure.analogies(vectors, assets.path("analogies")).values()
    return {
        "wordsim": measure.agreement(vectors, assets.path("wordsim")).correlation,
        "simlex": measure.agreement(vectors, assets.path("simlex")).correlation,
        "analogies": sum(right for right, _ in sections) / sum(asked for _, asked in sections),
    }


def summary(turns: list[dict[str, dict[str, float]]], words: int) -> dict:
    """Words a second, their ratio, and each figure of quality with its verdict."""
    found: dict = {who: words / statistics.median(t[who]["seconds"] for t in turns) for who in ("ours", "gensim")}
    found["ratio"] = statistics.median(t["gensim"]["seconds"] / t["ours"]["seconds"] for t in turns)
    for name in ("wordsim", "simlex", "analogies"):
        a, b = ([t[who][name] for t in turns] for who in ("ours", "gensim"))
        error = ((statistics.variance(a) + statistics.variance(b)) / len(turns)) ** 0.5 if len(turns) > 1 else 0.0
        lower = statistics.mean(a) < statistics.mean(b) - 2 * error
        found[name] = {"ours": a, "gensim": b, "standard_error": error, "verdict": "lower" if lower else "not lower"}
    return found


def lines(row: dict) -> list[str]:
    return [
        f"{name} {statistics.mean(row[name]['ours']):.3f} against {statistics.mean(row[name]['gensim']):.3f}"
        f" (standard error {row[name]['standard_error']:.3f}): {row[name]['verdict']}"
        for name in ("wordsim", "simlex", "analogies")
    ]


if __name__ == "__main__":
    cli.run_script(main)
