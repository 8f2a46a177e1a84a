"""What word vectors know: neighbours, analogies, agreement with people's ratings of pairs."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from llm_jax.embeddings.vectors import WordVectors
from llm_jax.errors import UserError

_AT_ONCE = 1024  # questions whose scores are held


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlation with people, over the `pairs` of `of` whose words both have vectors."""

    correlation: float
    pairs: int
    of: int


def neighbours(vectors: WordVectors, word: str, count: int = 10) -> list[tuple[str, float]]:
    """The words nearest to `word` by cosine, nearest first. Raises UserError for a word that is not there."""
    return _nearest(vectors, vectors[word], {word}, count)


def analogy(vectors: WordVectors, a: str, b: str, c: str, count: int = 10) -> list[tuple[str, float]]:
    """a is to b as c is to ...: nearest to b - a + c of unit vectors, the three left out (Mikolov et al. 2013)."""
    unit = {word: vectors[word] / np.maximum(np.linalg.norm(vectors[word]), 1e-12) for word in (a, b, c)}
    return _nearest(vectors, unit[b] - unit[a] + unit[c], {a, b, c}, count)


def cosine(vectors: WordVectors, one: str, other: str) -> float:
    """The cosine of two words. Raises UserError for a word that is not there."""
    x, y = vectors[one], vectors[other]
    return float(x @ y / np.maximum(np.linalg.norm(x) * np.linalg.norm(y), 1e-12))


def agreement(vectors: WordVectors, path: pathlib.Path) -> Agreement:
    """Cosines against the ratings of a file of "word<TAB>word<TAB>rating" lines (# begins a comment).

    Words are looked up in lower case. Of fewer than two pairs the correlation is NaN.

    Raises:
      UserError: the file cannot be read or is of another form.
    """
    rated = []
    for number, line in enumerate(_lines(path), 1):
        try:
            one, other, rating = line.lower().split("\t")[:3]
            rated.append((one.strip(), other.strip(), float(rating)))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is {line!r}; expected word, word and rating, by tabs") from error
    known = [(cosine(vectors, a, b), r) for a, b, r in rated if a in vectors and b in vectors]
    if len(known) < 2:
        return Agreement(float("nan"), len(known), len(rated))
    return Agreement(spearman(*np.array(known).T), len(known), len(rated))


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. NaN where all of one are equal."""
    a, b = (ranks - ranks.mean() for ranks in (_ranks(np.asarray(x)), _ranks(np.asarray(y))))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else float("nan")


def analogies(vectors: WordVectors, path: pathlib.Path) -> dict[str, tuple[int, int]]:
    """section -> (right, asked) of a file of analogies (": section" lines, and "a b c d" lines).

    Asked are those whose four words all have vectors; the answer is the nearest to b - a + c.

    Raises:
      UserError: the file cannot be read or is of another form.
    """
    found: dict[str, tuple[int, int]] = {}
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
    for section, asked in questions.items():
        right = 0
        for start in range(0, len(asked), _AT_ONCE):
            a, b, c, d = np.array(asked[start : start + _AT_ONCE]).T
            scores = (unit[b] - unit[a] + unit[c]) @ unit.T
            rows = np.arange(len(a))
            for given in (a, b, c):
                scores[rows, given] = -np.inf
            right += int((scores.argmax(1) == d).sum())
        found[section] = (right, len(asked))
    return found


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
