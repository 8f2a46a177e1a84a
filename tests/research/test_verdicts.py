"""The rules that turn figures into verdicts."""

import numpy as np
import pytest

from llm_jax import intervals
from llm_jax.intervals import Interval
from llm_jax.research import verdicts


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.2, 0.11, 0.3), "holds"),
        ((0.2, 0.1, 0.3), "undecided"),
        ((0.0, -0.2, 0.1), "undecided"),
        ((0.0, -0.2, 0.09), "fails"),
    ],
)
def test_above(interval, verdict):
    assert verdicts.above(Interval(*interval), 0.1) == verdict
    assert verdicts.all_above([Interval(1, 1, 1), Interval(*interval)], 0.1) == verdict
    nan = Interval(1.0, float("nan"), float("nan"))  # one seed decides nothing
    assert verdicts.above(nan) == verdicts.all_above([nan]) == "undecided"


def test_limits_without_intervals():
    assert [verdicts.within(x, 1, 2) for x in (0.99, 1, 2, 2.01)] == ["fails", "holds", "holds", "fails"]
    assert [verdicts.at_most(x, 1, 2) for x in (1, 1.01, 1.99, 2)] == ["holds", "undecided", "undecided", "fails"]
    values = ((0.5, 0.9), (0.49, 0.9), (0.0, 0.1), (0.0, 0.09))
    assert [verdicts.all_at_least(v, 0.5, 0.1) for v in values] == ["holds", "undecided", "undecided", "fails"]


def test_what_was_not_measured_is_undecided():
    nan = float("nan")
    assert verdicts.within(nan, 1, 2) == verdicts.at_most(nan, 1, 2) == verdicts.holds_for([], []) == "undecided"
    assert verdicts.all_at_least([5, nan], 1, 0) == verdicts.all_at_least([nan, 5], 1, 0) == "undecided"
    assert np.isnan(intervals.wilson(0, 0)).all()
    with pytest.raises(ValueError, match="at least one value"):
        intervals.bootstrap([])


@pytest.mark.parametrize("count", [1, 7, 1000, 3001])
def test_the_bootstrap_draws_the_same_resamples_in_blocks(monkeypatch, count):
    x = np.random.default_rng(1).normal(size=count)
    indices = np.random.default_rng(3).integers(0, count, (500, count))
    low, high = np.quantile(x[indices].mean(1), [0.025, 0.975])
    for block in (1, 5000, 2**20):
        monkeypatch.setattr(intervals, "_BLOCK", block)
        assert intervals.bootstrap(x, seed=3, draws=500) == Interval(float(x.mean()), float(low), float(high))


def test_verdict_texts_name_the_passing_conditions():
    assert verdicts.holds_when(["a", "b"], ["a", "b"]) == "holds"
    assert verdicts.holds_when(["a", "b"], ["a", "b", "c"], "the kind is") == "holds when the kind is a or b"
    assert verdicts.holds_when(["a"], ["a", "b"]) == "holds when a"
    assert verdicts.holds_when([], ["a"], none="undecided") == "undecided"
    assert [verdicts.holds_for(["x", "y"], p) for p in ((1, 1), (1, 0), (0, 1), (0, 0))] == [
        "holds",
        "holds for x only",
        "holds for y only",
        "fails",
    ]
