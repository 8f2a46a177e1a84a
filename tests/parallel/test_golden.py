"""Shardings and collectives stay as they are, so that an accidental gather fails a test."""

import json

import pytest

from tests.parallel import golden, on_mesh

UPDATE = "if this is intended, run python -m tests.parallel.golden and commit golden.json"


@pytest.fixture(scope="module")
def recorded():
    return json.loads(golden.PATH.read_text())


def test_every_parameter_of_every_recipe_is_sharded_as_recorded(recorded):
    assert golden.shardings() == recorded["shardings"], UPDATE


SLOW = ("fsdp_context_tensor", "fsdp_accumulated")


@pytest.mark.parametrize(
    "step", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in golden.STEPS]
)
def test_the_training_step_has_the_recorded_collectives(recorded, simulated, step):
    expected = recorded["collectives"].get(golden.version())
    if expected is None:
        pytest.skip(f"golden.json has no collectives of jax {golden.version()}")
    assert simulated(8)(on_mesh.step_collectives, *golden.STEPS[step]) == expected[step], UPDATE


def test_gather_once_gathers_no_more_often_than_a_step_without_micro_batches(recorded):
    if golden.version() not in recorded["collectives"]:
        pytest.skip(f"golden.json has no collectives of jax {golden.version()}")

    def gathers(name):
        rows = [line.split() for line in recorded["collectives"][golden.version()][name]]
        return sum(int(row[2]) for row in rows if row[0] == "all-gather")

    assert 0 < gathers("fsdp_accumulated_gather_once") <= gathers("fsdp") < gathers("fsdp_accumulated")


@pytest.mark.slow
def test_gather_once_gives_the_same_update(simulated):
    both = [
        simulated(8)(on_mesh.losses_and_gradients, *golden.STEPS[f"fsdp_accumulated{name}"])
        for name in ("", "_gather_once")
    ]
    (loss, norms), (other, others) = both
    assert other == pytest.approx(loss, rel=1e-6) and others == pytest.approx(norms, rel=1e-5)
