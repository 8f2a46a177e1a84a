"""Position schemes: how a model is told where a token stands. `model.position.kind` picks one.

A scheme is a small frozen dataclass with hooks, each the identity by default. Positions are int32
(B, T) and count from 0 in every document. Phases are computed in float32 whatever the compute dtype.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import weights
from llm_jax.config import ModelConfig, choice
from llm_jax.errors import UserError

# Letters of shapes: B batch, T queries, S keys, D width, N heads, H head width.


@dataclasses.dataclass(frozen=True)
class Position:
    """No positions, and the hooks that the schemes override."""

    config: ModelConfig

    def declare(self) -> dict[str, tuple[int, int]]:
        """Names and shapes of the scheme's own weights, which the hooks get as `table`."""
        return {}

    def max_length(self) -> int | None:
        """The number of positions there are, or None for no bound."""
        return None

    def embed(self, x: jax.Array, positions: jax.Array, table: Mapping[str, Any]) -> jax.Array:
        """Token embeddings (B, T, D) -> embeddings with positions."""
        return x

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys (B, T, N, H) -> the same, rotated. Cached keys are stored rotated."""
        return x

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, table: Mapping[str, Any]) -> jax.Array | None:
        """What is added to the scores: float32 (B, N, T, S) from positions (B, T) and (B, S), or None."""
        return None


@dataclasses.dataclass(frozen=True)
class Learned(Position):
    """A trained vector for every position, added to the embedding (Gehring et al. 2017, arXiv:1705.03122)."""

    def declare(self) -> dict[str, tuple[int, int]]:
        return {"table": (self.config.position.max_length, self.config.width)}

    def max_length(self) -> int:
        return self.config.position.max_length

    def embed(self, x: jax.Array, positions: jax.Array, table: Mapping[str, Any]) -> jax.Array:
        return x + weights.take(table["table"], positions).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Rope(Position):
    """Rotary positions, half-split pairs (Su et al. 2021, arXiv:2104.09864, equation 34)."""

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        half = x.shape[-1] // 2
        frequencies = self.config.position.base ** -(np.arange(half, dtype=np.float64) / half)
        angles_BTH = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        sin, cos = jnp.sin(angles_BTH)[:, :, None], jnp.cos(angles_BTH)[:, :, None]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Alibi(Position):
    """A penalty linear in the distance, one slope a head (Press et al. 2021, arXiv:2108.12409, section 3)."""

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, table: Mapping[str, Any]) -> jax.Array:
        distance = q_positions[:, None, :, None] - k_positions[:, None, None, :]
        slopes = jnp.asarray(alibi_slopes(self.config.num_heads), jnp.float32)
        return -slopes[None, :, None, None] * jnp.abs(distance).astype(jnp.float32)


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes (heads,): 2^(-8i/n) for a power of two n; else those of the power below, then every
    other one of the power above (the paper's own code, attention_with_linear_biases)."""
    power = 2 ** int(np.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power), 2) / power)
    return np.concatenate([slopes, extra])


SCHEMES = {"none": Position, "learned": Learned, "rope": Rope, "alibi": Alibi}


def make(config: ModelConfig) -> Position:
    """The scheme that `config.position` names.

    Raises:
      UserError: an unknown kind, or a scheme that the model's shape does not admit.
    """
    scheme = choice("model.position.kind", config.position.kind, SCHEMES)(config)
    if isinstance(scheme, Rope) and head_width(config) % 2:
        raise UserError(f"model.position.kind=rope rotates pairs; the head width {head_width(config)} is odd")
    return scheme


def head_width(config: ModelConfig) -> int:
    """`model.head_width`, or its default.

    Raises:
      UserError: the heads do not divide the width, or the key/value heads the heads.
    """
    if config.num_kv_heads < 1 or config.num_heads % config.num_kv_heads:
        raise UserError(f"model.num_kv_heads={config.num_kv_heads} does not divide model.num_heads={config.num_heads}")
    if config.head_width:
        return config.head_width
    if config.width % config.num_heads:
        raise UserError(f"model.num_heads={config.num_heads} does not divide model.width={config.width}")
    return config.width // config.num_heads
