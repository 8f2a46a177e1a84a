"""Token ids padded to one length, and their features. Letters of shapes: B batch, T time, D width."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.model.attention import TokenMetadata
from llm_jax.model.transformer import Transformer


def pad(texts: Sequence[Sequence[int]], length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 (B, T), 0 past the end of each text, and where there are tokens, int32 (B, T) of 0 and 1.

    Args:
      length: T; longer texts are cut. 0: the length of the longest.
    """
    lengths = np.array([len(ids) for ids in texts])
    mask_BT = (np.arange(length or lengths.max()) < lengths[:, None]).astype(np.int32)
    ids_BT = np.zeros_like(mask_BT)
    for row, ids in zip(ids_BT, texts, strict=True):
        row[: len(ids)] = ids[: len(row)]
    return ids_BT, mask_BT


def features(model: Transformer, params: Any, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """(B, T, D): the features of each token."""
    positions_BT = jnp.arange(ids_BT.shape[1]) * mask_BT
    return model.apply({"params": params}, ids_BT, TokenMetadata(positions_BT, mask_BT), method="features")[0]


def mean_features(model: Transformer, params: Any, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """(B, D): their mean over the tokens of each text."""
    x_BTD = features(model, params, ids_BT, mask_BT)
    return jnp.sum(x_BTD * mask_BT[..., None], 1) / jnp.sum(mask_BT, 1, keepdims=True)
