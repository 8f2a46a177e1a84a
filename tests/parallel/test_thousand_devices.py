"""On 1,024 simulated devices, every weight is split as its rule states, and the data order is that of one device."""

import math

import jax
import numpy as np
import pytest

from llm_jax import configuration, trees
from llm_jax.data import rows as rows_lib
from llm_jax.training.setup import setup

MESH = {"data": 2, "fsdp": 64, "context": 2, "tensor": 4}
ROWS, LENGTH = 1024, 64


class Numbered:
    """Rows whose tokens are their numbers: row i is i LENGTH, i LENGTH + 1, ..."""

    seq_len, together, full = LENGTH, 1, 5000

    def __getitem__(self, index):
        return dict.fromkeys(rows_lib.NAMES, np.arange(LENGTH, dtype=np.int32) + index * LENGTH)


def shards():
    """For each weight: (axes of its spec, number of different shards, entries of all different shards, entries)."""
    parts = setup(config())
    figures = {}
    for path, leaf in trees.flatten(parts.state.params).items():
        indices = leaf.sharding.devices_indices_map(leaf.shape).values()
        distinct = {tuple(part.indices(size)[:2] for part, size in zip(i, leaf.shape, strict=True)) for i in indices}
        covered = sum(math.prod(stop - start for start, stop in index) for index in distinct)
        axes = [axis for entry in leaf.sharding.spec if entry for axis in np.atleast_1d(entry)]
        figures[path] = axes, len(distinct), covered, leaf.size
    return jax.device_count(), figures


def order(steps):
    """{step: (number of shards, the whole batch)} of batches in which each shard has been built for its device."""
    parts = setup(config())
    rows = rows_lib.Shuffled(Numbered(), seed=3)
    batches = {}
    for step in steps:
        inputs = rows_lib.batch(rows, step, ROWS, parts.batch_sharding)["inputs"]
        whole = np.full(inputs.shape, -1, np.int32)
        for shard in inputs.addressable_shards:
            assert shard.data.shape == (ROWS // 128, LENGTH // 2)
            whole[shard.index] = shard.data
        batches[step] = len(inputs.addressable_shards), whole
    return batches


def config():
    changes = {f"mesh.{axis}": size for axis, size in MESH.items()}
    return configuration.load("llama2_7b", changes | {"train.batch_size": ROWS, "train.seq_len": LENGTH})


@pytest.mark.slow
def test_every_weight_is_split_over_its_axes_and_the_shards_cover_it_once(simulated):
    count, figures = simulated(1024)(shards)
    assert count == 1024
    for path, (axes, distinct, covered, size) in figures.items():
        assert distinct == math.prod(MESH[axis] for axis in axes) and covered == size, path
    split = sum(size for axes, _, _, size in figures.values() if set(axes) == {"fsdp", "tensor"})
    assert split / sum(size for *_, size in figures.values()) > 0.999  # all but the scales of norms


@pytest.mark.slow
def test_batches_have_the_rows_of_one_device_in_their_order(simulated):
    rows = rows_lib.Shuffled(Numbered(), seed=3)
    for step, (count, whole) in simulated(1024)(order, (0, 7)).items():
        expected = np.stack([rows[step * ROWS + i]["inputs"] for i in range(ROWS)])
        assert count == 1024 and np.array_equal(whole, expected)
