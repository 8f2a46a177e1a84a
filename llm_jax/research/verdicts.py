"""Rules that decide verdicts from results. A rule is written before the run."""

import math
from collections.abc import Sequence

from llm_jax.intervals import Interval

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"


def above(interval: Interval, threshold: float = 0.0) -> str:
    """Holds if the whole interval lies above the threshold, fails if it lies below, else undecided."""
    return HOLDS if interval.low > threshold else FAILS if interval.high < threshold else UNDECIDED


def all_above(intervals: Sequence[Interval], threshold: float = 0.0) -> str:
    """Holds if every interval lies above the threshold, fails if one lies below, else undecided."""
    verdicts = {above(interval, threshold) for interval in intervals}
    return FAILS if FAILS in verdicts else HOLDS if verdicts == {HOLDS} else UNDECIDED


def within(estimate: float, low: float, high: float) -> str:
    """Holds if low <= estimate <= high, else fails; undecided for NaN. For estimates without an interval."""
    if math.isnan(estimate):
        return UNDECIDED
    return HOLDS if low <= estimate <= high else FAILS


def at_most(estimate: float, holds: float, fails: float) -> str:
    """Holds if estimate <= holds, fails if estimate >= fails, else undecided. For estimates without an interval."""
    return HOLDS if estimate <= holds else FAILS if estimate >= fails else UNDECIDED


def all_at_least(values: Sequence[float], holds: float, fails: float) -> str:
    """Holds if the minimum is at least `holds`, fails if the maximum is below `fails`, else undecided.

    Undecided if a value is NaN.
    """
    if any(map(math.isnan, values)):
        return UNDECIDED
    return HOLDS if min(values) >= holds else FAILS if max(values) < fails else UNDECIDED


def holds_when(
    passing: Sequence[str], candidates: Sequence[str], noun: str = "", separator: str = " or ", none: str = FAILS
) -> str:
    """Holds if all candidates pass; "holds when NOUN A or B" if only A and B pass; `none` if no candidate passes."""
    if not passing:
        return none
    if len(passing) == len(candidates):
        return HOLDS
    return f"holds when {noun and f'{noun} '}{separator.join(passing)}"


def holds_for(names: Sequence[str], passing: Sequence[bool]) -> str:
    """The verdict of several parts: "holds", "holds for A only" or "fails"; "undecided" without parts."""
    if not passing:
        return UNDECIDED
    if all(passing):
        return HOLDS
    if not any(passing):
        return FAILS
    return f"holds for {' and '.join(name for name, passes in zip(names, passing, strict=True) if passes)} only"
