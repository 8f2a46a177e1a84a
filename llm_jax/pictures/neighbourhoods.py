"""The neighbours of a word: in the embedding table, and by layer among the words of texts."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax import trees, weights
from llm_jax.embeddings import measure
from llm_jax.embeddings.vectors import WordVectors
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.pictures import forward
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Heatmaps, Panel, Picture, Table
from llm_jax.tokenizers import Tokenizer

# Letters of shapes: L layers and the embeddings below them, W words, D width, K neighbours.

_WORD = re.compile(r"\w+")
_CONTEXT = 2  # words on each side of a word that distinguish its occurrences


@dataclasses.dataclass(frozen=True)
class Neighbourhood(Drawable):
    """The nearest words or tokens by cosine similarity.

    Attributes:
      word: the word whose neighbours these are, in its context where the neighbours are those of a text.
      levels: "embedding table", or "embeddings" and "layer 0", ..., each with K neighbours.
      neighbours: for each level, the K nearest, nearest first.
      cosines: float64 (levels, K), their cosine similarities.
    """

    word: str
    levels: tuple[str, ...]
    neighbours: tuple[tuple[str, ...], ...]
    cosines: np.ndarray

    def picture(self) -> Picture:
        count = self.cosines.shape[1]
        if len(self.levels) == 1:
            rows = tuple(zip(self.neighbours[0], map(float, self.cosines[0]), strict=True))
            panels: tuple[Panel, ...] = (Table(self.levels[0], ("token", "cosine similarity"), rows),)
            return Picture(f"Neighbours of {self.word}", panels)
        columns = ("layer", *(f"neighbour {i + 1}" for i in range(count)))
        table = tuple(
            (level, *(f"{name} {cosine:.3f}" for name, cosine in zip(names, cosines, strict=True)))
            for level, names, cosines in zip(self.levels, self.neighbours, self.cosines, strict=True)
        )
        names = tuple(dict.fromkeys(name for level in self.neighbours for name in level))
        values = np.full((len(self.levels), len(names)), np.nan)
        for row, level, cosines in zip(values, self.neighbours, self.cosines, strict=True):
            row[[names.index(name) for name in level]] = cosines
        title = "cosine similarity to the nearest words, by layer"
        heat = Heatmaps(title, ("",), values[None], self.levels, names, "", float(np.nanmin(values)), 1.0)
        return Picture(f"Neighbours of {self.word}", (Table("nearest words, by layer", columns, table), heat))


def embeddings(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    word: str,
    texts: Sequence[str] = (),
    count: int = 8,
) -> Neighbourhood:
    """The neighbours of a word.

    Args:
      params: in the layout of `model.config`.
      word: a word. Without texts it is also looked up with a space before it, as it stands within a text.
      texts: the neighbours are words of these texts, by layer; the first occurrence of `word` in them is the one whose
        neighbours are searched. A word's vector is the mean over its tokens. (): neighbours are tokens of the
        vocabulary, by the embedding table.
      count: how many neighbours.

    Raises:
      UserError: `word` is empty or not in the texts, or the texts have no other word.
    """
    if not word or count < 1:
        raise UserError(f"word={word!r}, count={count}; expected a word, and at least 1 neighbour")
    return (
        _in_texts(model, params, tokenizer, word, texts, count) if texts else _in_table(params, tokenizer, word, count)
    )


def _in_table(params: Any, tokenizer: Tokenizer, word: str, count: int) -> Neighbourhood:
    table = np.asarray(weights.dense(trees.flatten(params)["embed/table"]), np.float32)
    size = min(len(table), tokenizer.vocab_size)
    candidates = [tokenizer.encode(text) for text in (f" {word}", word)]
    ids = min(candidates, key=len)
    labels = forward.labels(tokenizer, range(size))
    vector = table[ids].mean(0)
    # The word itself is the last row, so that tokens of equal text do not hide it.
    words = (*(f"{i}\0{label}" for i, label in enumerate(labels)), "word")
    vectors = WordVectors(words, np.concatenate([table[:size], vector[None]]))
    query_names = {f"{i}\0{labels[i]}" for i in ids}
    nearest = measure.neighbours(vectors, "word", count + len(ids))
    neighbours = [(name.partition("\0")[2], cosine) for name, cosine in nearest if name not in query_names][:count]
    names = tuple(repr(name) for name, _ in neighbours)
    return Neighbourhood(repr(word), ("embedding table",), (names,), np.array([[cosine for _, cosine in neighbours]]))


def _in_texts(
    model: Transformer, params: Any, tokenizer: Tokenizer, word: str, texts: Sequence[str], count: int
) -> Neighbourhood:
    rows = [forward.text_ids(model, params, tokenizer, text) for text in texts]
    hidden = np.stack(forward.capture(model, params, rows).hidden_states).astype(np.float64)  # (L, B, T, D)
    labels: list[str] = []
    vectors: list[np.ndarray] = []
    query = -1
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        for index, (label, tokens) in enumerate(words_of(tokenizer, text, row)):
            if query < 0 and label.casefold() == word.casefold():
                query = len(labels)
            labels.append(_in_context(text, index))
            vectors.append(hidden[:, i, tokens].mean(1))
    if query < 0:
        raise UserError(f"word={word!r} does not occur in the texts")
    if len(labels) < 2:
        raise UserError("the texts have no other word than the one whose neighbours are searched")
    vectors_LWD = np.stack(vectors, 1)
    vectors_LWD /= np.maximum(np.linalg.norm(vectors_LWD, axis=-1, keepdims=True), 1e-12)
    cosines_LW = np.einsum("lwd,ld->lw", vectors_LWD, vectors_LWD[:, query])
    cosines_LW[:, query] = -np.inf
    order = np.argsort(-cosines_LW, axis=1, kind="stable")[:, : min(count, len(labels) - 1)]
    names = tuple(tuple(labels[i] for i in row) for row in order)
    levels = ("embeddings", *(f"layer {i}" for i in range(model.config.num_layers)))
    return Neighbourhood(labels[query], levels, names, np.take_along_axis(cosines_LW, order, 1))


def words_of(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Each word of a text, and the indices of the ids of which it consists.

    Args:
      ids: of the text, with special tokens of the tokenizer before and after them.
    """
    plain = tokenizer.encode(text)
    before = next((i for i in range(len(ids)) if list(ids[i : i + len(plain)]) == plain), 0)
    ends = [len(text[: match.start()].encode()) for match in _WORD.finditer(text)]
    sizes = [len(match[0].encode()) for match in _WORD.finditer(text)]
    spans = tokenizer.spans(text)
    words = []
    for match, begin, size in zip(_WORD.finditer(text), ends, sizes, strict=True):
        inside = [before + k for k, (b, e) in enumerate(spans) if b < begin + size and e > begin]
        if inside:
            words.append((match[0], inside))
    return words


def _in_context(text: str, index: int) -> str:
    """The word of this index within its neighbours, such as "the [bank] of the"."""
    words = _WORD.findall(text)
    before, after = words[max(0, index - _CONTEXT) : index], words[index + 1 : index + 1 + _CONTEXT]
    return " ".join([*before, f"[{words[index]}]", *after])
