"""A job of experiments/sentiment is measured again only if an option that affects its figures has changed."""

import pytest

from llm_jax.research import experiments
from tests.research import verdict_cases


@pytest.fixture(scope="module")
def sweep():
    return verdict_cases.load("sentiment.sweep")


def names(sweep, root, size="cpu"):
    """{job: name of the file of its figures}."""
    jobs = sweep.all_jobs(root, size, 3)
    return {(kind, seed): experiments.file_name(f"{kind}-{seed}-{digest}") for kind, seed, digest in jobs}


def test_the_committed_figures_are_those_of_the_jobs(sweep, tmp_path):
    committed = {path.stem for path in (sweep.HERE / "figures").glob("*.json")}
    assert committed == set(names(sweep, tmp_path).values()) and len(committed) == 39


def test_a_job_whose_options_have_changed_has_another_name(sweep, tmp_path, monkeypatch):
    before = names(sweep, tmp_path)
    monkeypatch.setitem(sweep.TRAINED, "LoRA r=8", {"optim.lr": 2e-3})
    monkeypatch.setitem(sweep.TRAINED, "LoRA r=1", sweep.TRAINED["LoRA r=1"] | {"checkpoint.every": 7})
    after = names(sweep, tmp_path)
    assert {kind for kind, seed in after if after[kind, seed] != before[kind, seed]} == {"LoRA r=8"}
    assert not set(names(sweep, tmp_path, "smoke").values()) & set(before.values())
