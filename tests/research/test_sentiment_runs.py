"""Finished jobs of experiments/sentiment count as long as the options that their figures follow from are the same."""

import json

import pytest

from llm_jax.research import runs
from tests.research import verdict_cases


@pytest.fixture(scope="module")
def sweep():
    return verdict_cases.load("sentiment.sweep")


def test_the_committed_runs_count_although_their_recipe_is_written_in_another_way(sweep):
    lines = runs.read_lines(sweep.HERE / "runs.jsonl")
    assert len(sweep.finished(sweep.HERE / "runs.jsonl", "cpu")) == len(lines) == 39


def test_a_job_whose_options_have_changed_does_not_count(sweep, tmp_path, monkeypatch):
    file = tmp_path / "runs.jsonl"
    jobs = ("LoRA r=8", "LoRA r=1", "probe")
    for name in jobs:
        sweep.record_recipe(file, name, "cpu")
        sweep.record_recipe(file, name, "cpu")
    assert len(runs.read_lines(tmp_path / "recipes.jsonl")) == 2
    lines = [{"job": name, "seed": 0, "recipe": sweep.recipe(name, "cpu")} for name in jobs]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {job for job, _ in sweep.finished(file, "cpu")} == set(jobs)
    monkeypatch.setitem(sweep.TRAINED, "LoRA r=8", {"optim.lr": 2e-3})
    monkeypatch.setitem(sweep.TRAINED, "LoRA r=1", sweep.TRAINED["LoRA r=1"] | {"checkpoint.every": 7})
    assert {job for job, _ in sweep.finished(file, "cpu")} == {"LoRA r=1", "probe"}
    assert not sweep.finished(file, "smoke")
