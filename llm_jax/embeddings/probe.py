"""What word vectors know: `python -m llm_jax.embeddings.probe --vectors=vectors.txt [--neighbours=king] [--all]`.

--analogy=man,king,woman asks what is to "woman" as "king" is to "man". --all prints the correlation with
WordSim-353 and SimLex-999 and the analogies' accuracy (assets of `llm_jax.data.assets`); --map=FILE.png draws
the words of --words (by default the 150 most frequent of more than three letters) on their first two principal axes.
"""

import pathlib

import numpy as np
from absl import flags

from llm_jax import cli
from llm_jax.embeddings import measure, vectors
from llm_jax.embeddings.vectors import WordVectors
from llm_jax.errors import UserError

flags.DEFINE_string("vectors", None, "a file of word2vec's text or (.bin) binary form", required=True)
flags.DEFINE_multi_string("neighbours", [], "words whose neighbours are printed")
flags.DEFINE_multi_string("analogy", [], "three words, a,b,c: a is to b as c is to ...")
flags.DEFINE_integer("count", 10, "neighbours and answers to print")
flags.DEFINE_boolean("all", False, "agreement with people's ratings, and analogies")
flags.DEFINE_string("map", "", "a picture to write")
flags.DEFINE_list("words", [], "the words on the map")


def main() -> None:
    f = flags.FLAGS
    if f.count < 1:
        raise UserError(f"--count={f.count}; expected a positive number")
    found = vectors.load(pathlib.Path(f.vectors).expanduser())
    for word in f.neighbours:
        print(f"{word}: " + _listed(measure.neighbours(found, word, f.count)))
    for question in f.analogy:
        words = question.split(",")
        if len(words) != 3:
            raise UserError(f"--analogy={question}; expected three words, a,b,c")
        print("{} : {} = {} : ".format(*words) + _listed(measure.analogy(found, words[0], words[1], words[2], f.count)))
    if f.all:
        from llm_jax.data import assets

        for name, title in (("wordsim", "WordSim-353"), ("simlex", "SimLex-999")):
            said = measure.agreement(found, assets.path(name))
            print(f"{title}: rank correlation {said.correlation:.3f} over {said.pairs} of {said.of} pairs")
        sections = measure.analogies(found, assets.path("analogies"))
        right, asked = (sum(s[i] for s in sections.values()) for i in (0, 1))
        print(f"analogies: {right} of {asked} right ({right / max(asked, 1):.1%})")
    if f.map:
        words = f.words or [w for w in found.words if len(w) > 3][:150]
        draw(found, words, pathlib.Path(f.map).expanduser())
        print(f"wrote {f.map}")


def plane(found: WordVectors, words: list[str]) -> np.ndarray:
    """The directions of the words on their first two principal axes, (words, 2)."""
    rows = np.stack([found[word] for word in words])
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    centred = rows - rows.mean(0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T


def draw(found: WordVectors, words: list[str], path: pathlib.Path) -> None:
    """Writes a picture of the words on their plane.

    Raises:
      UserError: fewer than three words, a word without a vector, or a file that cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if len(words) < 3:
        raise UserError(f"a map of {len(words)} words shows nothing; give at least three")
    places = plane(found, words)
    figure, axis = pyplot.subplots(figsize=(11, 8), layout="constrained")
    axis.scatter(places[:, 0], places[:, 1], s=6)
    for word, place in zip(words, places, strict=True):
        axis.annotate(word, place, fontsize=7, xytext=(2, 2), textcoords="offset points")
    axis.set(xticks=[], yticks=[])
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--map={path} cannot be written ({error})") from error
    finally:
        pyplot.close(figure)


def _listed(found: list[tuple[str, float]]) -> str:
    return ", ".join(f"{word} {score:.3f}" for word, score in found)


if __name__ == "__main__":
    cli.run(main)
