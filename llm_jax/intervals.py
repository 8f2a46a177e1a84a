"""95 % confidence intervals of what runs and evaluations measure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate with the limits of its confidence interval."""

    estimate: float
    low: float
    high: float


def mean(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean of independent values, such as one for each seed, with Student's t-interval.

    Args:
      values: float (n,). With n = 1 the limits are NaN.
    """
    x = np.asarray(values, float)
    center = float(np.mean(x))
    if len(x) < 2:
        return Interval(center, math.nan, math.nan)
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(x) - 1)) * float(stats.sem(x))
    return Interval(center, center - half, center + half)


def paired(values: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> Interval:
    """The mean of `values - others`, whose items belong together (the same seed, row or example), with its t-interval.

    Raises:
      ValueError: the numbers of values differ.
    """
    return mean([a - b for a, b in zip(values, others, strict=True)])


def bootstrap(values: Sequence[float] | np.ndarray, seed: int = 0, draws: int = 2000) -> Interval:
    """The mean with the percentile interval of the bootstrap (Efron 1979), for values that are far from normal.

    Args:
      values: float (n,), one for each independent example.
      seed: seed of the resamples.
      draws: number of resamples.
    """
    x = np.asarray(values, float)
    means = x[np.random.default_rng(seed).integers(0, len(x), (draws, len(x)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(x.mean()), float(low), float(high))


def wilson(right: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The limits of the interval of the proportion right / count (Wilson 1927, "Probable inference").

    Args:
      z: the quantile of the normal distribution; by default that of a 95 % interval.
    """
    p, scale = right / count, 1 + z * z / count
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    center = p + z * z / (2 * count)
    # The limits at 0 and 1 are p itself, which rounding may miss.
    return max(0.0, min(p, (center - half) / scale)), min(1.0, max(p, (center + half) / scale))


def proportion(right: int, count: int) -> Interval:
    """The proportion right / count with Wilson's interval."""
    return Interval(right / count, *wilson(right, count))
