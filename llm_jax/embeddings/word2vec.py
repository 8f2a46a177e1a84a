"""word2vec: skip-gram and CBOW with negative sampling (Mikolov et al. 2013, arXiv:1301.3781 and 1310.4546).

A step takes a stretch of text in which every word is both centre and context: its two vectors lie side by side in one
row of the table, gathered once and scattered once. The pairs inside the windows of a block of words form a band of the
block's product with the words around it. Negatives are drawn per block and shared by its pairs (weighted so that each
pair has `negatives` of them); they are further columns of the same product. So a word costs two rows of gathers and
scatters, and the rest is matrix products. With several devices, each takes a stretch and the words around it that its
windows reach.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.embeddings import devices
from llm_jax.embeddings.texts import BREAK, WordCorpus
from llm_jax.embeddings.vectors import WordVectors, check_finite
from llm_jax.schema import EmbeddingsConfig, Word2VecConfig, choice

# Letters of shapes: T steps, S words of a step on a device, E = S + 2 windows, G blocks, B words of a block,
# C = B + 2 windows, N negatives of a block, D width.

_BLOCK = 16
_STEPS = 256  # in one call of the compiled scan
_POWER = 0.75  # of counts, for negatives (Mikolov et al. 2013b, section 2.2)

Progress = Callable[[int], None]


def train(corpus: WordCorpus, config: EmbeddingsConfig, progress: Progress = lambda words: None) -> WordVectors:
    """Trains the vectors of the words of a corpus.

    Args:
      progress: called with the number of words of the text processed since the last call.

    Raises:
      UserError: an unknown kind; a `chunk` that is no multiple of blocks and devices; or vectors that diverge: the
        gradients of a step's words are summed, so that a small vocabulary needs short steps.
    """
    w = config.word2vec
    choice("kind", config.kind, ("skipgram", "cbow"))
    devices.check("word2vec.chunk", w.chunk, _BLOCK)
    rng = np.random.default_rng(config.seed)
    start = (rng.random((len(corpus.words), config.width)) - 0.5) / config.width
    table = jnp.asarray(np.concatenate([start, np.zeros_like(start)], 1).astype(np.float32))
    train_steps = devices.compiled(
        functools.partial(_train_steps, config.kind, w.window, w.negatives), (True, True, True, False)
    )
    total, done = config.epochs * len(corpus.ids), 0
    for _ in range(config.epochs):
        for read, ids_TS, negatives_TGN, windows_TS in _steps(corpus, w, rng):
            share = (done + read * np.arange(len(ids_TS)) / len(ids_TS)) / total
            rates = w.lr + (w.final_lr - w.lr) * share
            ids_TE = word_windows(ids_TS, w.window, jax.device_count())
            table = train_steps(table, ids_TE, negatives_TGN, windows_TS, rates.astype(np.float32))
            done += read
            progress(read)
    cure = f"lower word2vec.chunk={w.chunk} (words whose gradients are summed) or word2vec.lr={w.lr}"
    return WordVectors(corpus.words, check_finite(np.asarray(table[:, : config.width]), cure))


def _steps(
    corpus: WordCorpus, w: Word2VecConfig, rng: np.random.Generator
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (words read, ids (T, S), negatives (T, G, N), windows (T, S)), all int32.

    `BREAK` stands between paragraphs and pads the end. Each centre has a window drawn from 1 to `w.window`.
    """
    keep = keep_probability(corpus.counts, w.sample).astype(np.float32)
    keep = np.append(keep, np.float32(2))  # BREAK, which is -1, always stays
    cumulative = noise_distribution(corpus.counts)
    size, read, pending = _STEPS * w.chunk, 0, np.zeros(0, np.int32)
    for begin in range(0, len(corpus.ids), size):
        part = np.asarray(corpus.ids[begin : begin + size])
        pending = np.concatenate([pending, part[rng.random(len(part), np.float32) < keep[part]]])
        read += len(part)
        last = begin + size >= len(corpus.ids)
        while len(pending) >= size or (last and len(pending)):
            block, pending = pending[:size], pending[size:]
            ids = np.pad(block, (0, size - len(block)), constant_values=BREAK).reshape(_STEPS, w.chunk)
            draws = rng.random((_STEPS, w.chunk // _BLOCK, w.shared_negatives)) * cumulative[-1]
            negatives = np.searchsorted(cumulative, draws, side="right").astype(np.int32)
            windows = rng.integers(1, w.window + 1, ids.shape, np.int32)
            yield read, ids, negatives, windows
            read = 0


def noise_distribution(counts: np.ndarray) -> np.ndarray:
    """Cumulative weights of words as negatives, counts^0.75: int64 (words,) -> float64 (words,).

    Mikolov et al. 2013, arXiv:1310.4546, section 2.2.
    """
    return np.cumsum(counts**_POWER)


def word_windows(ids_TS: np.ndarray, window: int, count: int) -> np.ndarray:
    """The words of each of `count` devices with `window` words on both sides, `BREAK` past the ends: (T, count * E)."""
    padded = np.pad(ids_TS, ((0, 0), (window, window)), constant_values=BREAK)
    size = ids_TS.shape[1] // count
    return np.concatenate([padded[:, i * size : (i + 1) * size + 2 * window] for i in range(count)], 1)


def keep_probability(counts: np.ndarray, sample: float) -> np.ndarray:
    """Probability that a word is kept by subsampling, min(1, sqrt(t/f) + t/f), float64 (words,).

    f is the word's share of the text and t is `sample`; 0 keeps all. The formula of word2vec.c, which differs from
    arXiv:1310.4546, section 2.3.
    """
    if not sample:
        return np.ones(len(counts))
    ratio = sample * counts.sum() / counts
    return np.minimum(1.0, np.sqrt(ratio) + ratio)


def _train_steps(
    kind: str,
    window: int,
    negatives: int,
    gather: devices.Gather,
    table: jax.Array,
    ids_TE: jax.Array,
    negatives_TGN: jax.Array,
    windows_TS: jax.Array,
    rates_T: jax.Array,
) -> jax.Array:
    gradient = {"skipgram": _skipgram, "cbow": _cbow}[kind]
    width = table.shape[1] // 2

    def body(table: jax.Array, step: tuple) -> tuple[jax.Array, None]:
        ids_E, negatives_GN, windows_S, rate = step
        places = jnp.concatenate([jnp.maximum(ids_E, 0), negatives_GN.reshape(-1)])
        rows = table[places]
        x_ED, y_ED = rows[: len(ids_E), :width], rows[: len(ids_E), width:]
        n_GND = rows[len(ids_E) :, width:].reshape(*negatives_GN.shape, width)
        x, y, n = gradient(x_ED, y_ED, n_GND, context_mask(ids_E, windows_S, window), negatives)
        n_padded = jnp.pad(n.reshape(-1, width), ((0, 0), (width, 0)))
        update = rate * jnp.concatenate([jnp.concatenate([x, y], 1), n_padded])
        return table.at[gather(places)].add(gather(update)), None

    return jax.lax.scan(body, table, (ids_TE, negatives_TGN, windows_TS, rates_T))[0]


def context_mask(ids_E: jax.Array, windows_S: jax.Array, window: int) -> jax.Array:
    """Which words are contexts of which centres: bool (G, B, C), C counted from `window` words before the block.

    A context is another word of the same paragraph, within the centre's own window.
    """
    paragraph = jnp.cumsum(ids_E == BREAK)
    centre = jnp.where(ids_E == BREAK, -1, paragraph)[window:-window]  # a break neither has contexts nor is one
    around = _with_halo(jnp.where(ids_E == BREAK, -2, paragraph)[:, None], window)[..., 0]
    distance = jnp.abs(jnp.arange(_BLOCK + 2 * window) - window - jnp.arange(_BLOCK)[:, None])
    near = (distance <= windows_S.reshape(-1, _BLOCK, 1)) & (distance > 0)
    return near & (centre.reshape(-1, _BLOCK, 1) == around[:, None])


def _skipgram(x_ED, y_ED, n_GND, band_GBC, negatives: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ascent directions of log s(x y) for pairs and log s(-x n) for negatives, with respect to x, y and n.

    s is the logistic function. arXiv:1310.4546, equation 4.
    """
    context, window = band_GBC.shape[2], (band_GBC.shape[2] - _BLOCK) // 2
    x_GBD = x_ED[window:-window].reshape(-1, _BLOCK, x_ED.shape[1])
    targets = jnp.concatenate([_with_halo(y_ED, window), n_GND], 1)
    weight = band_GBC.sum(-1, keepdims=True) * (negatives / n_GND.shape[1])
    score = _product("gbd,gcd->gbc", x_GBD, targets)
    g = jnp.concatenate(
        [band_GBC * jax.nn.sigmoid(-score[..., :context]), -weight * jax.nn.sigmoid(score[..., context:])], -1
    )
    x, y = _product("gbc,gcd->gbd", g, targets), _product("gbc,gbd->gcd", g, x_GBD)
    return _of_centres(x, window), _without_halo(y[:, :context], window), y[:, context:]


def _cbow(x_ED, y_ED, n_GND, band_GBC, negatives: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `_skipgram`, with the mean of the contexts' x in place of x, negatives the centre's y."""
    window = (band_GBC.shape[2] - _BLOCK) // 2
    count = band_GBC.sum(-1, keepdims=True)
    mean_GBC = band_GBC / jnp.maximum(count, 1)
    h_GBD = _product("gbc,gcd->gbd", mean_GBC, _with_halo(x_ED, window))
    y_GBD = y_ED[window:-window].reshape(h_GBD.shape)
    g_GB1 = jax.nn.sigmoid(-(h_GBD * y_GBD).sum(-1, keepdims=True)) * (count > 0)
    g_GBN = -jax.nn.sigmoid(_product("gbd,gnd->gbn", h_GBD, n_GND)) * (count > 0) * (negatives / n_GND.shape[1])
    error = g_GB1 * y_GBD + _product("gbn,gnd->gbd", g_GBN, n_GND)
    # The full gradient for every context, as in word2vec.c; that of the mean would be a share each.
    x = _without_halo(_product("gbc,gbd->gcd", band_GBC.astype(x_ED.dtype), error), window)
    return x, _of_centres(g_GB1 * h_GBD, window), _product("gbn,gbd->gnd", g_GBN, h_GBD)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _with_halo(a_ED: jax.Array, window: int) -> jax.Array:
    """(E, D) -> (G, C, D): each block with `window` rows before and after it."""
    return jnp.stack([a_ED[i : i + _BLOCK + 2 * window] for i in range(0, len(a_ED) - 2 * window, _BLOCK)])


def _of_centres(a_GBD: jax.Array, window: int) -> jax.Array:
    """Rows of blocks (G, B, D) as rows of all words (E, D), zero around them."""
    return jnp.pad(a_GBD.reshape(-1, a_GBD.shape[-1]), ((window, window), (0, 0)))


def _without_halo(a_GCD: jax.Array, window: int) -> jax.Array:
    """The transpose of `_with_halo`: sums the rows of the same word, (G, C, D) -> (E, D)."""
    groups, _, width = a_GCD.shape
    total = jnp.zeros((groups * _BLOCK + 2 * window, width), a_GCD.dtype)
    num_blocks = -(-2 * window // _BLOCK) + 1  # blocks that overlap a row of the halo
    for i in range(num_blocks):
        part = a_GCD[:, i * _BLOCK : (i + 1) * _BLOCK]
        part = jnp.pad(part, ((0, 0), (0, _BLOCK - part.shape[1]), (0, 0))).reshape(-1, width)
        part = part[: len(total) - i * _BLOCK]
        total += jnp.pad(part, ((i * _BLOCK, len(total) - i * _BLOCK - len(part)), (0, 0)))
    return total
