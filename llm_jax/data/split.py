"""Decides which documents of a corpus are held out, by a rule on their groups that needs no list of all documents."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from llm_jax.data.catalog import Catalog
from llm_jax.errors import UserError

_BINS = 2**16  # of hashes, by their first bits
_BATCH = 2**17  # groups that are sorted at a time

_NONE = np.zeros(0, np.uint64)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The rule for the groups that are held out.

    Attributes:
      ranges: (first, end, max_size): the groups of at most `max_size` bytes in the bins first ... end - 1 are held out.
      groups: uint64 (n,), ascending hashes of further groups that are held out.
      shared: uint64 (m,), ascending hashes of the groups that files name, which may have several documents.
      bytes_of: int64 (m,), bytes of each of the shared groups.
    """

    ranges: tuple[tuple[int, int, float], ...]
    groups: np.ndarray
    shared: np.ndarray
    bytes_of: np.ndarray

    def sizes(self, records: np.ndarray) -> np.ndarray:
        """int64 (documents,): bytes of the group of each document, from RECORD (documents,)."""
        sizes, shared = records["size"].copy(), _among(records["group"], self.shared)
        sizes[shared] = self.bytes_of[np.searchsorted(self.shared, records["group"][shared])]
        return sizes

    def __call__(self, records: np.ndarray) -> np.ndarray:
        """bool (documents,): whether each document is held out, from `catalog.RECORD` (documents,)."""
        held, bins, sizes = _among(records["group"], self.groups), _bin(records["group"]), self.sizes(records)
        for first, end, max_size in self.ranges:
            held |= (first <= bins) & (bins < end) & (sizes <= max_size)
        return held


EVERYTHING = HeldOut(((0, _BINS, math.inf),), _NONE, _NONE, _NONE)


def held_out(catalog: Catalog, fraction: float) -> HeldOut:
    """The rule that holds out groups in the order of their hash, up to `fraction` of the bytes.

    A group that exceeds the rest of the share is skipped; at least one group is held out and one is trained on.

    Hashes are counted in bins: bins that fit completely are taken as ranges, and the groups of the next ones are taken
    one by one.

    Args:
      fraction: 0: nothing is held out.

    Raises:
      UserError: the fraction is not in [0, 1), or there is only one group.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"config key 'data.validation_fraction' is {fraction}; expected 0 or a number below 1")
    rule = HeldOut((), _NONE, *_shared(catalog))
    if not fraction:
        return rule
    if sum(len(hashes) for hashes, _ in _groups(catalog, rule)) < 2:
        raise UserError(
            f"the corpus is one document ({catalog.name(0)}), of which none can be held out; add another, or set "
            "data.validation_fraction=0 to train on all text without held-out metrics"
        )
    share = budget = fraction * catalog.num_bytes()
    ranges, groups, first = [], [_NONE], 0
    while first < _BINS:
        count, total = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
        for hashes, sizes in _fitting(catalog, rule, first, _BINS, budget):
            np.add.at(count, _bin(hashes), 1)
            np.add.at(total, _bin(hashes), sizes)
        before = np.concatenate([[0], np.cumsum(total)])
        end = int(np.searchsorted(before, budget, side="right")) - 1  # the bins up to here fit completely
        ranges.append((first, end, budget))
        budget -= int(before[end])
        first = max(end + 1, int(np.searchsorted(np.cumsum(count) - count[:end].sum(), _BATCH, side="right")))
        hashes, sizes = map(np.concatenate, zip(*_fitting(catalog, rule, end, first, budget), strict=True))
        order = np.argsort(hashes)
        groups.append(hashes[order][taken := _take(sizes[order], budget)])
        budget -= int(sizes[order][taken].sum())
    if budget == share:
        groups.append(_smallest(catalog, rule))
    return dataclasses.replace(rule, ranges=tuple(ranges), groups=np.sort(np.concatenate(groups)))


def _take(sizes: np.ndarray, budget: float) -> np.ndarray:
    """int (n,): the indices that a greedy selection takes: in order, every size that still fits into `budget`."""
    taken, rest = [np.zeros(0, np.int64)], np.arange(len(sizes))
    while len(rest := rest[sizes[rest] <= budget]):
        total = np.cumsum(sizes[rest])
        fit = int(np.searchsorted(total, budget, side="right"))
        taken.append(rest[:fit])
        budget -= int(total[fit - 1])
        rest = rest[fit:]
    return np.concatenate(taken)


def _smallest(catalog: Catalog, rule: HeldOut) -> np.ndarray:
    """uint64 (1,): the group with the fewest bytes; of several, the first by name."""
    least = min(int(sizes.min()) for _, sizes in _groups(catalog, rule) if len(sizes))

    def smallest_groups() -> Iterator[tuple[str, int]]:
        for indices in catalog.blocks():
            records, files = catalog[indices], catalog.file(indices)
            for i in np.flatnonzero(rule.sizes(records) == least):
                file = catalog.files[files[i]]
                yield file.group or file.document(int(records["start"][i])), int(records["group"][i])

    return np.array([min(smallest_groups())[1]], np.uint64)


def _shared(catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of the groups that files name, bytes of each)."""
    grouped = np.array([bool(file.group) for file in catalog.files])
    records = np.concatenate([catalog[indices][grouped[catalog.file(indices)]] for indices in catalog.blocks()])
    hashes, group = np.unique(records["group"], return_inverse=True)
    total = np.zeros(len(hashes), np.int64)
    np.add.at(total, group, records["size"])
    return hashes, total


def _groups(catalog: Catalog, rule: HeldOut) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hashes, bytes) of all groups in blocks, every group once."""
    yield rule.shared, rule.bytes_of
    for indices in catalog.blocks():
        records = catalog[indices]
        single = ~_among(records["group"], rule.shared)
        yield records["group"][single], records["size"][single]


def _fitting(
    catalog: Catalog, rule: HeldOut, first: int, end: int, budget: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hashes, bytes) of the groups of at most `budget` bytes in the bins first ... end - 1."""
    for hashes, sizes in _groups(catalog, rule):
        fit = (first <= _bin(hashes)) & (_bin(hashes) < end) & (sizes <= budget)
        yield hashes[fit], sizes[fit]


def _bin(hashes: np.ndarray) -> np.ndarray:
    return (hashes // np.uint64(2**64 // _BINS)).astype(np.int64)


def _among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """bool (n,): whether each of the values (n,) is in an ascending array."""
    index = np.searchsorted(ascending, values)
    is_in = index < len(ascending)
    is_in[is_in] = ascending[index[is_in]] == values[is_in]
    return is_in
