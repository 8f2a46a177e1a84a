"""The tokens on which two models differ most, against losses that are made up, and the section of the report."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.data.rows import Rows
from llm_jax.errors import UserError
from llm_jax.pictures.token_differences import token_differences
from llm_jax.research import held_out_tokens, runs
from llm_jax.training import losses
from tests.conftest import call
from tests.data.test_data import stream

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
    counted = np.isfinite(result.excerpt_differences)
    assert 0 < counted.sum() < 9 and np.nanmax(np.abs(result.excerpt_differences)) == pytest.approx(4, abs=1e-5)


def test_nothing_to_compare_is_an_error():
    row = Rows(stream(1), 8)
    with pytest.raises(UserError, match="no held-out token counts"):
        token_differences(("a", "b"), [(lambda p, b: b["mask"], 0.0)] * 2, BYTE, row)


def test_the_report_and_the_comparison_of_two_runs_have_their_tokens(command, trained, tmp_path, monkeypatch):
    other = tmp_path / "other"
    command("train", f"--workdir={other}", "--config.train.steps=3")
    output = tmp_path / "report.html"
    flags = (str(trained), str(other), "--tokens", "--token_rows=4", "--nopng", f"--output={output}")
    done = call("report", *flags)
    assert done.returncode == 0, done.stderr
    page = output.read_text()
    assert "Tokens where the models differ most" in page and "tokens that other predicts worse than trained" in page
    assert page.count('class="passage"') == 1 and page.count("<script") == 2
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
