"""GloVe (Pennington et al. 2014): word vectors whose inner products fit the logarithms of co-occurrence counts.

Counts are collected in memory up to a bound, written to disk as sorted runs, and merged by ranges of cells, so that
neither the text nor its co-occurrences need to fit into memory.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.embeddings import devices
from llm_jax.embeddings.texts import BREAK, WordCorpus
from llm_jax.embeddings.vectors import WordVectors, check_finite
from llm_jax.errors import UserError
from llm_jax.schema import EmbeddingsConfig

# Letters of shapes: P cells of a step, T steps of one call of the compiled scan, D width.

_STEPS = 128
_CELL = np.dtype([("cell", "<i8"), ("count", "<f4")])  # cell: word * words + context
_PIECE = 2**20  # words of text per counting step

Progress = Callable[[int], None]


def train(
    corpus: WordCorpus, config: EmbeddingsConfig, counted: pathlib.Path, progress: Progress = lambda n: None
) -> WordVectors:
    """Trains the vectors of a corpus: the sum of each word's two vectors (section 4.2 of the paper).

    Weighted least squares, f(X) (w . c + b_w + b_c - log X)^2 with f(X) = min(1, (X / x_max)^alpha) (equation 8),
    by AdaGrad. Gradients of one step for the same word are summed.

    Args:
      counted: the file of `cooccurrences`.
      progress: called with the number of cells processed since the last call.

    Raises:
      UserError: a `batch_size` that is no multiple of the devices, or vectors that diverge.
    """
    g = config.glove
    devices.check("glove.batch_size", g.batch_size)
    cells = np.memmap(counted, _CELL, "r")
    rng = np.random.default_rng(config.seed)
    words, width = len(corpus.words), config.width
    # Rows of words, then rows of the words as contexts: vector and bias, and beside them AdaGrad's sums of squares,
    # which begin at 1 as in the authors' program.
    start = (rng.random((2 * words, width + 1)) - 0.5) / width
    table = jnp.asarray(np.concatenate([start, np.ones_like(start)], 1).astype(np.float32))
    train_steps = devices.compiled(functools.partial(_train_steps, g.x_max, g.alpha, g.lr), (True, True, True))
    for _ in range(config.epochs):
        for read, cell, count in _batches(cells, g.batch_size, rng):
            word, context = np.divmod(cell, words)
            table = train_steps(table, word.astype(np.int32), (words + context).astype(np.int32), count)
            progress(read)
    both = np.asarray(table[:, :width])
    return WordVectors(corpus.words, check_finite(both[:words] + both[words:], f"lower glove.lr={g.lr}"))


def cooccurrences(corpus: WordCorpus, window: int, memory: int, scratch: pathlib.Path) -> pathlib.Path:
    """Writes co-occurrence counts, a pair at distance d counting 1/d, as a sorted array of `_CELL`.

    Args:
      window: words on each side; no pair reaches across a `BREAK`.
      memory: approximate bytes of counts in memory at a time.
      scratch: directory for the file and its temporary runs.

    Raises:
      UserError: no two words co-occur.
    """
    runs: list[pathlib.Path] = []
    in_memory: list[np.ndarray] = []
    size = 0
    for cells in _counted(corpus, window):
        in_memory.append(cells)
        size += cells.nbytes
        if size > memory // 4:  # sorting takes as much again, twice
            runs.append(_write(_summed(in_memory), scratch / f"run-{len(runs)}"))
            in_memory, size = [], 0
    if size:  # an empty file cannot be mapped
        runs.append(_write(_summed(in_memory), scratch / f"run-{len(runs)}"))
    if not runs:
        raise UserError("no two words of the vocabulary occur in one paragraph; GloVe learns from such pairs only")
    return _merged(runs, memory, scratch / "cooccurrences")


def _counted(corpus: WordCorpus, window: int) -> Iterator[np.ndarray]:
    """Yields the cells of one piece of text after the other; pieces overlap by the window."""
    words = len(corpus.words)
    for begin in range(0, len(corpus.ids), _PIECE):
        ids = np.asarray(corpus.ids[begin : begin + _PIECE + window], np.int64)
        paragraph = np.cumsum(ids == BREAK)
        parts = []
        for distance in range(1, window + 1):
            # Pairs that begin in the overlap belong to the next piece; the last piece may be shorter than the window.
            end = max(0, min(_PIECE, len(ids) - distance))
            a, b = ids[:end], ids[distance : distance + end]
            near = (a != BREAK) & (b != BREAK) & (paragraph[:end] == paragraph[distance : distance + end])
            a, b = a[near], b[near]
            cells = np.concatenate([a * words + b, b * words + a])
            part = np.empty(len(cells), _CELL)
            part["cell"], part["count"] = cells, 1 / distance
            parts.append(part)
        yield _summed(parts)


def _summed(parts: list[np.ndarray]) -> np.ndarray:
    """Sorted cells, the counts of equal ones summed."""
    together = np.concatenate(parts)
    if not len(together):
        return together
    order = np.argsort(together["cell"], kind="stable")
    cells = together["cell"][order]
    begins = np.flatnonzero(np.concatenate([[True], cells[1:] != cells[:-1]]))
    summed = np.empty(len(begins), _CELL)
    counts = np.add.reduceat(together["count"][order], begins, dtype=np.float64)
    summed["cell"], summed["count"] = cells[begins], counts
    return summed


def _write(cells: np.ndarray, path: pathlib.Path) -> pathlib.Path:
    cells.tofile(path)
    return path


def _merged(runs: list[pathlib.Path], memory: int, output: pathlib.Path) -> pathlib.Path:
    """Merges sorted arrays range by range of cells, each range small enough for the memory."""
    opened = [np.memmap(run, _CELL, "r") for run in runs]
    total = sum(map(len, opened))
    ranges = max(1, -(-total * _CELL.itemsize * 4 // memory))
    # Quantiles of a sample of all runs: ranges of about the same length.
    drawn = np.sort(np.concatenate([run["cell"][:: max(1, total // 10_000)] for run in opened]))
    bounds = drawn[np.linspace(0, len(drawn) - 1, ranges + 1).astype(int)[1:-1]]
    with output.open("wb") as file:
        starts = [0] * len(opened)
        for bound in [*bounds, np.iinfo(np.int64).max]:
            ends = [int(np.searchsorted(run["cell"], bound)) for run in opened]
            _summed([run[a:b] for run, a, b in zip(opened, starts, ends, strict=True)]).tofile(file)
            starts = ends
    for run in runs:
        run.unlink()
    return output


def _batches(cells: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (cells read, cell numbers int64 (T, P), counts float32 (T, P)); a count of 0 is padding.

    Slices from all over the array are concatenated and then shuffled: random access to a mapped file would be slow.
    """
    num_cells = _STEPS * size
    pieces = max(1, -(-len(cells) // num_cells))
    length = max(1, num_cells // 64)
    slices = rng.permutation(-(-len(cells) // length))
    for part in np.array_split(slices, pieces):
        mixed = np.concatenate([cells[i * length : (i + 1) * length] for i in part])
        mixed = mixed[rng.permutation(len(mixed))]
        for start in range(0, len(mixed), num_cells):
            block = np.zeros(num_cells, _CELL)
            piece = mixed[start : start + num_cells]
            block[: len(piece)] = piece
            yield len(piece), block["cell"].reshape(_STEPS, size), block["count"].reshape(_STEPS, size)


def _train_steps(
    x_max: float, alpha: float, lr: float, gather: devices.Gather, table, word_TP, context_TP, count_TP
) -> jax.Array:
    """T steps of AdaGrad over cells (T, P): the table (2 words, 2 (D + 1)) after them."""
    width = table.shape[1] // 2 - 1

    def body(table: jax.Array, step: tuple) -> tuple[jax.Array, None]:
        word_P, context_P, count_P = step
        places = jnp.concatenate([word_P, context_P])
        rows = table[places]
        values, squares = rows[:, : width + 1], rows[:, width + 1 :]
        w_PD, c_PD = jnp.split(values, 2)
        error = (w_PD[:, :-1] * c_PD[:, :-1]).sum(1) + w_PD[:, -1] + c_PD[:, -1] - jnp.log(jnp.maximum(count_P, 1e-30))
        slope = jnp.minimum(1.0, (count_P / x_max) ** alpha) * error * (count_P > 0)
        gradient = jnp.concatenate([c_PD, w_PD]).at[:, -1].set(1.0) * jnp.concatenate([slope, slope])[:, None]
        # Each cell's gradient is scaled by the sums before this step, and adds its own square to them.
        update = jnp.concatenate([-lr * gradient * jax.lax.rsqrt(squares), gradient**2], 1)
        return table.at[gather(places)].add(gather(update)), None

    return jax.lax.scan(body, table, (word_TP, context_TP, count_TP))[0]
