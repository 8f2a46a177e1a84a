"""Packs examples into rows without cutting any: best fit by decreasing length (Johnson 1973)."""

import array
import contextlib
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from llm_jax import files
from llm_jax.data.streams import iterate
from llm_jax.errors import UserError

ALL_HELD_OUT = "all of its {unit} are held out; add {unit}, or set data.validation_fraction=0"


class Packing(NamedTuple):
    """The examples of each row.

    Attributes:
      examples: int64 (examples that fit,), indices of examples, row by row.
      starts: int64 (rows + 1,), where each row begins in `examples`.
    """

    examples: np.ndarray
    starts: np.ndarray


def best_fit(lengths: np.ndarray, capacity: int) -> Packing:
    """Packs each example, longest first, into the row with the least sufficient free space, and shuffles the rows.

    Args:
      lengths: int (examples,), each at least 0; examples of length 0 or longer than `capacity` are left out.
      capacity: the length of a row.
    """
    fit = (lengths > 0) & (lengths <= capacity)
    order = np.argsort(np.where(fit, -lengths, 1), kind="stable")[: np.count_nonzero(fit)]
    row_of, rows = np.zeros(len(order), np.int64), 0
    open_rows = [array.array("q") for _ in range(capacity + 1)]  # rows by free space
    free_sizes = 0  # a bit set: bit r is 1 if a row with free space r exists
    for position, example in enumerate(iterate(order)):
        length = int(lengths[example])
        if large_enough := free_sizes >> length:
            free = length + (large_enough & -large_enough).bit_length() - 1
            row = open_rows[free].pop()
            free_sizes ^= (not open_rows[free]) << free
        else:
            free, row = capacity, rows
            rows += 1
        row_of[position] = row
        open_rows[free - length].append(row)
        free_sizes |= (free > length) << (free - length)  # a full row is complete
    row_of = np.random.default_rng(0).permutation(rows)[row_of]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    return Packing(order[np.argsort(row_of, kind="stable")], starts)


def cached(
    directory: pathlib.Path | None, name: str, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that `make` returns, by name; with a directory, they are computed once and then memory-mapped."""
    if directory is None:
        return make()
    with contextlib.suppress(OSError, ValueError):
        return _mapped(directory / name)
    arrays = make()
    with contextlib.suppress(UserError, OSError, ValueError):  # without a writable cache they are computed again
        with files.new_directory(directory / name, exist_ok=True) as partial:
            for part, values in arrays.items():
                np.save(partial / f"{part}.npy", values)
        return _mapped(directory / name)
    return arrays


def _mapped(directory: pathlib.Path) -> dict[str, np.ndarray]:
    if not (arrays := {path.stem: np.load(path, mmap_mode="r") for path in directory.iterdir()}):
        raise ValueError(f"{directory} is empty")
    return arrays


def check_fit(fit: int, count: int, lengths: Callable[[], np.ndarray], seq_len: int, unit: str) -> None:
    """Prints how many of `count` examples (or pairs) do not fit `train.seq_len`. Raises UserError if none fits."""
    if not count:
        raise UserError(ALL_HELD_OUT.format(unit=unit))
    if not fit:
        shortest = lengths().min()
        raise UserError(
            f"none of the {count} {unit} fits train.seq_len={seq_len}; the shortest takes {shortest}; raise "
            "train.seq_len"
        )
    if left := count - fit:
        print(f"{left:,} of {count:,} {unit} do not fit train.seq_len={seq_len}: left out", file=sys.stderr)
