"""Intervals, findings and the sections of READMEs."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from experiments import verdicts as experiment_verdicts
from llm_jax import intervals
from llm_jax.errors import UserError
from llm_jax.intervals import Interval
from llm_jax.research import findings, provenance
from tests.conftest import ROOT

EXPERIMENTS = ROOT / "experiments"


def test_the_interval_of_a_mean_is_students():
    # Student 1908, "The probable error of a mean": additional hours of sleep of ten patients.
    hours = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    expected = stats.ttest_1samp(hours, 0).confidence_interval(0.95)
    np.testing.assert_allclose(intervals.mean(hours), (2.33, expected.low, expected.high), rtol=1e-12)
    assert intervals.mean([2.0])[0] == 2.0 and all(map(math.isnan, intervals.mean([2.0])[1:]))


def test_pairs_are_compared_pair_by_pair():
    first, second = [1.0, 5.0, 9.0], [0.9, 4.9, 8.89]
    assert intervals.paired(first, second) == intervals.mean(np.subtract(first, second))
    assert intervals.paired(first, second).low > 0 > intervals.mean(first).estimate - intervals.mean(second).high
    with pytest.raises(ValueError):
        intervals.paired(first, second[:2])


def test_the_bootstrap_covers_the_mean_of_a_skewed_distribution():
    rng = np.random.default_rng(0)
    covered = [i.low < 1 < i.high for i in (intervals.bootstrap(rng.exponential(1, 60), draws=400) for _ in range(300))]
    assert 0.90 < np.mean(covered) < 0.97  # the percentile interval is known to be a little short here
    values = rng.exponential(1, 60)
    assert intervals.bootstrap(values) == intervals.bootstrap(values) != intervals.bootstrap(values, seed=1)


def test_findings_hold_what_they_were_given_and_survive_the_file(tmp_path):
    values = {
        "interval": Interval(1.0, 0.5, 1.5),
        "one seed": Interval(1.0, math.nan, math.nan),
        "number": 3,
        "nested": {"yes": True, "names": ["a", "b"], "seeds": [0.5, 0.25]},
        "text": "none",
        "empty": None,
    }
    result = findings.finding("P4", "loss, nats", values, "holds", command="python x.py", n=3, part="half")
    assert result.claim == "P4, half (loss, nats)"
    assert result["interval"] == findings.Estimate("interval", 1.0, 0.5, 1.5)
    assert result["one seed"] == findings.Estimate("one seed", 1.0)
    assert result["nested / yes"].estimate is True and result["nested / names"].text == "a, b"
    assert result["nested / seeds"].values == (0.5, 0.25)
    assert (result.command, result.n) == ("python x.py", 3) and re.fullmatch(r"\d{4}-\d\d-\d\d", result.date)
    findings.save(tmp_path, [result])
    assert findings.read(tmp_path / "results.json") == [result]
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN


def test_saving_keeps_the_findings_of_other_scripts_and_replaces_its_own(tmp_path):
    def make(statement, command):
        return findings.finding(statement, "m", 1.0, "holds", command=command)

    findings.save(tmp_path, [make("T2", "python a.py --seeds=3"), make("T4", "python a.py --seeds=3")])
    findings.save(tmp_path, [make("T3", "python b.py")])
    findings.save(tmp_path, [make("T1", "python a.py --seeds=5")])
    assert [r.statement for r in findings.read(tmp_path / "results.json")] == ["T1", "T3"]
    (tmp_path / "results.json").write_text('[{"claim": "x"}]')
    with pytest.raises(UserError, match="not a list of findings"):
        findings.read(tmp_path / "results.json")


def test_a_section_is_replaced_between_its_markers_only(tmp_path):
    path = tmp_path / "README.md"
    before = "# a\n<!-- results: written by x.py -->\nold\n<!-- end of results -->\nrest \\1\n"
    path.write_text(before)
    findings.replace_section(path, "results", ["", r"| \g<1> |", ""])
    assert path.read_text() == before.replace("old\n", "\n| \\g<1> |\n\n")
    for text in ("no markers", before * 2):
        path.write_text(text)
        with pytest.raises(UserError, match="expected one"):
            findings.replace_section(path, "results", [])
        assert path.read_text() == text


def test_provenance_names_machine_and_commit():
    assert re.search(r"\d+ cores, Python 3\.\d+\.\d+, jax 0\.", provenance.machine())
    assert re.fullmatch(r"([0-9a-f]{10}(\+changes)?)?", provenance.commit())


def test_the_table_of_all_verdicts_is_the_one_that_the_results_give():
    text = (EXPERIMENTS / "README.md").read_text()
    assert "\n".join(experiment_verdicts.table(EXPERIMENTS)) in text


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_every_readme_shows_the_verdicts_of_its_results(path):
    results = findings.read(path)
    assert results and all(result.estimates and result.command for result in results)
    text = (path.parent / "README.md").read_text()
    if "| claim | verdict |" in text:
        rows = findings.verdict_table(results)[3:-1]
        assert set(rows) == set(re.findall(r"^\| [A-Z]\d+b?,? .* \| \*\*.*\*\* \|$", text, re.M))
