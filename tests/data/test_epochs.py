"""Streams of rows are endless: every class of rows, alone and mixed, over several epochs."""

import collections

import jax
import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.data import rows
from llm_jax.data.corpus import Split
from llm_jax.data.masking import Masked, MaskingVocabulary
from llm_jax.data.rows import Mixed, Packed, Pairs, Rows, Shuffled

EPOCHS = 3
VOCABULARY = MaskingVocabulary.of(tokenizers.get("byte").train([], 0))
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def split(first: int, count: int) -> Split:
    """Examples of 2 to 5 tokens, token k of example i being first + 5 i + k, of which all but the first count."""
    lengths = [2 + i % 4 for i in range(count)]
    tokens = np.concatenate([first + 5 * i + np.arange(n) for i, n in enumerate(lengths)]).astype(np.uint16)
    mask = np.concatenate([[0] + [1] * (n - 1) for n in lengths]).astype(np.uint8)
    return Split(tokens, np.cumsum([0, *lengths]), len(tokens), mask)


KINDS = {
    "Rows": lambda first, count: Rows(split(first, count), 4),
    "Packed": lambda first, count: Packed(split(first, count), 6),
    "Pairs": lambda first, count: Pairs(split(first, count), 6),
}


def key(row) -> bytes:
    """The tokens of a row, whatever masking hides."""
    return np.asarray(row["targets"]).tobytes() + np.asarray(row["segments"]).tobytes()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_has_every_row_once_in_another_order(kind, masked):
    table = KINDS[kind](0, 22)
    stream = Shuffled(table, 7)
    plain = table
    if masked:
        stream, plain = (Masked(r, VOCABULARY, False, 0.5, 7) for r in (stream, table))
    expected = collections.Counter(key(plain[i]) for i in range(table.num_full))
    epochs = [[key(stream[epoch * table.num_full + i]) for i in range(table.num_full)] for epoch in range(EPOCHS)]
    assert len(expected) == table.num_full > 3
    assert all(collections.Counter(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    if masked:
        hidden = [stream[epoch * table.num_full]["mask"].tolist() for epoch in range(12)]
        assert len({tuple(mask) for mask in hidden}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_repeats_each_part_by_its_weight(kind):
    parts = [KINDS[kind](0, 22), KINDS[kind](1000, 6)]
    stream = Mixed(tuple(Shuffled(part, 7) for part in parts), (0.5, 0.5))
    count = EPOCHS * parts[0].num_full * 2
    seen = collections.Counter(key(stream[i]) for i in range(count))
    for part in parts:
        own = [seen.pop(key(part[i])) for i in range(part.num_full)]
        assert sum(own) == count // 2
        assert min(own) >= count // 2 // part.num_full and max(own) - min(own) <= 1
    assert not seen


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_go_on_past_the_epochs_from_any_step(kind, mixed):
    table = KINDS[kind](0, 22)
    part = Shuffled(table, 7)
    stream = Mixed((part, Shuffled(KINDS[kind](1000, 6), 7)), (0.5, 0.5)) if mixed else part
    steps = EPOCHS * table.num_full // 2
    batches = list(rows.batches(stream, 0, steps, 2, DEVICE))
    assert len(batches) == steps and all(np.asarray(batch["mask"]).any(1).all() for batch in batches)
    later = list(rows.batches(stream, steps - 2, steps + 2, 2, DEVICE))
    assert len(later) == 4
    for one, other in zip(batches[-2:], later[:2], strict=True):
        assert all((one[name] == other[name]).all() for name in one)
    for i, batch in enumerate(batches):
        row = np.stack([stream[2 * i + k]["inputs"] for k in range(2)])
        np.testing.assert_array_equal(batch["inputs"], row)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_has_no_end(kind):
    """Past the end of a finite order grain wraps the index, which it does not promise; the length tells them apart."""
    part = Shuffled(KINDS[kind](0, 22), 7)
    assert len(part.order) > 2**50
    assert len(Mixed((part, Shuffled(KINDS[kind](1000, 6), 7)), (0.5, 0.5)).order) > 2**50
