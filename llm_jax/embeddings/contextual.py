"""Vectors of tokens and sentences in context, by layer, from any checkpoint, encoder or decoder.

loaded = llm_jax.load("asset:minilm-l6-v2")
layers = token_vectors(loaded, ["The bank of the river."])[0]  # (layers + 1, tokens, width)
vectors = sentence_vectors(loaded, texts)                      # (texts, width)
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import tokenizers
from llm_jax.checkpoints import Loaded
from llm_jax.errors import UserError
from llm_jax.model import transformer
from llm_jax.model.attention import Tokens
from llm_jax.model.transformer import Embed, Layer, Transformer
from llm_jax.schema import choice

# Letters of shapes: L layers and the embeddings below them, B batch, T time, D width.

POOLS = {
    "mean": lambda x_TD: x_TD.mean(0),
    "first": lambda x_TD: x_TD[0],
    "last": lambda x_TD: x_TD[-1],
}
_BATCH = 32


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(model: Transformer, params, tokens_BT: jax.Array, where: Tokens) -> jax.Array:
    """int32 (B, T) -> what goes into the first layer and comes out of each, (L, B, T, D) in the compute dtype.

    The last is normed where the model has a final norm. The parameters are one entry per layer
    (`scan_layers=False`).
    """
    (features, _), kept = model.apply(
        {"params": params},
        tokens_BT,
        where,
        method="features",
        capture_intermediates=lambda module, name: isinstance(module, Embed | Layer) and name == "__call__",
        mutable=["intermediates"],
    )
    found = kept["intermediates"]
    inner = [found["layers"][str(i)]["__call__"][0][0] for i in range(model.config.num_layers)]
    return jnp.stack([found["embed"]["__call__"][0], *inner[:-1], features])


def ids(loaded: Loaded, text: str) -> list[int]:
    """The ids that stand for `text`, with the marks that the tokenizer puts around it ([CLS], [SEP]; BOS).

    Raises:
      UserError: there are none, or more than the model has positions for.
    """
    marked = getattr(loaded.tokenizer, "encode_marked", None)
    found = marked(text) if marked else tokenizers.prompt(loaded.tokenizer, text)
    if not found:
        raise UserError("a text without tokens has no vector")
    transformer.check_length(loaded.model.config, len(found))
    return found


def token_vectors(loaded: Loaded, texts: Sequence[str]) -> list[np.ndarray]:
    """For each text, the vectors of its `ids` at every layer, float32 (L, T, D)."""
    found: dict[int, np.ndarray] = {}
    for i, layers_LTD in _vectors(loaded, texts):
        found[i] = layers_LTD
    return [found[i] for i in range(len(texts))]


def sentence_vectors(
    loaded: Loaded, texts: Sequence[str], layer: int = -1, pool: str = "mean", normalize: bool = True
) -> np.ndarray:
    """A vector for each text, float32 (texts, D): tokens of one layer pooled, then of length 1.

    Args:
      layer: 0 is the embeddings, -1 the last.
      pool: of `POOLS`; "mean" as in sentence-transformers (Reimers and Gurevych 2019, arXiv:1908.10084).

    Raises:
      UserError: no such layer or pool.
    """
    pooled, count = choice("pool", pool, POOLS), loaded.model.config.num_layers + 1
    if not -count <= layer < count:
        raise UserError(f"layer={layer}; the model has the layers 0 (embeddings) to {count - 1}")
    found = np.zeros((len(texts), loaded.model.config.width), np.float32)
    for i, layers_LTD in _vectors(loaded, texts):
        found[i] = pooled(layers_LTD[layer])
    return found / np.linalg.norm(found, axis=1, keepdims=True) if normalize else found


def _vectors(loaded: Loaded, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """(index, (L, T, D)) of every text, texts of like length together, padded to a power of two."""
    if loaded.model.config.scan_layers:
        raise UserError("vectors by layer need a checkpoint loaded with scan_layers=False")
    rows = [ids(loaded, text) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        length = 1 << (len(rows[part[-1]]) - 1).bit_length()
        tokens = np.zeros((_BATCH if len(order) > _BATCH else len(part), length), np.int32)
        segments = np.zeros_like(tokens)
        for row, i in enumerate(part):
            tokens[row, : len(rows[i])] = rows[i]
            segments[row, : len(rows[i])] = 1
        # Padding stays within the positions of a learned table.
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape) * segments
        where = Tokens(jnp.asarray(positions), jnp.asarray(segments))
        layers = np.asarray(hidden_states(loaded.model, loaded.params, jnp.asarray(tokens), where), np.float32)
        for row, i in enumerate(part):
            yield i, layers[:, row, : len(rows[i])]
