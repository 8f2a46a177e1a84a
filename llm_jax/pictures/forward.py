"""Token ids of texts, their labels, and forward passes that keep intermediate values."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.checkpoints import Loaded
from llm_jax.embeddings import contextual
from llm_jax.model import capture as capture_lib
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers import Tokenizer, token_text

# Letters of shapes: L layers, B batch, T time, N heads, D width.


def text_ids(model: Transformer, params: Any, tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text with the special tokens that the tokenizer adds.

    Raises:
      UserError: no ids, or more than the model has positions.
    """
    return contextual.ids(Loaded(model, params, tokenizer), text)


def labels(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token, or its piece where it has no text of its own."""
    return tuple(token_text.label(tokenizer, i) for i in ids)


def capture(model: Transformer, params: Any, rows: Sequence[Sequence[int]]) -> capture_lib.Captured:
    """Attention probabilities and hidden states of rows of ids, padded on the right to a power of two.

    Returns:
      The result of `capture.capture` on the host, including padded positions.
    """
    length = 1 << (max(map(len, rows)) - 1).bit_length()
    tokens_BT = np.zeros((len(rows), length), np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = row
        segments_BT[i, : len(row)] = 1
    # Padding must not exceed the positions of a learned table.
    positions_BT = np.arange(length, dtype=np.int32) * segments_BT
    metadata = TokenMetadata(jnp.asarray(positions_BT), jnp.asarray(segments_BT))
    run = jax.jit(lambda params, tokens, metadata: capture_lib.capture(model, params, tokens, metadata))
    return jax.device_get(run(params, jnp.asarray(tokens_BT), metadata))
