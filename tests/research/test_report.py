"""The page about runs: its data, that it is self-contained, and, with a browser, what it does."""

import dataclasses
import html
import json
import logging
import os
import re
import shutil
import subprocess
import warnings

import pytest

from llm_jax import intervals
from llm_jax.research import page, plots, runs
from tests.conftest import call
from tests.research.test_compare import write_run

HOSTILE = "</script><script>document.title='broken'</script><!-- <b>bold</b> & text"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three position schemes at two learning rates from two seeds; bits per byte from 2.0 to 2.5."""
    directory = tmp_path_factory.mktemp("sweep")
    for k, kind in enumerate(("rope", "alibi", "none")):
        for r, rate in enumerate((1e-3, 1e-2)):
            for seed in range(2):
                write_run(
                    directory / f"{kind}-{rate}-{seed}", 2 + 0.2 * k + 0.1 * r + 0.01 * seed, sample=HOSTILE,
                    train__seed=seed, model__position__kind=kind, optim__lr=rate,
                )  # fmt: skip
    return directory


def test_the_data_has_groups_differences_and_curves(sweep):
    data = page.data(runs.load([sweep]))
    assert data["options"] == ["model.position.kind", "optim.lr"] and len(data["groups"]) == 6
    first, second = data["groups"][:2]
    assert first["options"] == {"model.position.kind": "alibi", "optim.lr": 0.001} and first["seeds"] == [0, 1]
    assert first["result"] == pytest.approx(intervals.mean([2.2, 2.21])._asdict())
    assert first["best"] == {"value": pytest.approx(2.1), "examples": "all rows", "is_of_other_examples": False}
    assert first["final_points"] == {}
    assert first["memory"] == 512 and first["minutes"] == 1.5 and first["samples"][-1]["text"] == HOSTILE
    assert first["values"] == {0: 2.2, 1: 2.21} and second["values"] == pytest.approx({0: 2.3, 1: 2.31})
    assert data["quantiles"] == [None, None, pytest.approx(12.7062, abs=1e-4)]
    assert data["metrics"][:2] == ["validation_bits_per_byte", "loss"] and "tokens_per_second" in data["metrics"]
    curve = second["curves"]["validation_bits_per_byte"]
    assert curve["step"] == [2, 4] and curve["low"] == [2.2, 2.3] and curve["high"] == [2.21, 2.31]
    assert data["common"]["train.steps"] == "4" and "train.seed" not in data["common"]


def test_the_page_grows_with_the_number_of_groups_not_with_its_square(sweep):
    run = runs.load([sweep])[0]
    sizes = []
    for count in (20, 40, 80):
        many = [
            dataclasses.replace(run, config={**run.config, "optim.lr": 1e-6 * (10 + i)}, metrics=[], samples=[])
            for i in range(count)
        ]
        sizes.append(len(json.dumps(page.data(many))))
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])


def test_long_curves_are_thinned_by_means_and_keep_their_last_step(tmp_path):
    run = runs.read(write_run(tmp_path / "a", steps=1000))
    curve = page.curve(runs.group([run])[0], "loss")
    assert len(curve["step"]) == 300 and curve["step"][-1] == 1000 and curve["step"][0] == 4
    assert curve["mean"][0] == pytest.approx(sum(4 - i / 1000 for i in range(4)) / 4)


def test_the_command_writes_a_page_without_references_and_two_pictures(sweep, tmp_path):
    output = tmp_path / "out" / "page.html"
    done = call("report", str(sweep), f"--output={output}", "--title=a < b")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.parent.iterdir()) == ["page-curves.png", "page-results.png", "page.html"]
    assert (output.parent / "page-curves.png").read_bytes()[:4] == b"\x89PNG"
    text = output.read_text()
    assert "<title>a &lt; b</title>" in text
    assert not re.search(r"""(src|href)\s*=|@import|url\(|\bfetch\(|https?://(?!www\.w3\.org)""", text)
    # What a model wrote cannot end the script that holds it.
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(block)["groups"][0]["samples"][-1]["text"] == HOSTILE
    assert text.count("<script") == text.count("</script>") == 2
    assert call("report", str(sweep), "--nopng").stdout.strip() == str(sweep / "report.html")


def test_matplotlib_prints_no_warning(tmp_path, capsys):
    """Not of characters that its font lacks, of names that a legend leaves out, and that it builds its font cache."""
    for name in ("_old", "_文字 $x_1$"):
        write_run(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(plots.draw(runs.load([tmp_path]), tmp_path, "x")) == 2
    logging.getLogger("matplotlib.font_manager").warning("Matplotlib is building the font cache")
    assert capsys.readouterr().err == ""


def test_wrong_arguments_are_one_line(tmp_path, sweep):
    for flags, message in (
        ([], "name at least one run"),
        ([str(sweep), "--output=x.pdf"], "ends in .html"),
        ([str(tmp_path)], "no run in this directory"),
    ):
        done = call("report", *flags)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_runs_that_have_just_begun_are_shown(tmp_path):
    path = write_run(tmp_path / "a", done=False)
    (path / "metrics.jsonl").write_text("")
    data = page.data(runs.load([path]))
    assert data["metrics"] == [] and data["groups"][0]["result"] is None
    assert "a" in page.render(runs.load([path]), "a")


# ---------------------------------------------------------------- in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Collects the errors of the page under test, in its frame.
WATCH = """<script>window.problems = [];
window.addEventListener("error", (event) => window.problems.push(event.message));
console.error = console.warn = (...text) => window.problems.push(text.join(" "));</script>"""
DRIVER = """<!doctype html><body>
<iframe id="frame" style="width:%(width)dpx;height:900px;border:0" srcdoc="%(page)s"></iframe>
<pre id="result"></pre><script>
document.getElementById("frame").addEventListener("load", (event) => {
  const frame = event.target.contentWindow, page = frame.document, report = {};
%(use)s  report.problems = frame.problems;
  document.getElementById("result").textContent = JSON.stringify(report);
});
</script></body>"""
# What the driver page does with the report.
USE = """  const all = (selector) => [...page.querySelectorAll(selector)];
  const column = (n) => all(`#groups tbody tr td:nth-child(${n})`).map((cell) => cell.textContent);
  const change = (id, value, kind) => {
    page.getElementById(id).value = value;
    page.getElementById(id).dispatchEvent(new frame.Event(kind));
  };
  report.title = page.title;
  report.summary = page.getElementById("summary").textContent;
  report.heads = all("#groups th").map((cell) => cell.textContent);
  const head = (text) => all("#groups th button").find((button) => button.textContent.startsWith(text));
  head("bits per byte").click();
  report.ascending = column(4).map(parseFloat);
  head("bits per byte").click();
  report.descending = column(4).map(parseFloat);
  report.sorted = page.querySelector("#groups th[aria-sort=descending]").textContent;
  head("model.position.kind").click();
  report.kinds = column(1);
  change("filter", "alibi lr=0.01", "input");
  report.filtered = [column(1), column(2)];
  change("filter", "", "input");
  change("baseline", "2", "change");
  report.baseline = all("#groups tr.baseline").map((row) => row.textContent);
  report.differences = column(5);
  report.worse = all("#groups td.worse").length;
  report.lines = all("#curves polyline").length;
  report.bands = all("#curves polygon").length;
  all("#legend button")[0].click();
  report.hidden = all("#curves polyline").length;
  all("#legend button")[0].click();
  change("metric", "tokens_per_second", "change");
  page.getElementById("log").click();
  report.metric = page.querySelector("#curves svg").getAttribute("aria-label");
  report.finite = !page.body.innerHTML.includes("NaN");
  report.parallel = all("#parallel polyline").length;
  report.samples = all("#samples pre").map((block) => block.textContent);
  report.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  const texts = all("p, td, th, button, select, input");
  report.font = Math.min(...texts.map((text) => parseFloat(frame.getComputedStyle(text).fontSize)));
  report.labels = Math.min(...all("svg text").map((text) => 12 * text.getScreenCTM().a));
  report.colors = [frame.getComputedStyle(page.body).backgroundColor, frame.getComputedStyle(page.body).color];
"""


def drive(text, tmp_path, width, dark, use=USE):
    """What the driver page reports after it has used a page in a frame of this width."""
    browser = os.environ.get("BROWSER_BINARY") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no Chromium: install one, or name it by BROWSER_BINARY")
    watched = text.replace("<head>", f"<head>{WATCH}", 1)
    driver = tmp_path / "driver.html"
    driver.write_text(DRIVER % {"width": width, "page": html.escape(watched), "use": use})
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += [
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=10000",
        "--dump-dom",
    ]
    done = subprocess.run([browser, *options, driver.as_uri()], capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="result">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    return json.loads(html.unescape(match[1]))


WIDE = """  const all = (selector) => [...page.querySelectorAll(selector)];
  const choose = (id, value) => {
    page.getElementById(id).value = value;
    page.getElementById(id).dispatchEvent(new frame.Event("change"));
  };
  const overflow = (element) => element.scrollWidth - element.clientWidth;
  report.page = overflow(page.documentElement);
  report.table = overflow(page.getElementById("groups").parentElement);
  const right = (element) => element.getBoundingClientRect().right;
  report.baseline = right(page.getElementById("baseline")) - right(page.body);
  const boxes = all("#parallel text.mark").map((text) => text.getBoundingClientRect());
  report.marks = boxes.length;
  report.overlaps = boxes.filter((a, i) => boxes.slice(0, i).some((b) =>
    a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2)).length;
  const head = all("#groups th button").find((button) => button.textContent.startsWith("bits per byte"));
  head.click(); head.click();
  report.last = all("#groups tbody tr").at(-1).textContent;
  report.caption = page.getElementById("caption").textContent;
  report.diamonds = all("#curves path.final").length;
  const ends = all("#curves polyline").map((line) => line.getAttribute("points").split(" ").at(-1));
  report.ends = Math.max(...ends.map((point) => Number(point.split(",")[0])));
  report.diamond = Number(page.querySelector("#curves path.final").getAttribute("d").match(/L([\\d.]+)/)[1]);
  choose("metric", "loss");
  report.loss = [page.getElementById("caption").textContent, all("#curves path.final").length];
"""


@pytest.fixture(scope="module")
def wide_sweep(tmp_path_factory):
    """36 groups with long names and close learning rates, whose last evaluation is over other rows; one unfinished."""
    directory = tmp_path_factory.mktemp("wide")
    for k, kind in enumerate(("rope", "alibi", "learned")):
        for r, rate in enumerate((1e-3, 1.25e-3, 1.6e-3, 2e-3, 4e-3, 1e-2)):
            for s, schedule in enumerate(("cosine", "linear")):
                write_run(
                    directory / f"{kind}-{rate}-{schedule}", 2 + 0.2 * k + 0.02 * r + 0.01 * s, steps=6,
                    done=(k, r, s) != (2, 5, 1), model__position__kind=kind, optim__lr=rate, optim__schedule=schedule,
                    data__source=f"a/long/path/of/a/directory/with/texts/{kind}.txt",
                    eval__rows=16, eval__final_rows=128, eval__every=2,
                )  # fmt: skip
    return directory


@pytest.mark.live
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_a_wide_sweep_with_long_names_fits_the_window_and_has_separate_final_points(wide_sweep, tmp_path, width, dark):
    report = drive(page.render(runs.load([wide_sweep]), "a"), tmp_path, width, dark, WIDE)
    assert report["problems"] == [] and report["page"] <= 0 and report["baseline"] <= 0
    if width == 1280:
        assert report["table"] <= 0
    assert report["overlaps"] == 0 and report["marks"] >= 12
    assert report["last"].startswith("a/long/path/of/a/directory/with/texts/learned.txtlearned0.01linear1, 1 not")
    assert "Lines: evaluations over 16 rows. Diamonds: final evaluation over 128 rows" in report["caption"]
    # The curves end at step 4 of 6, the diamonds are at step 6.
    assert report["diamonds"] == 35 and report["ends"] < report["diamond"] - 50
    assert "rows" not in report["loss"][0] and report["loss"][1] == 0


@pytest.mark.live
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1100, True)])
def test_the_page_sorts_filters_and_draws_in_a_browser(sweep, tmp_path, width, dark):
    report = drive(page.render(runs.load([sweep]), "a <title>"), tmp_path, width, dark)
    assert report["problems"] == [] and report["title"] == "a <title>"
    assert report["summary"].startswith("12 runs in 6 groups")
    assert report["heads"][:5] == ["model.position.kind", "optim.lr", "seeds", "bits per byte", "difference"]
    assert report["ascending"] == pytest.approx([2.005, 2.105, 2.205, 2.305, 2.405, 2.505])
    assert report["descending"] == report["ascending"][::-1] and report["sorted"] == "bits per byte ↓"
    assert report["kinds"] == ["alibi", "alibi", "none", "none", "rope", "rope"]
    assert report["filtered"] == [["alibi"], ["0.01"]]
    assert len(report["baseline"]) == 1 and report["baseline"][0].startswith("none0.001")
    # Against none at 0.001, by kind: alibi, none, rope. The two seeds differ by equal amounts, up to rounding.
    differences = [text.split(" ")[0] for text in report["differences"]]
    assert differences == ["-0.2000", "-0.1000", "", "+0.1000", "-0.4000", "-0.3000"]
    assert report["lines"] == report["bands"] == 6 and report["hidden"] == 5 and report["parallel"] == 6
    assert report["metric"] == "tokens_per_second by step" and report["finite"]
    assert report["samples"] == ["early", HOSTILE] * 6
    assert report["overflow"] <= 0 and min(report["font"], report["labels"]) >= 11.5
    background, text = (sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in report["colors"])
    assert (background < 60 and text > 200) if dark else (background > 200 and text < 60)
