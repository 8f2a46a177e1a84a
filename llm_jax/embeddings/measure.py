"""Evaluation of word vectors: nearest neighbours, analogies, and correlation with human similarity ratings."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from llm_jax.embeddings.vectors import WordVectors
from llm_jax.errors import UserError

_BATCH = 1024  # questions whose scores are in memory at a time


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Correlation with human ratings.

    Attributes:
      correlation: Spearman's rank correlation.
      pairs: rated pairs whose words both have vectors, over which it is computed.
      of: all rated pairs.
    """

    correlation: float
    pairs: int
    of: int


def neighbours(vectors: WordVectors, word: str, count: int = 10) -> list[tuple[str, float]]:
    """The words nearest to `word` by cosine similarity, nearest first. Raises UserError for an unknown word."""
    return _nearest(vectors, vectors[word], {word}, count)


def analogy(vectors: WordVectors, a: str, b: str, c: str, count: int = 10) -> list[tuple[str, float]]:
    """Answers "a is to b as c is to ...": the words nearest to b - a + c of unit vectors, the three left out.

    Mikolov et al. 2013, arXiv:1301.3781. Raises UserError for an unknown word.
    """
    unit = {word: vectors[word] / np.maximum(np.linalg.norm(vectors[word]), 1e-12) for word in (a, b, c)}
    return _nearest(vectors, unit[b] - unit[a] + unit[c], {a, b, c}, count)


def cosine(vectors: WordVectors, first: str, second: str) -> float:
    """The cosine similarity of two words. Raises UserError for an unknown word."""
    x, y = vectors[first], vectors[second]
    return float(x @ y / np.maximum(np.linalg.norm(x) * np.linalg.norm(y), 1e-12))


def agreement(vectors: WordVectors, path: pathlib.Path) -> Agreement:
    """Correlates cosines with the ratings of a file of "word<TAB>word<TAB>rating" lines (# begins a comment).

    Words are looked up in lower case. With fewer than two known pairs the correlation is NaN.

    Raises:
      UserError: the file cannot be read or has another format.
    """
    rated = []
    for number, line in enumerate(_lines(path), 1):
        try:
            first, second, rating = line.lower().split("\t")[:3]
            rated.append((first.strip(), second.strip(), float(rating)))
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} is {line!r}; expected a word, a word and a rating, separated by tabs"
            ) from error
    known = [(cosine(vectors, a, b), r) for a, b, r in rated if a in vectors and b in vectors]
    if len(known) < 2:
        return Agreement(float("nan"), len(known), len(rated))
    return Agreement(spearman(*np.array(known).T), len(known), len(rated))


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. NaN if all values of one are equal."""
    a, b = (ranks - ranks.mean() for ranks in (_ranks(np.asarray(x)), _ranks(np.asarray(y))))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else float("nan")


def analogies(vectors: WordVectors, path: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Accuracy on a file of analogies (": section" lines and "a b c d" lines): {section: (correct, questions)}.

    Questions with a word without a vector are left out; the answer is the word nearest to b - a + c.

    Raises:
      UserError: the file cannot be read or has another format.
    """
    results: dict[str, tuple[int, int]] = {}
    questions: dict[str, list[list[int]]] = {}
    section = "all"
    for number, line in enumerate(_lines(path), 1):
        words = line.lower().split()
        if line.startswith(":"):
            section = line[1:].strip()
        elif len(words) != 4:
            raise UserError(f"{path}: line {number} is {line!r}; expected four words")
        elif all(w in vectors for w in words):
            questions.setdefault(section, []).append([vectors.index[w] for w in words])
    unit = vectors.directions()
    for section, rows in questions.items():
        correct = 0
        for start in range(0, len(rows), _BATCH):
            a, b, c, d = np.array(rows[start : start + _BATCH]).T
            scores = (unit[b] - unit[a] + unit[c]) @ unit.T
            for excluded in (a, b, c):
                scores[np.arange(len(a)), excluded] = -np.inf
            correct += int((scores.argmax(1) == d).sum())
        results[section] = (correct, len(rows))
    return results


def _nearest(vectors: WordVectors, query: np.ndarray, without: set[str], count: int) -> list[tuple[str, float]]:
    scores = vectors.directions() @ (query / np.maximum(np.linalg.norm(query), 1e-12))
    order = np.argsort(-scores, kind="stable")[: count + len(without)]
    return [(vectors.words[i], float(scores[i])) for i in order if vectors.words[i] not in without][:count]


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _lines(path: pathlib.Path) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return [line for line in lines if line.strip() and not line.startswith("#")]
