"""What word vectors know: `python -m llm_jax.probe_embeddings --vectors=vectors.txt [--neighbours=king] [--all]`.

--analogy=man,king,woman asks what is to "woman" as "king" is to "man". --all prints the correlation with
WordSim-353 and SimLex-999 and the analogies' accuracy (assets of `llm_jax.assets`); --map=FILE.png draws
the words of --words (by default the 150 most frequent of more than three letters) on their first two principal axes.
"""

import pathlib

from llm_jax import cli
from llm_jax.embeddings import measure, picture, vectors
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.string("vectors", None, "a file of word2vec's text or (.bin) binary form", required=True)
FLAGS.multi_string("neighbours", [], "words whose neighbours are printed")
FLAGS.multi_string("analogy", [], "three words, a,b,c: a is to b as c is to ...")
FLAGS.integer("count", 10, "neighbours and answers to print")
FLAGS.boolean("all", False, "agreement with people's ratings, and analogies")
FLAGS.string("map", "", "a picture to write")
FLAGS.comma_separated("words", [], "the words on the map")
NEEDS: cli.Needs = (
    (("count",), "neither --neighbours nor --analogy is given", lambda f: f.neighbours or f.analogy),
    (("words",), "--map is not given", lambda f: f.map),
)


def main(f: cli.Flags) -> None:
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
        picture.draw(found, words, pathlib.Path(f.map).expanduser())
        print(f"wrote {f.map}")


def _listed(found: list[tuple[str, float]]) -> str:
    return ", ".join(f"{word} {score:.3f}" for word, score in found)


COMMAND = cli.Command("probe_embeddings", main, FLAGS, needs=NEEDS)

if __name__ == "__main__":
    cli.start(COMMAND)
