import json

import pytest

import llm_jax
from llm_jax import checkpoints
from tests.checkpoints.power_loss import Recorder
from tests.conftest import ROOT


@pytest.mark.slow
def test_after_a_power_failure_at_any_moment_every_checkpoint_is_whole(text_file, cache, tmp_path):
    changes = {"data.source": str(text_file), "data.cache_dir": str(cache), "checkpoint.every": 3}
    config = llm_jax.config(ROOT / "tests" / "tiny.py", changes)
    runs = tmp_path / "runs"
    runs.mkdir()
    with Recorder(runs) as recorder:
        llm_jax.train(config, runs / "x", verbose=False)
    seen = []
    for moment in range(len(recorder.moments)):
        workdir = tmp_path / str(moment) / "x"
        recorder.restore(moment, workdir.parent)
        steps = checkpoints.steps(workdir)
        for step in steps:
            checkpoints.verify(workdir / "checkpoints" / str(step))
            assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()][
                :step
            ] == [*range(1, step + 1)]
        for path in (workdir / "config.json", workdir / "attempts.jsonl"):
            assert not path.exists() or path.read_bytes()
        seen.append(steps)
    assert seen[0] == [] and seen[-1] == [6, 8] and [3] in seen
    # The run goes on after the last but one checkpoint was lost together with everything unflushed.
    last = max(moment for moment, steps in enumerate(seen) if 8 not in steps)
    summary = llm_jax.train(config, tmp_path / str(last) / "x", verbose=False)
    assert summary["steps"] == 8
