"""Examples into rows without cutting any: best fit, by decreasing length (Johnson 1973)."""

import contextlib
import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np

from llm_jax.errors import UserError


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
    which = np.flatnonzero((lengths > 0) & (lengths <= capacity))
    which = which[np.argsort(-lengths[which], kind="stable")]
    row_of, rows = np.zeros(len(which), np.int64), 0
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room in them
    rooms = 0  # bit r: there is a row with room r
    for place, length in enumerate(lengths[which].tolist()):
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
    starts = np.searchsorted(np.sort(row_of), np.arange(rows + 1))
    return Packing(which[np.argsort(row_of, kind="stable")], starts)


def kept(directory: pathlib.Path | None, lengths: np.ndarray, capacity: int) -> Packing:
    """`best_fit`, computed once where there is a directory to keep it in."""
    if directory is None:
        return best_fit(lengths, capacity)
    path = directory / f"rows-{capacity}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError), np.load(path) as saved:
        return Packing(saved["examples"], saved["starts"])
    found = best_fit(lengths, capacity)
    with contextlib.suppress(OSError):  # where nothing can be written it is computed again
        directory.mkdir(exist_ok=True)
        partial = directory / f".{os.getpid()}.partial"
        with partial.open("wb") as file:
            np.savez(file, **found._asdict())
        partial.rename(path)
    return found


def check_fit(fit: int, lengths: np.ndarray, seq_len: int, what: str) -> None:
    """Says how many of the examples (or pairs) do not fit `train.seq_len`. Raises UserError where none does."""
    if not fit:
        least = f"the shortest takes {lengths.min()}" if len(lengths) else "there are none"
        raise UserError(f"none of the {len(lengths)} {what} fits train.seq_len={seq_len}; {least}")
    if left := len(lengths) - fit:
        print(f"{left:,} of {len(lengths):,} {what} do not fit train.seq_len={seq_len}: left out", file=sys.stderr)
