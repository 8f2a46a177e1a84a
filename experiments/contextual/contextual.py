"""Do vectors depend on context? E5: ambiguous words by layer of the real MiniLM, beside its own static table.

    PYTHONPATH=. python experiments/contextual/contextual.py

senses.txt holds 25 words in two senses of five sentences each. For every layer, the cosines of a word's vectors are
averaged over pairs of sentences of the same sense (within) and of different senses (between); intervals are 95 %
t-intervals of the mean over words. Nearest: the share of sentences whose nearest other sentence with the word has its
sense, with Wilson's 95 % interval (4 of the 9 others do: chance is 0.44). Writes results.json, senses.png and the
tables in README.md.

The rule of the verdict was fixed before the run. E5 holds if the static table gives a cosine of 1 for every pair, and
in every layer above the embeddings the interval of within minus between lies above 0, and at the last layer within
exceeds between for "bank"; holds when the layer is one of those whose interval lies above 0; fails if none does.
"""

import pathlib

import numpy as np
from absl import flags

from llm_jax import checkpoints, cli
from llm_jax.checkpoints import Loaded
from llm_jax.embeddings import contextual
from llm_jax.errors import UserError
from llm_jax.intervals import Interval, mean, wilson
from llm_jax.research import experiments, findings, pictures, verdicts
from llm_jax.research.findings import Finding

HERE = pathlib.Path(__file__).parent
TABLE = "table"  # the rows of the embedding table, without positions and norm

flags.DEFINE_string("checkpoint", "asset:minilm-l6-v2", "whose vectors are asked")


def main() -> None:
    loaded = checkpoints.load(flags.FLAGS.checkpoint)
    words = read(HERE / "senses.txt")
    vectors = {word: occurrences(loaded, word, senses) for word, senses in words.items()}
    layers = list(vectors["bank"])
    table = {layer: figures({word: v[layer] for word, v in vectors.items()}) for layer in layers}
    draw(table, vectors["bank"][layers[-1]], experiments.output(__file__) / "senses.png")
    count = sum(len(s) for senses in words.values() for s in senses.values())
    lines = ["", f"{len(words)} words, {count} sentences.", "", *tables(table)]
    print(experiments.publish(__file__, [judge(table)], lines))


def read(path: pathlib.Path) -> dict[str, dict[str, list[str]]]:
    """word -> sense -> sentences."""
    words: dict[str, dict[str, list[str]]] = {}
    for line in filter(None, path.read_text().splitlines()):
        head, colon, sense = line.partition(": ")
        if colon and " " not in head:
            sentences = words.setdefault(head, {}).setdefault(sense, [])
        else:
            sentences.append(line)
    return words


def occurrences(loaded: Loaded, word: str, senses: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """layer -> the vectors of `word` in its sentences, float32 (senses, sentences, D)."""
    sentences = [s for by_sentence in senses.values() for s in by_sentence]
    forms = {tuple(loaded.tokenizer.encode(space + word)) for space in ("", " ")}
    places, rows = [], [contextual.ids(loaded, s) for s in sentences]
    for sentence, ids in zip(sentences, rows, strict=True):
        at = [i for i, one in enumerate(ids) if (one,) in forms]
        if len(at) != 1:
            raise UserError(f"senses.txt: {word!r} stands {len(at)} times as one token in {sentence!r}; expected once")
        places += at
    shape = (len(senses), -1, loaded.model.config.width)
    static = np.stack(
        [np.asarray(loaded.params["embed"]["table"][ids[i]]) for ids, i in zip(rows, places, strict=True)]
    )
    layers = contextual.token_vectors(loaded, sentences)
    at_word = np.stack([layer[:, i] for layer, i in zip(layers, places, strict=True)], 1)
    return {TABLE: static.reshape(shape)} | {str(i): one.reshape(shape) for i, one in enumerate(at_word)}


def cosines(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(senses, sentences, D) -> the cosines of all sentences, and whether two are of the same sense; both square."""
    flat = vectors.reshape(-1, vectors.shape[-1]).astype(np.float64)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    sense = np.repeat(np.arange(vectors.shape[0]), vectors.shape[1])
    return unit @ unit.T, sense[:, None] == sense


def figures(vectors: dict[str, np.ndarray]) -> dict:
    """Of one layer: means over words with their intervals, and by word."""
    by_word, right, count = {}, 0.0, 0
    for word, by_sentence in vectors.items():
        cosine, same = cosines(by_sentence)
        apart = ~np.eye(len(cosine), dtype=bool)
        by_word[word] = {"within": cosine[same & apart].mean(), "between": cosine[~same].mean()}
        nearest = np.where(apart, cosine, -2).argmax(1)
        ties = (cosine >= cosine[np.arange(len(cosine)), nearest][:, None] - 1e-9) & apart
        right += float((same & ties).sum(1) @ (1 / ties.sum(1)))  # equal ones share the answer
        count += len(cosine)
    of = {name: [w[name] for w in by_word.values()] for name in ("within", "between")}
    of["difference"] = np.subtract(of["within"], of["between"]).tolist()
    return {
        **{name: mean(values) for name, values in of.items()},
        "nearest": Interval(right / count, *wilson(round(right), count)),
        "words apart": sum(d > 1e-9 for d in of["difference"]),
        "words": by_word,
    }


def judge(table: dict) -> Finding:
    """The verdict by the rule above; `table` has the figures by layer."""
    inner = [layer for layer in table if layer not in (TABLE, "0")]
    apart = [layer for layer in inner if table[layer]["difference"][1] > 0]
    static = [w[name] for w in table[TABLE]["words"].values() for name in ("within", "between")]
    bank = table[inner[-1]]["words"]["bank"]
    others = np.allclose(static, 1, atol=1e-6) and bank["within"] > bank["between"]
    verdict = verdicts.holds_when(apart, inner if others else [], "the layer is", separator=", ")
    measure = "cosines of a word within and between its senses, by layer"
    return findings.finding("E5", measure, table, verdict)


def tables(table: dict) -> list[str]:
    """Markdown."""
    count, rows = len(table[TABLE]["words"]), []
    for layer, row in table.items():
        cosines = [findings.interval_text(row[name]) for name in ("within", "between", "difference")]
        bank = "{within:.3f} / {between:.3f}".format(**row["words"]["bank"])
        name = {TABLE: "static table", "0": "0 (with positions)"}.get(layer, layer)
        apart = f"{row['words apart']} of {count}"
        rows.append([name, *cosines, apart, findings.interval_text(row["nearest"]), bank])
    head = ["layer", "within", "between", "within - between", "words apart", "nearest has the sense", "bank"]
    return findings.markdown_table(head, rows)


def draw(table: dict, bank: np.ndarray, path: pathlib.Path) -> None:
    """Cosines by layer, and the occurrences of "bank" at the last layer on their first two principal axes."""
    with pictures.figure(path, 1, 2, figsize=(11, 4.5)) as (left, right):
        for name in ("within", "between"):
            middle, low, high = np.array([row[name] for row in table.values()]).T
            left.plot(list(table), middle, marker="o", label=f"{name} senses")
            left.fill_between(list(table), low, high, alpha=0.2)
        left.set(xlabel="layer", ylabel="cosine of a word's vectors, mean over words")
        left.legend()
        left.grid(alpha=0.3)
        flat = bank.reshape(-1, bank.shape[-1])
        axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:2]
        for vectors, sense, marker in zip(bank, ("river", "money"), "os", strict=True):
            right.scatter(*(axes @ (vectors - flat.mean(0)).T), marker=marker, s=60, label=f"bank ({sense})")
        right.set(xlabel="first principal axis", ylabel="second", title="bank, last layer")
        right.legend()
        right.grid(alpha=0.3)


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={}, runs="runs/contextual"))
