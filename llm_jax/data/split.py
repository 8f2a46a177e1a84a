"""Which documents of a corpus are held out: a rule that says it of any of them, so that no list of all is kept."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from llm_jax.data.catalog import Catalog
from llm_jax.errors import UserError

_BINS = 2**16  # of hashes, by their first bits
_FEW = 2**17  # groups that are looked at one by one at a time

_NONE = np.zeros(0, np.uint64)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Which groups are held out.

    Attributes:
      ranges: (first, end, room): of the bins first ... end - 1 the groups of at most `room` bytes.
      groups: uint64, hashes of those besides, ascending.
      shared: uint64, hashes of the groups that files name, which may have several documents, ascending.
      bytes_of: int64, of each of the shared groups.
    """

    ranges: tuple[tuple[int, int, float], ...]
    groups: np.ndarray
    shared: np.ndarray
    bytes_of: np.ndarray

    def sizes(self, records: np.ndarray) -> np.ndarray:
        """int64 (documents,): bytes of the group of each."""
        sizes, of = records["size"].copy(), _among(records["group"], self.shared)
        sizes[of] = self.bytes_of[np.searchsorted(self.shared, records["group"][of])]
        return sizes

    def __call__(self, records: np.ndarray) -> np.ndarray:
        """bool (documents,), of `catalog.RECORD`."""
        held, place, sizes = _among(records["group"], self.groups), _bin(records["group"]), self.sizes(records)
        for first, end, room in self.ranges:
            held |= (first <= place) & (place < end) & (sizes <= room)
        return held


EVERYTHING = HeldOut(((0, _BINS, math.inf),), _NONE, _NONE, _NONE)


def held_out(catalog: Catalog, fraction: float) -> HeldOut:
    """Whole groups in the order of their hash, up to `fraction` of the bytes.

    Groups that alone would exceed the rest of the share are passed over; at least one group is held
    out and one is trained on.

    Hashes are counted by bins: those that fit whole are taken so, and the next few are looked at one by one.

    Raises:
      UserError: the fraction is not inside (0, 1), or there is one group only.
    """
    if not 0 < fraction < 1:
        raise UserError(f"config key 'data.validation_fraction' is {fraction}; expected a number between 0 and 1")
    rule = HeldOut((), _NONE, *_shared(catalog))
    if sum(len(hashes) for hashes, _ in _groups(catalog, rule)) < 2:
        raise UserError(f"the corpus is one document ({catalog.name(0)}); at least two are needed to hold one out")
    share = room = fraction * catalog.num_bytes()
    ranges, some, first = [], [_NONE], 0
    while first < _BINS:
        count, total = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
        for hashes, sizes in _fitting(catalog, rule, first, _BINS, room):
            np.add.at(count, _bin(hashes), 1)
            np.add.at(total, _bin(hashes), sizes)
        before = np.concatenate([[0], np.cumsum(total)])
        whole = int(np.searchsorted(before, room, side="right")) - 1  # the bins up to here fit
        ranges.append((first, whole, room))
        room -= int(before[whole])
        first = max(whole + 1, int(np.searchsorted(np.cumsum(count) - count[:whole].sum(), _FEW, side="right")))
        found = list(_fitting(catalog, rule, whole, first, room))
        hashes, sizes = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(hashes)
        some.append(hashes[order][taken := _one_by_one(sizes[order], room)])
        room -= int(sizes[order][taken].sum())
    if room == share:
        some.append(_smallest(catalog, rule))
    return dataclasses.replace(rule, ranges=tuple(ranges), groups=np.sort(np.concatenate(some)))


def _one_by_one(sizes: np.ndarray, room: float) -> np.ndarray:
    """int (taken,): which are taken in their order, each if there is still room for it."""
    taken, rest = [np.zeros(0, np.int64)], np.arange(len(sizes))
    while len(rest := rest[sizes[rest] <= room]):
        total = np.cumsum(sizes[rest])
        fit = int(np.searchsorted(total, room, side="right"))
        taken.append(rest[:fit])
        room -= int(total[fit - 1])
        rest = rest[fit:]
    return np.concatenate(taken)


def _smallest(catalog: Catalog, rule: HeldOut) -> np.ndarray:
    """uint64 (1,): the group of the fewest bytes; of several, the first by name."""
    least = min(int(sizes.min()) for _, sizes in _groups(catalog, rule) if len(sizes))

    def named() -> Iterator[tuple[str, int]]:
        for which in catalog.blocks():
            records, files = catalog[which], catalog.file(which)
            for i in np.flatnonzero(rule.sizes(records) == least):
                file = catalog.files[files[i]]
                yield file.group or file.document(int(records["start"][i])), int(records["group"][i])

    return np.array([min(named())[1]], np.uint64)


def _shared(catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """The groups that files name, and the bytes of each."""
    grouped = np.array([bool(file.group) for file in catalog.files])
    chosen = [(records := catalog[which])[grouped[catalog.file(which)]] for which in catalog.blocks()]
    records = np.concatenate(chosen)
    hashes, of = np.unique(records["group"], return_inverse=True)
    total = np.zeros(len(hashes), np.int64)
    np.add.at(total, of, records["size"])
    return hashes, total


def _groups(catalog: Catalog, rule: HeldOut) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hashes, bytes) of all groups, some at a time, each of them once."""
    yield rule.shared, rule.bytes_of
    for which in catalog.blocks():
        records = catalog[which]
        own = ~_among(records["group"], rule.shared)
        yield records["group"][own], records["size"][own]


def _fitting(
    catalog: Catalog, rule: HeldOut, first: int, end: int, room: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of all groups those of the bins first ... end - 1 and of at most `room` bytes."""
    for hashes, sizes in _groups(catalog, rule):
        fit = (first <= _bin(hashes)) & (_bin(hashes) < end) & (sizes <= room)
        yield hashes[fit], sizes[fit]


def _bin(hashes: np.ndarray) -> np.ndarray:
    return (hashes // np.uint64(2**64 // _BINS)).astype(np.int64)


def _among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which values are in an array, bool (values,)."""
    place = np.searchsorted(ascending, values)
    found = place < len(ascending)
    found[found] = ascending[place[found]] == values[found]
    return found
