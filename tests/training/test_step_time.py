"""The measured time of a step ends when its result is ready, whatever the host does afterwards."""

import json

import jax.numpy as jnp

from llm_jax import configuration
from llm_jax.training import bad_steps
from llm_jax.training.progress import Progress


def test_a_step_takes_the_time_until_its_result_and_not_until_it_is_read(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("llm_jax.training.progress.time.perf_counter", lambda: now)
    detector = bad_steps.BadStepDetector(configuration.default().train, ["w"], tmp_path / "metrics.jsonl", 0)
    progress = Progress(tmp_path, 0, 40, 1.0, 1e9, detector, ["w"], verbose=False)
    metrics = {"loss": 2.0, "tokens": 64.0, "input_tokens": 64.0, "bad": False, "gradient_norms": jnp.ones(1)}
    for step, now in ((1, 1.0), (2, 9.0), (3, 10.0)):  # noqa: B007 (a callback takes eight seconds after step 1)
        progress.step(step, {name: jnp.asarray(value) for name, value in metrics.items()})
    now = 100.0
    progress.flush({})
    progress.restart_clock()
    now = 102.0
    progress.step(4, {name: jnp.asarray(value) for name, value in metrics.items()})
    now = 200.0
    progress.flush({})
    progress.close()
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seconds == [1.0, 8.0, 1.0, 2.0]
