"""95 % confidence intervals for the results of runs and evaluations."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 2**20  # number of indices that the bootstrap draws at a time
_NORMAL_QUANTILE = 1.959963984540054  # for an interval of 95 %
FEWEST_UNITS = 5  # minimum effective number of units for an interval of `ratio`


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

    Raises:
      ValueError: there are no values.
    """
    x = np.asarray(values, float)
    if not len(x):
        raise ValueError("the bootstrap needs at least one value")
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    rows = max(1, _BLOCK // len(x))  # blocks draw the same numbers as one call for all resamples
    for start in range(0, draws, rows):
        block = means[start : start + rows]
        block[:] = x[generator.integers(0, len(x), (len(block), len(x)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(x.mean()), float(low), float(high))


def wilson(right: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The limits of the interval of the proportion right / count (Wilson 1927, "Probable inference"); NaN of 0 / 0.

    Args:
      z: the quantile of the normal distribution; the default gives a 95 % interval.
    """
    if not count:
        return math.nan, math.nan
    p, scale = right / count, 1 + z * z / count
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    center = p + z * z / (2 * count)
    # The limits at 0 and 1 are p itself, which rounding may miss.
    return max(0.0, min(p, (center - half) / scale)), min(1.0, max(p, (center + half) / scale))


def difference_of_proportions(right: np.ndarray, reference: np.ndarray) -> Interval:
    """The difference of two proportions of the same examples, with the limits of its 95 % interval.

    The adjusted Wald interval for matched pairs of Agresti and Min 2005, "Simple improved confidence intervals for
    comparing matched proportions": half an example is added to each of the four cells.

    Args:
      right, reference: bool (examples,).
    """
    count = len(right) + 2
    more, less = float(np.sum(right & ~reference)) + 0.5, float(np.sum(~right & reference)) + 0.5
    centre = (more - less) / count
    half = _NORMAL_QUANTILE * math.sqrt(more + less - (more - less) ** 2 / count) / count
    difference = float(np.mean(right) - np.mean(reference))
    return Interval(difference, min(difference, centre - half), max(difference, centre + half))


def ratio(amounts: np.ndarray, sizes: np.ndarray) -> Interval:
    """sum of amounts / sum of sizes, with the limits of its 95 % interval, of units that were sampled independently.

    The jackknife variance of a ratio (Cochran 1977, "Sampling techniques", section 6.17), with the quantile of
    Student's t distribution for `effective_count(sizes)` - 1 degrees of freedom. With fewer than `FEWEST_UNITS`
    effective units the limits are NaN: no interval covers where a few units make up the sum.

    Args:
      amounts, sizes: float (units,), such as differences in bits, and bytes, of documents.
    """
    count, total = len(amounts), float(np.sum(sizes))
    value = float(np.sum(amounts)) / total
    effective = effective_count(sizes)
    if effective < FEWEST_UNITS:
        return Interval(value, math.nan, math.nan)
    from scipy import stats

    without_unit = (amounts - value * sizes) / (total - sizes)  # decrease of the ratio without each unit
    error = math.sqrt((count - 1) / count * float(np.sum(np.square(without_unit))))
    half = float(stats.t.ppf(0.975, effective - 1)) * error
    return Interval(value, value - half, value + half)


def effective_count(sizes: np.ndarray) -> float:
    """(sum of sizes)^2 / sum of squared sizes (Kish 1965, "Survey sampling"): the number of units if sizes are equal.

    Args:
      sizes: float (units,), not all 0.
    """
    return float(np.sum(sizes)) ** 2 / float(np.sum(np.square(sizes)))
