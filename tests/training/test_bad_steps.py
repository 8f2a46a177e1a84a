import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.training import bad_steps, losses, optim, step


@pytest.fixture
def config(tiny):
    return dataclasses.replace(tiny.train, on_bad_step="skip", spike_factor=2.0)


def test_norms_are_those_of_the_unstacked_weights(make):
    _, params = make()
    names, norms = bad_steps.names(params), bad_steps.norms(params)
    flat = trees.flatten(trees.unstack(params))
    assert sorted(names) == sorted(flat)
    for name, norm in zip(names, norms, strict=True):
        np.testing.assert_allclose(norm, np.linalg.norm(flat[name]), rtol=1e-5)


def test_the_limit_is_known_two_steps_ahead_and_after_a_restart(config, tmp_path):
    detector = bad_steps.BadStepDetector(config, ["w"], tmp_path / "metrics.jsonl", 0)
    drawn = np.random.default_rng(0).uniform(1, 3, 90)
    limits, lines = [], []
    for number, loss in enumerate(map(float, drawn), 1):
        limits.append(detector.limit(number))
        detector.record(number - 1, float(drawn[number - 2]), False, np.ones(1)) if number > 1 else None
        lines.append(json.dumps({"step": number, "loss": loss}))
    assert limits[20] == math.inf and limits[21] == 2 * np.median(drawn[:20])
    assert limits[80] == 2 * np.median(drawn[29:79])
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 91, "lo')
    resumed = bad_steps.BadStepDetector(config, ["w"], tmp_path / "metrics.jsonl", 70)
    assert resumed.limit(71) == limits[70]


def test_bad_steps_are_described_and_skipped_and_too_many_end_the_run(config, tmp_path):
    detector = bad_steps.BadStepDetector(config, ["a", "b"], tmp_path / "none", 0)
    for number in range(1, 31):
        detector.record(number, 1.0, False, np.ones(2))
    assert detector.record(30, 1.0, False, np.ones(2)) == ""
    note = detector.record(31, 5.0, True, np.asarray([1.0, 7.0]))
    assert "the loss is 5.000, a spike above 2.000" in note and "that of b" in note
    assert "the gradient of b is not finite" in detector.record(32, 1.0, True, np.asarray([1.0, math.inf]))
    with pytest.raises(bad_steps.BadStep) as raised:
        detector.record(33, math.nan, True, np.full(2, math.nan))
    assert raised.value.step == 33 and "the gradient of all weights is not finite" in raised.value.reason
    with pytest.raises(UserError, match=r"train.on_bad_step' is 'panic'; expected one of rollback, skip, stop"):
        bad_steps.BadStepDetector(dataclasses.replace(config, on_bad_step="panic"), [], tmp_path / "none", 0)


def test_a_bad_step_changes_nothing_but_the_count(make, tiny):
    model, params = make()
    optimizer = optim.make(tiny.optim, 8, params)

    def loss(trained, frozen, batch, count, key):
        total, number = losses.language_model(model, trained, batch, 0)
        return total * batch["factor"], number

    one = jax.jit(step.make(loss, optimizer, optim.schedule(tiny.optim, 8), 0, 1, skip_bad=True))
    tokens = jax.random.randint(jax.random.key(0), (2, 17), 3, 259)
    ones = jnp.ones((2, 16), jnp.int32)
    rows = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "positions": ones.cumsum(1) - 1, "segments": ones}
    rows["mask"] = ones
    state = step.init(optimizer, params)
    for factor, limit, bad in ((math.nan, math.inf, True), (1.0, 2.0, True), (1.0, 20.0, False)):
        after, metrics = one(state, None, rows | {"factor": jnp.float32(factor)}, jnp.float32(limit))
        assert bool(metrics["bad"]) is bad and int(after.step) == int(state.step) + 1
        same = [
            bool(jnp.array_equal(a, b))
            for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True)
        ]
        assert all(same) if bad else not any(same)
        state = after
