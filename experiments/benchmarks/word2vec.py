"""word2vec here and in gensim: the same corpus, window, width, epochs and negatives.

Quality binds: a figure is "lower" than gensim's if its mean over the turns, whose seeds differ, is lower by more than
twice the standard error of the difference. Words per second count those of the text before frequent ones are thinned.
"""

import dataclasses
import os
import pathlib
import runpy
import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

from experiments.benchmarks import runner
from experiments.benchmarks.worker import Job, rates, timed

QUALITY = ("wordsim", "simlex", "analogies")


def _read() -> tuple[Any, Any]:
    """The configuration of `configs/word2vec.py`, and its text."""
    from llm_jax import configuration
    from llm_jax.embeddings import texts
    from llm_jax.schema import EmbeddingsConfig

    recipe = runpy.run_path(str(runner.ROOT / "configs" / "word2vec.py"))["get_config"]()
    config = configuration.build(recipe, EmbeddingsConfig)
    with tempfile.TemporaryDirectory() as scratch:
        return config, texts.build(config.source, config.min_count, 0, pathlib.Path(scratch))


def _quality(vectors: Any) -> dict[str, float]:
    from llm_jax.data import assets
    from llm_jax.embeddings import measure

    sections = measure.analogies(vectors, assets.path("analogies")).values()
    return {
        "wordsim": measure.agreement(vectors, assets.path("wordsim")).correlation,
        "simlex": measure.agreement(vectors, assets.path("simlex")).correlation,
        "analogies": sum(right for right, _ in sections) / sum(total for _, total in sections),
    }


def llm_jax(kind: str) -> Job:
    """Trains "skipgram" or "cbow" with the number of the turn as the seed."""
    import jax

    from llm_jax.embeddings import word2vec

    config, text = _read()
    config = dataclasses.replace(config, kind=kind)
    word2vec.train(text, dataclasses.replace(config, epochs=1))  # compiles

    def turn(number: int) -> dict[str, float]:
        vectors = []
        times = timed(lambda: vectors.append(word2vec.train(text, dataclasses.replace(config, seed=number))))
        return rates("words", config.epochs * text.num_words, times) | _quality(vectors[0])

    return Job(turn, f"jax {jax.__version__}", {"words": text.num_words, "corpus": text.sha256})


def gensim(kind: str) -> Job:
    """The same by gensim, with a thread per core."""
    import gensim
    import numpy as np

    from llm_jax.embeddings import texts
    from llm_jax.embeddings.vectors import WordVectors

    config, text = _read()
    w = config.word2vec
    ends = np.flatnonzero(text.ids == texts.BREAK)
    begins = [0, *(ends[:-1] + 1)]
    paragraphs = [[text.words[i] for i in text.ids[a:b]] for a, b in zip(begins, ends, strict=True)]

    def turn(number: int) -> dict[str, float]:
        model = gensim.models.Word2Vec(
            vector_size=config.width,
            window=w.window,
            negative=w.negatives,
            sample=w.sample,
            alpha=w.lr,
            min_alpha=w.final_lr,
            min_count=1,
            sg=int(kind == "skipgram"),
            workers=len(os.sched_getaffinity(0)),
            seed=number + 1,
        )
        model.build_vocab(paragraphs)
        times = timed(lambda: model.train(paragraphs, total_examples=len(paragraphs), epochs=config.epochs))
        vectors = WordVectors(tuple(model.wv.index_to_key), model.wv.vectors)
        return rates("words", config.epochs * text.num_words, times) | _quality(vectors)

    return Job(turn, f"gensim {gensim.__version__}")


def lower(record: Mapping[str, Any]) -> list[str]:
    """The figures of quality of a measure's record that are lower than gensim's."""
    sides = record["sides"]
    result = []
    for name in QUALITY:
        a, b = (sides[side][name]["values"] for side in ("llm_jax", "gensim"))
        error = ((statistics.variance(a) + statistics.variance(b)) / len(a)) ** 0.5 if len(a) > 1 else 0.0
        if statistics.mean(a) < statistics.mean(b) - 2 * error:
            result.append(name)
    return result
