"""Repetition and diversity of texts, from their token ids."""

import collections
import math
from collections.abc import Sequence

Ids = Sequence[int]


def ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def distinct(texts: Sequence[Ids], n: int) -> float:
    """The number of different n-grams over the number of n-grams (Li et al. 2016, arXiv:1510.03055, section 5.3)."""
    grams = [g for text in texts for g in ngrams(text, n)]
    return len(set(grams)) / len(grams)


def loops(ids: Ids) -> bool:
    """Whether a text ends in three repetitions of a phrase of two tokens or more.

    The repetition of Holtzman et al. 2020, arXiv:1904.09751, section 5.
    """
    return any(list(ids[-n:]) * 3 == list(ids[-3 * n :]) for n in range(2, len(ids) // 3 + 1))


def bleu(candidate: Ids, references: Sequence[Ids], longest: int = 4) -> float:
    """BLEU of one text (Papineni et al. 2002, equation 3), 1 added to counts above single tokens (Lin and Och 2004)."""
    logs = 0.0
    for n in range(1, longest + 1):
        own = collections.Counter(ngrams(candidate, n))
        most: collections.Counter = collections.Counter()
        for reference in references:
            most |= collections.Counter(ngrams(reference, n))
        hits, total, add = (own & most).total(), own.total(), int(n > 1)
        if not hits + add:
            return 0.0
        logs += math.log((hits + add) / (total + add)) / longest
    nearest = min((abs(len(r) - len(candidate)), len(r)) for r in references)[1]
    return math.exp(logs + min(0.0, 1 - nearest / len(candidate)))


def self_bleu(texts: Sequence[Ids]) -> list[float]:
    """BLEU of every text against all others (Zhu et al. 2018, arXiv:1802.01886): high if texts are similar."""
    return [bleu(text, [*texts[:i], *texts[i + 1 :]]) for i, text in enumerate(texts)]
