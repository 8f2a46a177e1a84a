"""Rows and batches. A batch is a function of (seed, step): there is no iterator state to save."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import ClassVar

import grain
import jax
import numpy as np

from llm_jax.data import packing
from llm_jax.data.catalog import slices
from llm_jax.data.corpus import Corpus, Split
from llm_jax.data.sources import weights
from llm_jax.errors import UserError
from llm_jax.schema import Config, DataConfig

# The arrays of a row or a batch, int32 of shape (seq_len,) or (batch, seq_len) each:
#   inputs, targets    token ids
#   positions          of the inputs, from 0 where a document or the row begins
#   segments           of the inputs: 1, 2, ... per document in the row, 0 for padding
#   mask               1 where the target counts: it belongs to the document of the input, and to an answer if only
#                      answers are targets
Row = dict[str, np.ndarray]
Batch = dict[str, jax.Array]
NAMES = ("inputs", "targets", "positions", "segments", "mask")


@dataclasses.dataclass(frozen=True)
class Rows:
    """A split as chunks of `seq_len` targets; each chunk is a row.

    Attributes:
      stride: targets from one row to the next; 0: `seq_len`. With a smaller one rows overlap (a sliding window): the
        last `stride` targets of a row count, and the tokens before them are context.
      group_size: number of consecutive rows that stay neighbours in every batch.
    """

    split: Split
    seq_len: int
    stride: int = 0
    group_size: ClassVar[int] = 1

    @property
    def bytes_per_target(self) -> float:
        """Bytes of the text over the number of targets."""
        return self.split.num_bytes / (len(self.split.tokens) - (len(self.split.offsets) - 1))

    @property
    def step(self) -> int:
        """Targets from one row to the next."""
        return self.stride or self.seq_len

    def __len__(self) -> int:
        """The number of chunks. The last one may be partly padding."""
        return -(-(len(self.split.tokens) - 1) // self.step)

    @property
    def num_full(self) -> int:
        """The number of chunks without padding.

        Raises:
          UserError: there is none.
        """
        if not len(self.split.tokens):
            raise UserError(packing.ALL_HELD_OUT.format(unit="documents"))
        full = (len(self.split.tokens) - 1) // self.seq_len
        if not full:
            raise UserError(
                f"the training text has {len(self.split.tokens)} tokens, fewer than one sequence of "
                f"train.seq_len={self.seq_len}; lower it or add text"
            )
        return full

    def _start(self, index: int) -> int:
        """The token with which row `index` begins; the first target that counts follows the token index * step."""
        return max(0, (index + 1) * self.step - self.seq_len)

    def documents(self, index: int) -> np.ndarray:
        """int64 (documents,): the documents of row `index`, in the order of their segments 1, 2, ..."""
        start = self._start(index)
        stop = min(start + self.seq_len, (index + 1) * self.step, len(self.split.tokens) - 1)
        bounds = np.array([start, stop]) + self.split.offsets[0]
        first, last = np.searchsorted(self.split.offsets, bounds, side="right") - 1
        return np.arange(first, last + 1)

    def __getitem__(self, index: int) -> Row:
        """Row `index`; past the end, a row of padding."""
        length, first = self.seq_len, index * self.step
        start = self._start(index)
        tokens = self.split.tokens[start : min(start + length, first + self.step) + 1].astype(np.int32)
        places, origin = start + np.arange(len(tokens)), self.split.offsets[0]
        documents = np.searchsorted(self.split.offsets, origin + places, side="right") - 1
        begins = np.maximum(self.split.offsets[documents] - origin, start)
        segments = documents - documents[:1] + 1
        row = {
            "inputs": tokens[:-1],
            "targets": tokens[1:],
            "positions": (places - begins)[:-1],
            "segments": segments[:-1],
            "mask": (segments[1:] == segments[:-1]) & (places[:-1] >= first),
        }
        return {name: np.pad(v.astype(np.int32), (0, length - len(v))) for name, v in row.items()}


class _Examples:
    """Base class of rows of examples. An example is never split, and has its own segment and positions."""

    split: Split
    seq_len: int

    def _lengths(self) -> np.ndarray:
        """int32 (examples,): the number of inputs of each example, one less than its tokens."""
        ends = self.split.offsets
        lengths = np.empty(len(ends) - 1, np.int32)
        for block in slices(0, len(lengths)):
            lengths[block] = np.maximum(np.diff(ends[block.start : block.stop + 1]) - 1, 0)
        return lengths

    @functools.cached_property
    def bytes_per_target(self) -> float:
        assert self.split.mask is not None
        return self.split.num_bytes / max(int(np.sum(self.split.mask, dtype=np.int64)), 1)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 (n,), mask uint8 (n,), 1 where a token counts as a target) of one example of the split."""
        assert self.split.mask is not None
        begin, end = (self.split.offsets[index : index + 2] - self.split.offsets[0]).tolist()
        return self.split.tokens[begin:end].astype(np.int32), self.split.mask[begin:end]

    def _row(self, examples: np.ndarray) -> Row:
        parts = []
        for segment, index in enumerate(examples.tolist(), 1):
            tokens, mask = self.example(index)
            places = np.arange(len(tokens) - 1)
            parts.append((tokens[:-1], tokens[1:], places, np.full_like(places, segment), mask[1:]))
        columns = [np.concatenate(p) for p in zip(*parts, strict=True)] if parts else [np.zeros(0)] * 5
        return {
            name: np.pad(v.astype(np.int32), (0, self.seq_len - len(v))) for name, v in zip(NAMES, columns, strict=True)
        }


@dataclasses.dataclass(frozen=True)
class Packed(_Examples):
    """Examples of a split, packed into rows by best fit.

    Examples longer than `seq_len` are left out; a line on stderr says how many.

    Raises:
      UserError: no example fits.
    """

    split: Split
    seq_len: int
    group_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        count = len(self.split.offsets) - 1
        packing.check_fit(len(self._packing.examples), count, self._lengths, self.seq_len, "examples")

    @functools.cached_property
    def _packing(self) -> packing.Packing:
        make = lambda: packing.best_fit(self._lengths(), self.seq_len)._asdict()  # noqa: E731
        return packing.Packing(**packing.cached(self.split.directory, f"rows-{self.seq_len}", make))

    def __len__(self) -> int:
        return len(self._packing.starts) - 1

    @property
    def fitting(self) -> np.ndarray:
        """int64 (examples,): the examples that fit into a row, by their index in the split."""
        return self._packing.examples

    @property
    def max_examples(self) -> int:
        """The largest number of examples in a row."""
        return int(np.diff(self._packing.starts).max())

    @property
    def num_full(self) -> int:
        return len(self)

    def documents(self, index: int) -> np.ndarray:
        """int64 (examples,): the examples of row `index`, in the order of their segments 1, 2, ..."""
        begin, end = self._packing.starts[index : index + 2] if index < len(self) else (0, 0)
        return self._packing.examples[begin:end]

    def __getitem__(self, index: int) -> Row:
        """Row `index`; past the end, a row of padding."""
        return self._row(self.documents(index))


@dataclasses.dataclass(frozen=True)
class Pairs(_Examples):
    """Pairs of answers to a prompt, one example a row: row 2i is the chosen one, row 2i + 1 the rejected one.

    Only answers are targets. In every batch the rows of a pair are neighbours, the chosen one in an even row. A pair of
    which one example is longer than `seq_len` is left out; a line on stderr says how many.

    Raises:
      UserError: no pair fits.
    """

    split: Split
    seq_len: int
    group_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        count = (len(self.split.offsets) - 1) // 2
        packing.check_fit(len(self._fitting), count, lambda: self._pair_lengths().max(1), self.seq_len, "pairs")

    def _pair_lengths(self) -> np.ndarray:
        """int32 (pairs, 2): the lengths of the chosen and the rejected examples."""
        return self._lengths().reshape(-1, 2)

    @functools.cached_property
    def _fitting(self) -> np.ndarray:
        """int64 (n,): the pairs that fit."""

        def fitting() -> dict[str, np.ndarray]:
            lengths = self._pair_lengths()
            return {"pairs": np.flatnonzero((lengths.max(1) <= self.seq_len) & (lengths.min(1) > 0))}

        return packing.cached(self.split.directory, f"pairs-{self.seq_len}", fitting)["pairs"]

    def __len__(self) -> int:
        return 2 * len(self._fitting)

    @property
    def num_full(self) -> int:
        return len(self)

    def documents(self, index: int) -> np.ndarray:
        """int64 (1,) or (0,): the example of row `index`, which is its segment 1."""
        return 2 * self._fitting[index // 2 : index // 2 + 1] + index % 2

    def __getitem__(self, index: int) -> Row:
        """Row `index`; past the end, a row of padding."""
        return self._row(self.documents(index))


AnyRows = Rows | Packed | Pairs
ROWS: dict[str, type[Rows] | type[Packed] | type[Pairs]] = {
    "text": Rows,
    "instructions": Packed,
    "preferences": Pairs,
    "labelled": Packed,
}


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """An endless stream of rows: every epoch is another permutation of the full rows, drawn with `seed`."""

    rows: AnyRows
    seed: int

    def __post_init__(self) -> None:
        self.rows.num_full  # noqa: B018 (raises if there is no full row)

    @functools.cached_property
    def order(self) -> grain.MapDataset:
        """The indices of the rows, or of the groups of rows that stay together; endless."""
        return grain.MapDataset.range(self.rows.num_full // self.rows.group_size).shuffle(seed=self.seed).repeat()

    @property
    def seq_len(self) -> int:
        return self.rows.seq_len

    def __getitem__(self, index: int) -> Row:
        group_size = self.rows.group_size
        return self.rows[self.order[index // group_size] * group_size + index % group_size]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """An endless stream that takes rows from several streams, as evenly as their weights allow."""

    parts: tuple[Shuffled, ...]
    weights: tuple[float, ...]

    @functools.cached_property
    def order(self) -> grain.MapDataset:
        """(index of the part, index of its row or group of rows) of each row or group of the stream; endless."""
        return grain.MapDataset.mix(
            [part.order.map(functools.partial(_pair, k)) for k, part in enumerate(self.parts)], self.weights
        )

    @property
    def seq_len(self) -> int:
        return self.parts[0].seq_len

    def __getitem__(self, index: int) -> Row:
        group_size = self.parts[0].rows.group_size
        part, group = self.order[index // group_size]
        return self.parts[part].rows[group * group_size + index % group_size]


def _pair(part: int, group: int) -> tuple[int, int]:
    return part, group


def training(config: Config, corpus: Corpus) -> Shuffled | Mixed:
    """The stream of training rows, by `data.kind` and the weights of the sources.

    Raises:
      UserError: too little text for a row, in the corpus or in a source with a weight; `train.batch_size` would divide
        a pair.
    """
    kind, seed, shares = ROWS[config.data.kind], config.train.seed, weights(config.data.source)
    if config.train.batch_size % kind.group_size:
        raise UserError(
            f"config key 'train.batch_size' is {config.train.batch_size}; data.kind={config.data.kind} has rows in "
            f"groups of {kind.group_size}, which must divide it"
        )
    if not corpus.parts or any(map(math.isnan, shares.values())):
        return Shuffled(kind(corpus.train, config.train.seq_len), seed)
    parts = []
    for name in shares:
        try:
            parts.append(Shuffled(kind(corpus.parts[name].train, config.train.seq_len), seed))
        except UserError as error:
            raise UserError(f"data.source: {name}: {error}") from error
    return Mixed(tuple(parts), tuple(shares.values()))


def held_out(config: DataConfig, corpus: Corpus, seq_len: int) -> tuple[AnyRows | None, dict[str, AnyRows]]:
    """Returns (held-out rows or None, {source: held-out rows} if there are several sources)."""
    parts: dict[str, AnyRows] = {}
    if not len(corpus.validation.tokens):
        return None, parts
    for name, part in corpus.parts.items():
        if len(part.validation.tokens) > 1:
            with contextlib.suppress(UserError):  # no example fits
                parts[name] = ROWS[config.kind](part.validation, seq_len)
    return ROWS[config.kind](corpus.validation, seq_len), parts


def test(config: DataConfig, corpus: Corpus, seq_len: int) -> Packed | None:
    """The rows of the test split, whose `split.choices` are the possible answers; None without a test split."""
    return None if corpus.test is None else Packed(corpus.test, seq_len)


def batch(rows: AnyRows | Shuffled | Mixed, step: int, size: int, sharding: jax.sharding.Sharding) -> Batch:
    """The rows step * size ... step * size + size - 1, int32 (size, seq_len) each; see `Batch`.

    Each process builds only the rows of its devices.
    """
    row = functools.cache(lambda i: rows[step * size + i])

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.stack([row(i)[name] for i in range(*index[0].indices(size))])[:, index[1]]

    shape = (size, rows.seq_len)
    return {name: jax.make_array_from_callback(shape, sharding, functools.partial(part, name)) for name in NAMES}


def batches(
    rows: AnyRows | Shuffled | Mixed, start: int, stop: int, size: int, sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    """Yields `batch(step)` for the steps `start` to `stop - 1`, built in the background ahead of use."""
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    steps = grain.MapDataset.range(start, stop).map(lambda step: batch(rows, int(step), size, sharding))
    return iter(steps.to_iter_dataset(ahead))
