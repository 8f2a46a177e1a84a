"""Contextual vectors of tokens and sentences, by layer, of any checkpoint, encoder or decoder.

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
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.layer_stack import Layer
from llm_jax.model.transformer import Embed, Transformer
from llm_jax.schema import choice

# Letters of shapes: L layers and the embeddings below them, B batch, T time, D width.

POOLS = {
    "mean": lambda x_TD: x_TD.mean(0),
    "first": lambda x_TD: x_TD[0],
    "last": lambda x_TD: x_TD[-1],
}
_BATCH = 32


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(model: Transformer, params, tokens_BT: jax.Array, positions: TokenMetadata) -> jax.Array:
    """The input of the first layer and the output of each: ids int32 (B, T) -> (L, B, T, D) in the compute dtype.

    The last output is normalized where the model has a final norm.

    Args:
      params: one entry per layer (`scan_layers=False`).
      positions: positions and segment ids of the tokens.
    """
    (features, _), variables = model.apply(
        {"params": params},
        tokens_BT,
        positions,
        method="features",
        capture_intermediates=lambda module, name: isinstance(module, Embed | Layer) and name == "__call__",
        mutable=["intermediates"],
    )
    outputs = variables["intermediates"]
    inner = [outputs["layers"][str(i)]["__call__"][0][0] for i in range(model.config.num_layers)]
    return jnp.stack([outputs["embed"]["__call__"][0], *inner[:-1], features])


def ids(loaded: Loaded, text: str | Sequence[int]) -> list[int]:
    """The ids of `text` with the special tokens that the tokenizer adds ([CLS] and [SEP], or BOS).

    Args:
      text: a text, or token ids, which are returned unchanged.

    Raises:
      UserError: no ids, or more than the model has positions.
    """
    if isinstance(text, str):
        encode = getattr(loaded.tokenizer, "encode_with_special_tokens", None)
        text_ids = encode(text) if encode else tokenizers.prompt(loaded.tokenizer, text)
    else:
        text_ids = list(text)
    if not text_ids:
        raise UserError("the text has no tokens, hence no vector; expected some text")
    transformer.check_length(loaded.model.config, len(text_ids))
    return text_ids


def token_vectors(loaded: Loaded, texts: Sequence[str | Sequence[int]]) -> list[np.ndarray]:
    """The vectors of the `ids` of each text, or of token ids, at every layer, float32 (L, T, D)."""
    vectors = dict(_vectors(loaded, texts))
    return [vectors[i] for i in range(len(texts))]


def sentence_vectors(
    loaded: Loaded,
    texts: Sequence[str | Sequence[int]],
    layer: int = -1,
    pool: str = "mean",
    normalize: bool = True,
) -> np.ndarray:
    """A vector for each text, float32 (texts, D): the pooled token vectors of one layer.

    Args:
      texts: texts, or token ids, such as prompts with a template; see `ids`.
      layer: 0 for the embeddings, -1 for the last layer.
      pool: one of `POOLS`; "mean" as in sentence-transformers (Reimers and Gurevych 2019, arXiv:1908.10084).
      normalize: whether vectors are scaled to length 1.

    Raises:
      UserError: an unknown layer or pool; otherwise as `ids`.
    """
    pooled, count = choice("pool", pool, POOLS), loaded.model.config.num_layers + 1
    if not -count <= layer < count:
        raise UserError(f"layer={layer}; the model has the layers 0 (embeddings) to {count - 1}")
    vectors = np.zeros((len(texts), loaded.model.config.width), np.float32)
    for i, (layer_TD,) in _vectors(loaded, texts, slice(layer % count, layer % count + 1)):
        vectors[i] = pooled(layer_TD)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors


def _vectors(
    loaded: Loaded, texts: Sequence[str | Sequence[int]], layers: slice = slice(None)
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index, float32 (L, T, D)) of every text; similar lengths share a batch, padded to a power of 2.

    Args:
      layers: the selected layers.
    """
    if loaded.model.config.scan_layers:
        raise UserError("vectors by layer need a checkpoint that was loaded with scan_layers=False")
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
        placed = TokenMetadata(jnp.asarray(positions), jnp.asarray(segments))
        states_LBTD = hidden_states(loaded.model, loaded.params, jnp.asarray(tokens), placed)
        selected = np.asarray(states_LBTD[layers], np.float32)
        for row, i in enumerate(part):
            yield i, selected[:, row, : len(rows[i])]
