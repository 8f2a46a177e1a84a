"""Inspects word vectors: `python -m llm_jax.probe_embeddings --vectors=vectors.txt [--neighbours=king] [--all]`.

--analogy=man,king,woman prints the words that are to "woman" as "king" is to "man". --all prints the rank correlation
with WordSim-353 and SimLex-999 and the accuracy on analogies (downloaded as assets). --map=FILE.png plots words on the
first two principal components; the default is the 150 most frequent words of more than three letters.
"""

import pathlib

from llm_jax import cli
from llm_jax.embeddings import measure, vectors
from llm_jax.errors import UserError
from llm_jax.pictures import word_maps

FLAGS = cli.Flags()
FLAGS.string(
    "vectors",
    None,
    "word vectors in the binary (.bin) or text format of word2vec, or in the text format of fastText or GloVe",
    required=True,
)
FLAGS.enum(
    "encoding_errors",
    "strict",
    ["strict", "replace", "ignore"],
    "treatment of words that are not UTF-8: strict (an error), replace (by U+FFFD), or ignore (drop the bytes)",
)
FLAGS.multi_string("neighbours", [], "word whose nearest neighbours are printed, e.g. king; may be repeated")
FLAGS.multi_string(
    "analogy", [], "three words a,b,c: print the words that are to c as b is to a, e.g. man,king,woman; may be repeated"
)
FLAGS.integer("count", 10, "number of neighbours or answers to print")
FLAGS.boolean("all", False, "print the rank correlation with WordSim-353 and SimLex-999, and the accuracy on analogies")
FLAGS.string("map", "", "PNG file to write: a map of words on the first two principal components")
FLAGS.comma_separated(
    "words",
    [],
    "words on the map, separated by commas; default: the 150 most frequent words of more than three letters",
)
NEEDS: cli.Needs = (
    (("count",), "neither --neighbours nor --analogy is given", lambda f: f.neighbours or f.analogy),
    (("words",), "--map is not given", lambda f: f.map),
)


def main(f: cli.Flags) -> None:
    if f.count < 1:
        raise UserError(f"--count={f.count}; expected a positive number")
    word_vectors = vectors.load(pathlib.Path(f.vectors).expanduser(), f.encoding_errors)
    for word in f.neighbours:
        print(f"{word}: " + _listed(measure.neighbours(word_vectors, word, f.count)))
    for question in f.analogy:
        words = question.split(",")
        if len(words) != 3:
            raise UserError(f"--analogy={question}; expected three words, a,b,c")
        print(
            "{} : {} = {} : ".format(*words)
            + _listed(measure.analogy(word_vectors, words[0], words[1], words[2], f.count))
        )
    if f.all:
        from llm_jax.data import assets

        for name, title in (("wordsim", "WordSim-353"), ("simlex", "SimLex-999")):
            agreement = measure.agreement(word_vectors, assets.path(name))
            pairs = f"{agreement.pairs} of {agreement.of} pairs"
            print(f"{title}: rank correlation {agreement.correlation:.3f} over {pairs}")
        sections = measure.analogies(word_vectors, assets.path("analogies"))
        correct, total = (sum(s[i] for s in sections.values()) for i in (0, 1))
        print(f"analogies: {correct} of {total} correct ({correct / max(total, 1):.1%})")
    if f.map:
        words = f.words or [w for w in word_vectors.words if len(w) > 3][:150]
        word_maps.draw(word_vectors, words, pathlib.Path(f.map).expanduser())
        print(f"wrote {f.map}")


def _listed(scores: list[tuple[str, float]]) -> str:
    return ", ".join(f"{word} {score:.3f}" for word, score in scores)


COMMAND = cli.Command("probe_embeddings", main, FLAGS, needs=NEEDS)

if __name__ == "__main__":
    cli.start(COMMAND)
