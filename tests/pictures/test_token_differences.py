"""The tokens on which two models differ most, against losses that are made up, and the section of the report."""

import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.data.rows import Rows
from llm_jax.errors import UserError
from llm_jax.pictures import render_html
from llm_jax.pictures.token_differences import TokenDifferences, token_differences
from llm_jax.research import held_out_tokens, page, runs
from llm_jax.training import losses
from tests.conftest import call
from tests.data.test_data import stream
from tests.research.test_compare import write_run
from tests.research.test_report import drive

BYTE = tokenizers.get("byte").train([], 0)


def test_the_largest_differences_are_listed_in_their_contexts():
    rows = Rows(stream(9, 12), 8)  # documents 1 100 101 ... 2, 1 200 201 ... 2
    target = {104: 3.0, 201: 2.0, 207: -4.0}  # bits that the second model loses more

    def loss(params, batch):
        bits = 1.0 + params * sum(jnp.where(batch["targets"] == i, value, 0.0) for i, value in target.items())
        return bits * math.log(2) * batch["mask"]

    result = token_differences(("a", "b"), [(loss, 0.0), (loss, 1.0)], BYTE, rows, batch_size=2, count=2)
    assert len(result.tokens) == 3 and result.tokens[0] == BYTE.decode([104])
    np.testing.assert_allclose(result.bits, [[1, 4], [1, 3], [1, -3]], atol=1e-5)
    masks = sum(int(rows[i]["mask"].sum()) for i in range(len(rows)))
    assert result.count == masks
    np.testing.assert_allclose(result.means, [1, 1 + (3 + 2 - 4) / masks], rtol=1e-5)
    assert result.before[0] == BYTE.decode([1, 100, 101, 102, 103]) and result.after[0] == BYTE.decode([105, 106])
    differences = [bits[:, 1] - bits[:, 0] for bits in result.excerpt_bits]
    assert len(differences) == len(result.excerpts) == 3 and 0 < np.isfinite(differences[0]).sum() < 9
    sums = [np.nansum(np.abs(d)) for d in differences]
    assert np.nanmax(np.abs(differences)) == pytest.approx(4, abs=1e-5) and sums == sorted(sums, reverse=True)
    text = result.html()
    assert 'title="+3.00 bits: a 1.00, b 4.00"' in text and 'title="no loss"' in text


def test_nothing_to_compare_is_an_error():
    row = Rows(stream(1), 8)
    with pytest.raises(UserError, match="no held-out token counts"):
        token_differences(("a", "b"), [(lambda p, b: b["mask"], 0.0)] * 2, BYTE, row)


def test_the_report_and_the_comparison_of_two_runs_have_their_tokens(command, trained, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    shutil.rmtree(other / "checkpoints" / "8")  # half of the steps
    output = tmp_path / "report.html"
    flags = (str(trained), str(other), "--tokens", "--token_rows=4", "--nopng", f"--output={output}")
    done = call("report", *flags)
    assert done.returncode == 0, done.stderr
    text = output.read_text()
    assert "Tokens where the models differ most" in text and "tokens that other predicts worse than trained" in text
    assert text.count('class="passage"') == 3 and text.count("<script") == 2
    figures = json.loads(command("evaluate", f"--checkpoint={trained}", "--json").stdout)
    everything = held_out_tokens.differences(runs.load([trained, other]), 10_000, losses.token_losses)
    assert everything.means[0] == pytest.approx(figures["loss"] / math.log(2), rel=1e-4)
    assert everything.count == figures["tokens"] and everything.means[1] > everything.means[0]  # half of the steps
    for paths, message in (
        ((str(trained),), "--tokens compares 2 runs on at least 1 row; 1 runs"),
        ((str(trained), str(other), "--token_rows=0"), "--token_rows=0"),
    ):
        for name, *more in (("report", f"--output={output}"), ("compare",)):
            done = call(name, *paths, "--tokens", *more)
            assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    monkeypatch.setattr(held_out_tokens, "differences", lambda *arguments: everything)
    printed = call("compare", str(trained), str(other), "--tokens").stdout
    assert "2 runs in 2 groups" in printed and "tokens that other predicts worse than trained" in printed


READ = """  const all = (selector) => [...page.querySelectorAll(selector)];
  const tokens = all(".passage span");
  const numbers = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const luminance = (rgb) => {
    const linear = rgb.map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const style = (element, part) => frame.getComputedStyle(element, part);
  const below = numbers(style(page.body).backgroundColor).slice(0, 3);
  const contrast = (span) => {
    const [r, g, b, alpha = 1] = numbers(style(span).backgroundColor);
    const mixed = [r, g, b].map((c, i) => alpha * c + (1 - alpha) * below[i]);
    const text = numbers(style(span).color).slice(0, 3);
    const [low, high] = [luminance(mixed), luminance(text)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  report.tokens = tokens.length;
  report.contrast = Math.min(...tokens.map(contrast));
  report.colours = new Set(tokens.map((span) => numbers(style(span).backgroundColor).slice(0, 3).join())).size;
  report.hint = tokens[2].title;
  report.before = style(tokens[2], "::after").content;
  frame.focus();
  tokens[2].focus();
  report.shown = style(tokens[2], "::after").content;
  report.place = style(tokens[2], "::after").position;
  report.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  report.font = Math.min(...tokens.map((span) => parseFloat(style(span).fontSize)));
"""


@pytest.mark.live
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1100, False), (1100, True)])
def test_the_coloured_text_is_readable_and_a_tap_shows_the_losses(tmp_path, width, dark):
    words = tuple(f" word{i}" for i in range(60))
    bits = np.stack([np.full(60, 4.0), np.linspace(0, 8, 60)], 1)
    bits[1] = np.nan
    result = TokenDifferences(("a", "b"), (), (), (), np.zeros((0, 2)), np.zeros(2), 59, (words,), (bits,))
    section = f"<section>{render_html.fragment(result.picture())}</section>"
    report = drive(page.render(runs.load([write_run(tmp_path / "a")]), "tokens", section), tmp_path, width, dark, READ)
    assert report["problems"] == [] and report["tokens"] == 60
    assert report["colours"] == 2 and report["contrast"] >= 4.5  # WCAG 2.2, 1.4.3
    assert report["hint"] == f"{bits[2, 1] - 4:+.2f} bits: a 4.00, b {bits[2, 1]:.2f}"
    assert report["before"] == "none" and report["shown"] == f'"{report["hint"]}"' and report["place"] == "fixed"
    assert report["overflow"] <= 0 and report["font"] >= 14
