"""The points of a sweep: their recipes, what may change between calls, and when they are done."""

import json
import threading
import time

import pytest

from llm_jax import configuration
from llm_jax.errors import UserError
from llm_jax.research import grid, points
from llm_jax.research.provenance import Provenance
from llm_jax.schema import resuming
from tests.conftest import ROOT


def plan(output, text="train.seed=0,1", **changes):
    return points.plan(configuration.load(ROOT / "tests" / "tiny.py", changes), grid.parse(text), output)


def test_recipes_build_the_configurations_of_the_points_with_what_was_explicit(tmp_path):
    planned = plan(tmp_path, "train.seed=0,1; eval.prompts=('a',)", **{"optim.lr": 1e-3})
    points.write(planned, tmp_path, Provenance("command"))
    for point in planned:
        again = configuration.load(point.workdir / "recipe.json")
        assert again == point.config and again.explicit == point.config.explicit
        assert "optim.lr" in again.explicit and "model.norm" not in again.explicit
    record = points.read(tmp_path)
    assert record["command"] == "command" and record["keys"] == ["train.seed", "eval.prompts"]
    assert list(record["points"]) == [point.name for point in planned]


def test_two_sweeps_that_start_at_once_are_both_recorded(tmp_path, monkeypatch):
    read = points.read

    def read_slowly(output):
        record = read(output)
        time.sleep(0.1)  # long enough for the other one to read the same record
        return record

    monkeypatch.setattr(points, "read", read_slowly)
    sweeps = [plan(tmp_path, f"train.seed={seed}") for seed in range(3)]
    threads = [threading.Thread(target=points.write, args=(sweep, tmp_path, Provenance())) for sweep in sweeps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read(tmp_path)["points"]) == ["seed=0", "seed=1", "seed=2"]


def test_an_invalid_point_or_run_is_rejected_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"point width=64: .*|point width=0: .*expected a number"):
        plan(tmp_path / "a", "model.width=64,0")
    assert not (tmp_path / "a").exists()
    points.write(plan(tmp_path), tmp_path, Provenance())
    plan(tmp_path, **{"optim.lr": 0.5})  # no run yet
    (tmp_path / "seed=0" / "config.json").write_text("{}")
    plan(tmp_path, **{"train.steps": 50, "eval.every": 1, "train.on_bad_step": "skip", "eval.final_rows": 3})
    with pytest.raises(UserError, match=r"seed=0 was trained with optim.lr=0.01, now 0.5"):
        plan(tmp_path, **{"optim.lr": 0.5})


def test_points_that_are_done_keep_their_result_and_their_recipe(tmp_path):
    before = plan(tmp_path)
    points.write(before, tmp_path, Provenance())
    for point in before:
        (point.workdir / "config.json").write_text("{}")
    (before[0].workdir / "summary.json").write_text('{"steps": 8}')
    assert points.notes(before) == []
    changed = plan(tmp_path, **{"train.on_bad_step": "skip", "checkpoint.every": 2})
    assert points.notes(changed) == ["note: seed=0 is done with train.on_bad_step='stop'; the result is kept"]
    points.write(changed, tmp_path, Provenance())
    recipes = [configuration.load(point.workdir / "recipe.json") for point in changed]
    assert [recipe.train.on_bad_step for recipe in recipes] == ["stop", "skip"]
    # With more steps, no point is done: all are continued.
    longer = plan(tmp_path, **{"train.on_bad_step": "skip", "train.steps": 16})
    assert points.notes(longer) == [] and not points.is_done(longer[0])


def test_what_a_point_may_change_is_what_a_resumed_run_may_change():
    """The message of a run with a bad step recommends train.on_bad_step, and docs/how_to/sweep.md names the options."""
    keys = configuration.flat(configuration.default())
    changeable = {key for key in keys if resuming.may_change(key)}
    assert {"train.on_bad_step", "train.steps", "eval.every", "mesh.data", "data.workers"} <= changeable
    assert not changeable & {"optim.lr", "train.seed", "train.batch_size", "model.width", "data.source"}
    page = (ROOT / "docs" / "runs.md").read_text()
    named = page[page.index("A resumed run may change") :].split("\n\n")[0]
    assert all(f"`{key}`" in named or f"`{key.split('.')[0]}`" in named for key in changeable)


def test_a_point_is_done_with_all_its_steps(tmp_path):
    point = plan(tmp_path)[0]
    assert not points.is_done(point)
    point.workdir.mkdir()
    for steps, expected in ((4, False), (8, True)):
        (point.workdir / "summary.json").write_text(json.dumps({"steps": steps}))
        assert points.is_done(point) is expected
