"""Intervals of what evaluations measure."""

import math

import numpy as np
import scipy.stats

_QUANTILE = 1.959963984540054  # of the normal distribution, for an interval of 95 %


def wilson(right: int, count: int, z: float = _QUANTILE) -> tuple[float, float]:
    """The confidence interval of the proportion right / count: the limits of Wilson 1927, "Probable inference".

    Args:
      z: the quantile of the normal distribution; by default that of a 95 % interval.
    """
    p, scale = right / count, 1 + z * z / count
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    centre = p + z * z / (2 * count)
    # The limits at 0 and 1 are p itself, which rounding may miss.
    return max(0.0, min(p, (centre - half) / scale)), min(1.0, max(p, (centre + half) / scale))


def difference_of_proportions(right: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """(the difference of two proportions of the same examples, the limits of its 95 % interval).

    The adjusted Wald interval for matched pairs of Agresti and Min 2005, "Simple improved confidence intervals for
    comparing matched proportions": half an example is added to each of the four cells.

    Args:
      right, reference: bool (examples,).
    """
    count = len(right) + 2
    more, less = float(np.sum(right & ~reference)) + 0.5, float(np.sum(~right & reference)) + 0.5
    centre = (more - less) / count
    half = _QUANTILE * math.sqrt(more + less - (more - less) ** 2 / count) / count
    difference = float(np.mean(right) - np.mean(reference))
    return difference, min(difference, centre - half), max(difference, centre + half)


def ratio(amounts: np.ndarray, sizes: np.ndarray) -> tuple[float, float, float]:
    """(sum of amounts / sum of sizes, the limits of its 95 % interval) of units that were sampled independently.

    The linearized variance of a ratio (Cochran 1977, "Sampling techniques", equation 6.13), with the quantile of
    Student's t distribution. Of a single unit, the limits are infinite.

    Args:
      amounts, sizes: float (units,), such as differences in bits, and bytes, of documents.
    """
    count, total = len(amounts), float(np.sum(sizes))
    value = float(np.sum(amounts)) / total
    if count < 2:
        return value, -math.inf, math.inf
    variance = count / (count - 1) * float(np.sum(np.square(amounts - value * sizes)))
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * math.sqrt(variance) / total
    return value, value - half, value + half
