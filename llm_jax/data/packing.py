"""Examples into rows without cutting any: best fit, by decreasing length (Johnson 1973)."""

import array
import contextlib
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from llm_jax.data.readers import one_by_one
from llm_jax.errors import UserError
from llm_jax.files import new_directory


class Packing(NamedTuple):
    """Which examples stand in which row.

    Attributes:
      examples: int64 (examples that fit,), row by row.
      starts: int64 (rows + 1,), where each row begins in `examples`.
    """

    examples: np.ndarray
    starts: np.ndarray


def best_fit(lengths: np.ndarray, capacity: int) -> Packing:
    """Puts every example of at most `capacity` into the row with the least room that has enough; rows are shuffled.

    Args:
      lengths: int (examples,), each at least 0; those of 0 are left out as well.
    """
    fit = (lengths > 0) & (lengths <= capacity)
    which = np.argsort(np.where(fit, -lengths, 1), kind="stable")[: np.count_nonzero(fit)]
    row_of, rows = np.zeros(len(which), np.int64), 0
    open_rows = [array.array("q") for _ in range(capacity + 1)]  # by the room in them
    rooms = 0  # bit r: there is a row with room r
    for place, example in enumerate(one_by_one(which)):
        length = int(lengths[example])
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1
            row = open_rows[room].pop()
            rooms ^= (not open_rows[room]) << room
        else:
            room, row = capacity, rows
            rows += 1
        row_of[place] = row
        open_rows[room - length].append(row)
        rooms |= (room > length) << (room - length)  # a full row is done with
    row_of = np.random.default_rng(0).permutation(rows)[row_of]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    return Packing(which[np.argsort(row_of, kind="stable")], starts)


def kept(directory: pathlib.Path | None, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `make` gives: made once, and mapped, where there is a directory to keep them in."""
    if directory is None:
        return make()
    with contextlib.suppress(OSError, ValueError):
        return _mapped(directory / name)
    found = make()
    with contextlib.suppress(OSError, ValueError):  # where nothing can be written they are made again
        directory.mkdir(exist_ok=True)
        with new_directory(directory / name, exist_ok=True) as partial:
            for part, values in found.items():
                np.save(partial / f"{part}.npy", values)
        return _mapped(directory / name)
    return found


def _mapped(directory: pathlib.Path) -> dict[str, np.ndarray]:
    if not (found := {path.stem: np.load(path, mmap_mode="r") for path in directory.iterdir()}):
        raise ValueError(f"{directory} is empty")
    return found


def check_fit(fit: int, count: int, lengths: Callable[[], np.ndarray], seq_len: int, what: str) -> None:
    """Says how many of `count` examples (or pairs) do not fit `train.seq_len`. Raises UserError where none does."""
    if not fit:
        least = f"the shortest takes {lengths().min()}" if count else "there are none"
        raise UserError(f"none of the {count} {what} fits train.seq_len={seq_len}; {least}")
    if left := count - fit:
        print(f"{left:,} of {count:,} {what} do not fit train.seq_len={seq_len}: left out", file=sys.stderr)
