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


@pytest.mark.parametrize("mesh", ["fsdp", pytest.param("fsdp_context_tensor", marks=pytest.mark.slow)])
def test_the_training_step_has_the_recorded_collectives(recorded, simulated, mesh):
    expected = recorded["collectives"].get(golden.version())
    if expected is None:
        pytest.skip(f"golden.json has no collectives of jax {golden.version()}")
    assert simulated(8)(on_mesh.step_collectives, golden.STEPS[mesh]) == expected[mesh], UPDATE
