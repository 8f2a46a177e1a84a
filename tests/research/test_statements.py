"""The page of all statements: every finding is on it, with its interval, the threshold of its rule, and the rule."""

import html
import importlib
import re
import subprocess
import sys

import pytest
from absl import flags

from experiments import statement_page
from experiments.statements import GROUPS, STATEMENTS, Picture
from llm_jax.intervals import Interval
from llm_jax.research import findings
from tests.conftest import ROOT
from tests.research.test_report import drive

EXPERIMENTS = ROOT / "experiments"


@pytest.fixture(scope="module")
def measured():
    return statement_page.measured(EXPERIMENTS)


def test_every_statement_is_on_the_page_with_its_verdicts_commands_and_published_figures(measured):
    page = statement_page.standalone(EXPERIMENTS)
    assert {name[0] for name in STATEMENTS} == set(GROUPS)
    for name, statement in STATEMENTS.items():
        assert f'<h3 id="{name.lower()}">' in page
        assert measured.get(name) or statement.tests, f"{name} is neither measured nor tested"
    for result, _ in (entry for entries in measured.values() for entry in entries):
        assert result.verdict and f">{result.verdict}</span>" in page and result.command in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import""", page)  # needs no other file


def test_every_measured_statement_has_a_rule_on_the_page(measured):
    page = statement_page.standalone(EXPERIMENTS)
    for name, statement in STATEMENTS.items():
        assert bool(statement.rule) == (name in measured), name
        assert f"<pre>{html.escape(statement.rule)}</pre>" in page or not statement.rule
    rule = STATEMENTS["P4"].rule
    assert rule.startswith("A *rise* is the loss") and rule.endswith("else undecided.") and "\n" not in rule
    assert "The rule" not in statement_page.card("P4", measured["P4"], short=True)


def test_every_picture_shows_estimates_and_every_interval_of_a_judged_finding_can_be_drawn(measured):
    for name, statement in STATEMENTS.items():
        for picture in statement.pictures:
            assert any(statement_page.draw(result, picture) for result, _ in measured[name]), (name, picture)


@pytest.mark.parametrize(
    ("statements", "module", "constant", "text"),
    [
        (["P4", "P7"], "length_extrapolation.report", "MARGIN", "{:g}"),
        (["L1", "L8", "L9"], "sentiment.report", "MARGIN", "above -{:.0f} point;"),
        (["Q1"], "quantization_quality.report", "MARGIN", "log 1.01"),
        (["W1"], "width_transfer.sweep", "MARGIN", "{:g} at every width"),
        (["T3"], "tokenization.sweep", "ENOUGH", "at least {:.0%}"),
    ],
)
def test_thresholds_are_those_of_the_rules(statements, module, constant, text):
    loaded = importlib.import_module(f"experiments.{module}")
    for flag in flags.FLAGS.flags_by_module_dict().pop(loaded.__name__, []):
        delattr(flags.FLAGS, flag.name)
    for name in statements:
        threshold, rule = getattr(loaded, constant), STATEMENTS[name].rule.replace(" %", "%")
        assert STATEMENTS[name].pictures[0].thresholds == (-threshold if "-" in text else threshold,)
        assert text.format(threshold) in rule, name


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("L4", ("8", "1.05")), ("L6", ("2.5", "3.5")), ("D3", (".005",)), ("S1", ("1.25",)), ("L7", ("80 %", "95 %"))],
)
def test_rules_name_the_thresholds_of_their_pictures(name, numbers):
    thresholds = [x for picture in STATEMENTS[name].pictures for x in picture.thresholds]
    assert thresholds == [float(x.removesuffix(" %")) / (100 if "%" in x else 1) for x in numbers]
    assert all(re.search(rf"(?<![\d.]){re.escape(x)}(?!\.?\d)", STATEMENTS[name].rule) for x in numbers)


def test_a_picture_places_estimates_intervals_and_thresholds_on_one_axis():
    values = {"a": Interval(1.0, 0.0, 2.0), "b": 4.0, "note": "text", "other": 100.0}
    result = findings.finding("P4", "loss", values, "holds", command="python x.py")
    drawn = statement_page.draw(result, Picture("a|b|note", (3.0,), "below"))
    # From 0 to 4 with a margin of 4 % on each side.
    place = [f"{100 * (x + 0.16) / 4.32:.2f}%" for x in (0.0, 1.0, 2.0, 3.0, 4.0)]
    assert f'x1="{place[0]}" x2="{place[2]}"' in drawn and drawn.count(f'<line class="limit" x1="{place[3]}"') == 2
    assert re.findall(r'cx="([^"]+)"', drawn) == [place[1], place[4]]
    assert "1 (0 to 2)" in drawn and "100" not in drawn.replace("100%", "") and "dashed: 3" in drawn
    assert statement_page.draw(result, Picture("nothing")) == ""


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [("holds when alibi", "holds"), ("fails as written", "fails"), ("undecided", "open"), (None, "open")],
)
def test_kinds_of_verdicts(verdict, kind):
    assert statement_page.kind(verdict) == kind


# What the driver page of the browser reads off the page.
READ = """  const all = (selector) => [...page.querySelectorAll(selector)];
  const root = page.documentElement, size = (e) => parseFloat(frame.getComputedStyle(e).fontSize);
  report.overflow = root.scrollWidth - root.clientWidth;
  report.font = Math.min(...all("p, span, figcaption, pre").map(size));
  report.lines = all(".row svg").map((svg) => svg.getBoundingClientRect().width);
  report.text = frame.getComputedStyle(page.body).color;
  report.mark = frame.getComputedStyle(page.querySelector("circle")).fill;
"""


@pytest.mark.live
@pytest.mark.parametrize(("width", "dark"), [(375, False), (375, True), (1100, True)])
def test_the_page_is_readable_on_a_small_screen_and_in_dark_mode(tmp_path, width, dark):
    report = drive(statement_page.standalone(EXPERIMENTS), tmp_path, width, dark, READ)
    assert report["problems"] == [] and report["overflow"] <= 0 and report["font"] >= 12
    assert len(report["lines"]) > 100 and min(report["lines"]) > (300 if width == 375 else 200)
    brightness = sum(map(int, re.findall(r"\d+", report["text"])[:3])) / 3
    assert (brightness > 200) == dark
    assert report["mark"] == ("rgb(121, 180, 255)" if dark else "rgb(10, 88, 181)")


@pytest.mark.slow
def test_the_tests_that_hold_statements_exist():
    for name, statement in STATEMENTS.items():
        if statement.tests:
            path, _, expression = statement.tests.partition(" -k ")
            command = [sys.executable, "-m", "pytest", "--collect-only", "-q", path, "-k", expression.strip('"')]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {done.stdout}"
