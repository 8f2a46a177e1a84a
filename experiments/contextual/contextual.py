"""Do vectors depend on context? E5: ambiguous words by layer of the real MiniLM, beside its own static table.

senses.txt has 25 words in two senses of five sentences each. By layer: the cosines of a word's vectors, averaged over
pairs of sentences of the same sense (within) and of different senses (between), with 95 % t-intervals over words; and
the share of sentences whose nearest other one with the word has its sense (chance: 4 of 9), with Wilson's interval.
"""

import pathlib

import numpy as np
from absl import flags

from llm_jax import checkpoints, cli
from llm_jax.checkpoints import Loaded
from llm_jax.embeddings import contextual
from llm_jax.errors import UserError
from llm_jax.intervals import Interval, mean, wilson
from llm_jax.research import experiments, findings, plots, verdicts
from llm_jax.research.findings import Finding

TABLE = "table"  # the rows of the embedding table, without positions and norm

flags.DEFINE_string("checkpoint", "asset:minilm-l6-v2", "the encoder or decoder that computes the vectors")


def main() -> None:
    loaded = checkpoints.load(flags.FLAGS.checkpoint)
    words = read(pathlib.Path(__file__).with_name("senses.txt"))
    vectors = {word: occurrences(loaded, word, senses) for word, senses in words.items()}
    by_layer = {layer: figures({word: v[layer] for word, v in vectors.items()}) for layer in vectors["bank"]}
    draw(by_layer, list(vectors["bank"].values())[-1], experiments.output(__file__) / "senses.png")
    count = sum(len(s) for senses in words.values() for s in senses.values())
    lines = ["", f"{len(words)} words, {count} sentences.", "", *table(by_layer)]
    print(experiments.publish(__file__, [judge(by_layer)], lines))


def read(path: pathlib.Path) -> dict[str, dict[str, list[str]]]:
    """{word: {sense: sentences}}."""
    words: dict[str, dict[str, list[str]]] = {}
    for line in filter(None, path.read_text().splitlines()):
        head, colon, sense = line.partition(": ")
        if colon and " " not in head:
            sentences = words.setdefault(head, {}).setdefault(sense, [])
        else:
            sentences.append(line)
    return words


def occurrences(loaded: Loaded, word: str, senses: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """{layer: the vectors of `word` in its sentences, float32 (senses, sentences, D)}."""
    sentences = [s for of_sense in senses.values() for s in of_sense]
    forms = {tuple(loaded.tokenizer.encode(space + word)) for space in ("", " ")}
    vectors = []
    for sentence, layers in zip(sentences, contextual.token_vectors(loaded, sentences), strict=True):
        ids = contextual.ids(loaded, sentence)
        places = [i for i, token in enumerate(ids) if (token,) in forms]
        if len(places) != 1:
            raise UserError(
                f"senses.txt: {word!r} stands {len(places)} times as one token in {sentence!r}; expected once"
            )
        vectors.append([loaded.params["embed"]["table"][ids[places[0]]], *layers[:, places[0]]])
    by_layer = np.moveaxis(np.asarray(vectors), 1, 0).reshape(len(vectors[0]), len(senses), -1, len(vectors[0][0]))
    return {str(i - 1) if i else TABLE: of_layer for i, of_layer in enumerate(by_layer)}


def figures(vectors: dict[str, np.ndarray]) -> dict:
    """The figures of one layer: means over words with their intervals, and values by word.

    Args:
      vectors: by word, float32 (senses, sentences, D).
    """
    by_word, right, count = {}, 0.0, 0
    for word, of_word in vectors.items():
        flat = of_word.reshape(-1, of_word.shape[-1]).astype(np.float64)
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        sense = np.repeat(np.arange(of_word.shape[0]), of_word.shape[1])
        cosine, same, other = unit @ unit.T, sense[:, None] == sense, ~np.eye(len(flat), dtype=bool)
        by_word[word] = {"within": cosine[same & other].mean(), "between": cosine[~same].mean()}
        nearest = np.where(other, cosine, -2).max(1)
        ties = (cosine >= nearest[:, None] - 1e-9) & other
        right += float((same & ties).sum(1) @ (1 / ties.sum(1)))  # equal ones share the answer
        count += len(cosine)
    values = {name: [w[name] for w in by_word.values()] for name in ("within", "between")}
    values["difference"] = np.subtract(values["within"], values["between"]).tolist()
    return {
        **{name: mean(of_words) for name, of_words in values.items()},
        "nearest": Interval(right / count, *wilson(round(right), count)),
        "words apart": sum(d > 1e-9 for d in values["difference"]),
        "words": by_word,
    }


def judge(by_layer: dict) -> Finding:
    """The verdict by the rule of statements.toml; `by_layer` has the figures."""
    inner = [layer for layer in by_layer if layer not in (TABLE, "0")]
    apart = [layer for layer in inner if by_layer[layer]["difference"].low > 0]
    static = [cosine for word in by_layer[TABLE]["words"].values() for cosine in word.values()]
    bank = by_layer[inner[-1]]["words"]["bank"]
    others = np.allclose(static, 1, atol=1e-6) and bank["within"] > bank["between"]
    verdict = verdicts.holds_when(apart, inner if others else [], "the layer is", separator=", ")
    return findings.finding("E5", "cosines of a word within and between its senses, by layer", by_layer, verdict)


def table(by_layer: dict) -> list[str]:
    rows = []
    for layer, row in by_layer.items():
        cosines = [findings.interval_text(row[name]) for name in ("within", "between", "difference")]
        bank = "{within:.3f} / {between:.3f}".format(**row["words"]["bank"])
        name = {TABLE: "static table", "0": "0 (with positions)"}.get(layer, layer)
        apart = f"{row['words apart']} of {len(row['words'])}"
        rows.append([name, *cosines, apart, findings.interval_text(row["nearest"]), bank])
    head = ["layer", "within", "between", "within - between", "words apart", "nearest has the sense", "bank"]
    return findings.markdown_table(head, rows)


def draw(by_layer: dict, bank: np.ndarray, path: pathlib.Path) -> None:
    """Cosines by layer, and the occurrences of "bank" at the last layer on their first two principal axes."""
    with plots.figure(path, 1, 2, figsize=(11, 4.5)) as (left, right):
        for name in ("within", "between"):
            middle, low, high = np.array([row[name] for row in by_layer.values()]).T
            left.plot(list(by_layer), middle, marker="o", label=f"{name} senses")
            left.fill_between(list(by_layer), low, high, alpha=0.2)
        left.set(xlabel="layer", ylabel="cosine of a word's vectors, mean over words")
        centred = bank - bank.mean((0, 1))
        axes = np.linalg.svd(centred.reshape(-1, bank.shape[-1]), full_matrices=False)[2][:2]
        for vectors, sense, marker in zip(centred, ("river", "money"), "os", strict=True):
            right.scatter(*(axes @ vectors.T), marker=marker, s=60, label=f"bank ({sense})")
        right.set(xlabel="first principal axis", ylabel="second", title="bank, last layer")


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={}, runs="runs/contextual"))
