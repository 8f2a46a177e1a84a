"""Intervals of what evaluations measure."""

import math


def wilson(right: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The confidence interval of the proportion right / count: the limits of Wilson 1927, "Probable inference".

    Args:
      z: the quantile of the normal distribution; by default that of a 95 % interval.
    """
    p, scale = right / count, 1 + z * z / count
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    centre = p + z * z / (2 * count)
    # The limits at 0 and 1 are p itself, which rounding may miss.
    return max(0.0, min(p, (centre - half) / scale)), min(1.0, max(p, (centre + half) / scale))
