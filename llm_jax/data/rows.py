"""Rows and batches. A batch is a function of (seed, step): there is no iterator state to save."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Protocol

import grain
import jax
import numpy as np

from llm_jax.data.corpus import Split
from llm_jax.errors import UserError

# What a row or a batch holds; every value is int32 of shape (seq_len,) or (batch, seq_len).
#   inputs, targets    token ids
#   positions          of the inputs, from 0 where a document or the row begins
#   segments           of the inputs: 1, 2, ... per document in the row, 0 for padding
#   mask               1 where the target counts: it belongs to the input's document
Row = dict[str, np.ndarray]
Batch = dict[str, jax.Array]


class Table(Protocol):
    """A row for every index."""

    @property
    def seq_len(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class Finite(Table, Protocol):
    """Rows that end. Past the end, rows of padding.

    Attributes:
      split: the tokens that are counted, for figures per byte.
      full: how many rows are trained on.
    """

    @property
    def split(self) -> Split: ...

    @property
    def full(self) -> int: ...

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """A split cut into chunks of `seq_len` targets; each chunk is one row.

    With a `stride` below `seq_len` rows overlap (a sliding window): each counts the next `stride`
    targets only, and what stands before them in the row is context.
    """

    split: Split
    seq_len: int
    stride: int = 0  # 0: seq_len

    @property
    def step(self) -> int:
        """Targets from one row to the next."""
        return self.stride or self.seq_len

    def __len__(self) -> int:
        """Chunks, the last of which may be partly padding."""
        return -(-(len(self.split.tokens) - 1) // self.step)

    @property
    def full(self) -> int:
        """Chunks without padding.

        Raises:
          UserError: there is none.
        """
        whole = (len(self.split.tokens) - 1) // self.seq_len
        if not whole:
            raise UserError(
                f"the training text has {len(self.split.tokens)} tokens, fewer than one sequence of "
                f"train.seq_len={self.seq_len}; lower it or bring more text"
            )
        return whole

    def __getitem__(self, index: int) -> Row:
        """Row `index`; past the end, a row of padding."""
        length, counted = self.seq_len, index * self.step
        start = max(0, counted + self.step - length)
        tokens = self.split.tokens[start : min(start + length, counted + self.step) + 1].astype(np.int32)
        places = start + np.arange(len(tokens))
        documents = np.searchsorted(self.split.offsets, places, side="right") - 1
        begins = np.maximum(self.split.offsets[documents], start)
        segments = documents - documents[:1] + 1
        row = {
            "inputs": tokens[:-1],
            "targets": tokens[1:],
            "positions": (places - begins)[:-1],
            "segments": segments[:-1],
            "mask": (segments[1:] == segments[:-1]) & (places[:-1] >= counted),
        }
        return {name: np.pad(v.astype(np.int32), (0, length - len(v))) for name, v in row.items()}


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Row i of an endless stream: every epoch is another permutation of the whole chunks, by `seed`."""

    rows: Finite
    seed: int

    def __post_init__(self) -> None:
        self.rows.full  # noqa: B018 (raises where there is none)

    @functools.cached_property
    def _order(self) -> grain.MapDataset:
        return grain.MapDataset.range(self.rows.full).shuffle(seed=self.seed).repeat()

    @property
    def seq_len(self) -> int:
        return self.rows.seq_len

    def __getitem__(self, index: int) -> Row:
        return self.rows[self._order[index]]


def batch(rows: Table, step: int, size: int, sharding: jax.sharding.Sharding) -> Batch:
    """Rows step * size ... step * size + size - 1; each process builds only what its devices hold."""
    row = functools.cache(lambda i: rows[step * size + i])

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.stack([row(i)[name] for i in range(*index[0].indices(size))])[:, index[1]]

    names = ("inputs", "targets", "positions", "segments", "mask")
    shape = (size, rows.seq_len)
    return {name: jax.make_array_from_callback(shape, sharding, functools.partial(part, name)) for name in names}


def batches(rows: Table, start: int, stop: int, size: int, sharding: jax.sharding.Sharding) -> Iterator[Batch]:
    """`batch(step)` for the steps from `start` to `stop`, built ahead of use in the background."""
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    steps = grain.MapDataset.range(start, stop).map(lambda step: batch(rows, int(step), size, sharding))
    return iter(steps.to_iter_dataset(ahead))
