"""Position schemes. `model.position.kind` selects one, or a custom subclass of `Position` (`extensions`).

A scheme is a frozen dataclass with hooks, each of which is the identity by default. Positions are int32 (B, T) and
start at 0 in every document. Phases are computed in float32 for every compute dtype.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import extensions, weights
from llm_jax.errors import UserError
from llm_jax.model import custom_position, distances, rope
from llm_jax.schema import ModelConfig, choice

# Letters of shapes: B batch, T queries, S keys, D width, N heads, H head width, R distances.

Table = Mapping[str, Any]  # {name: weight} of the scheme


@dataclasses.dataclass(frozen=True)
class Position:
    """The scheme "none", and the base class whose hooks the other schemes override.

    In all hooks, `positions` and `q_positions` are int32 (B, T), and `k_positions` is int32 (B, S). `table` contains
    the weights of `declare`, or in `keys` and `values` the weights of `declare_layer`.
    """

    config: ModelConfig

    # Whether the rotation depends on the length of the document, so that keys change as it grows; see `changes_keys`.
    depends_on_length: ClassVar[bool] = False

    @property
    def adds_to_scores(self) -> bool:
        """Whether the scheme overrides `bias`, `keys` or `values`, which fused attention kernels cannot apply."""
        overridden = (getattr(type(self), name) is not getattr(Position, name) for name in ("bias", "keys", "values"))
        return any(overridden)

    def check(self) -> None:
        """Checks the options of the scheme against the shape of the model.

        Raises:
          UserError: the scheme cannot be used with the shape of the model.
        """

    def declare(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the weights that all layers share, which `embed` and `bias` receive."""
        return {}

    def declare_layer(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the weights of each layer, which `keys` and `values` receive."""
        return {}

    def token_width(self) -> int:
        """Width of the token embeddings before `embed`."""
        return self.config.width

    def max_length(self) -> int | None:
        """Number of positions the scheme can encode, or None if it is unbounded."""
        return None

    def embed(self, x: jax.Array, positions: jax.Array, table: Table) -> jax.Array:
        """Adds positions to token embeddings x, float (B, T, token width) -> (B, T, D) in the dtype of x."""
        return x

    def rotate(self, x: jax.Array, positions: jax.Array, length: jax.Array | None) -> jax.Array:
        """Rotates queries or keys x, float (B, T, N, H) -> (B, T, N, H) in the dtype of x.

        A scheme that `depends_on_length` needs `length`, int32 (B, T), the current length of each document.
        """
        return x

    def changes_keys(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """Whether the keys of a document change when it grows from length `before` to `after`: int32 (B, T) -> bool.

        Cached keys are then recomputed; see `Transformer.features`.
        """
        return jnp.zeros_like(before, bool)

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> jax.Array | None:
        """Bias of the attention scores of all layers, float32 (B or 1, N, T, S), or None."""
        return None

    def keys(self, q: jax.Array, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> jax.Array | None:
        """Bias of the scores of one layer that depends on its queries q (B, T, N, H): float32 (B, N, T, S), or None."""
        return None

    def values(self, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> Any:
        """A function from attention probabilities (B, N, T, S) to an addend (B, T, N, H) of the output, or None."""
        return None


@dataclasses.dataclass(frozen=True)
class Absolute(Position, abc.ABC):
    """Base class of schemes that add a position vector to the token embedding, or concatenate it."""

    def check(self) -> None:
        p = self.config.position
        if choice("model.position.combine", p.combine, ("add", "concatenate")) == "add":
            return
        if not 0 < p.width < self.config.width:
            raise UserError(f"model.position.width={p.width}; to concatenate, it must be between 0 and model.width")
        if self.config.tie_embeddings:
            raise UserError(
                "model.position.combine=concatenate needs model.tie_embeddings=False: the token embeddings are "
                "narrower than model.width"
            )

    def vector_width(self) -> int:
        """Width of the position vectors."""
        return self.config.position.width if self.config.position.combine == "concatenate" else self.config.width

    def token_width(self) -> int:
        return self.config.width - (self.vector_width() if self.config.position.combine == "concatenate" else 0)

    @abc.abstractmethod
    def vectors(self, positions: jax.Array, table: Table) -> jax.Array:
        """The position vectors, (B, T, vector width), at positions int32 (B, T)."""

    def embed(self, x: jax.Array, positions: jax.Array, table: Table) -> jax.Array:
        vectors = self.vectors(positions, table).astype(x.dtype)
        return x + vectors if self.config.position.combine == "add" else jnp.concatenate([x, vectors], -1)


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Absolute):
    """Sines and cosines with wavelengths from 2 pi to 2 pi base (Vaswani et al. 2017, arXiv:1706.03762, 3.5)."""

    def check(self) -> None:
        super().check()
        if self.vector_width() % 2:
            raise UserError(f"model.position.kind=sinusoidal pairs sin and cos; the width {self.vector_width()} is odd")

    def vectors(self, positions: jax.Array, table: Table) -> jax.Array:
        return sinusoids(positions, self.vector_width(), self.config.position.base)


@dataclasses.dataclass(frozen=True)
class Learned(Absolute):
    """A learned vector for every position (Gehring et al. 2017, arXiv:1705.03122)."""

    def declare(self) -> dict[str, tuple[int, ...]]:
        return {"table": (self.config.position.max_length, self.vector_width())}

    def max_length(self) -> int:
        return self.config.position.max_length

    def vectors(self, positions: jax.Array, table: Table) -> jax.Array:
        return weights.take(table["table"], positions)


@dataclasses.dataclass(frozen=True)
class Rope(Position):
    """Rotary position embeddings (Su et al. 2021, arXiv:2104.09864, equation 34) and their scalings; see `rope`."""

    def check(self) -> None:
        rope.check(self.config.position, head_dim(self.config))

    def rotate(self, x: jax.Array, positions: jax.Array, length: jax.Array | None) -> jax.Array:
        return rope.rotate(self.config.position, x, positions, length)


@dataclasses.dataclass(frozen=True)
class LengthDependentRope(Rope):
    """Rotary position embeddings whose frequencies depend on the length of the document: dynamic and longrope.

    If the frequencies change, the outputs of every layer change for all earlier tokens, and so do the keys and values
    of the next layer. Cached decoding then equals the full forward pass only if the whole cache is recomputed, which
    transformers does for longrope (Phi-3), but not for dynamic scaling.
    """

    depends_on_length: ClassVar[bool] = True

    def changes_keys(self, before: jax.Array, after: jax.Array) -> jax.Array:
        p = self.config.position
        return rope.frequency_index(p, before) != rope.frequency_index(p, after)


@dataclasses.dataclass(frozen=True)
class Alibi(Position):
    """ALiBi: a bias linear in the distance, a slope per head (Press et al. 2021, arXiv:2108.12409, section 3)."""

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> jax.Array:
        distance = jnp.abs(q_positions[:, None, :, None] - k_positions[:, None, None, :])
        slopes = jnp.asarray(distances.alibi_slopes(self.config.num_heads), jnp.float32)
        return -slopes[None, :, None, None] * distance.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class T5(Position):
    """A learned bias per head and bucket of distances (Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""

    def check(self) -> None:
        p = self.config.position
        if p.num_buckets < 4 or p.num_buckets % 4 or p.max_distance <= p.num_buckets:
            raise UserError(
                f"model.position.num_buckets={p.num_buckets}, max_distance={p.max_distance}; expected a multiple of 4 "
                "and a max_distance above it"
            )

    def declare(self) -> dict[str, tuple[int, ...]]:
        return {"bias": (self.config.position.num_buckets, self.config.num_heads)}

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> jax.Array:
        p = self.config.position
        # Every offset beyond max_distance falls into the bucket of max_distance, so 2 max_distance + 1 biases suffice.
        limit = p.max_distance
        buckets = distances.t5_buckets(jnp.arange(-limit, limit + 1), p.num_buckets, limit, self.config.causal)
        by_offset_NR = weights.take(table["bias"], buckets).astype(jnp.float32).T
        # Without the barrier XLA would repeat the lookup in every layer.
        return jax.lax.optimization_barrier(distances.gather_by_offset(by_offset_NR, q_positions, k_positions))


@dataclasses.dataclass(frozen=True)
class Shaw(Position):
    """Learned vectors per clipped distance, added to keys, values or both (Shaw et al. 2018, arXiv:1803.02155).

    Queries are multiplied by the 2 k + 1 vectors, k = max_relative_position, and the products are then gathered by
    distance (section 3.3), so that no array of size T x S x H is formed.
    """

    def check(self) -> None:
        vectors = self.config.position.relative_embeddings
        choice("model.position.relative_embeddings", vectors, ("keys", "values", "both"))

    def declare_layer(self) -> dict[str, tuple[int, ...]]:
        shape = (2 * self.config.position.max_relative_position + 1, head_dim(self.config))
        vectors = self.config.position.relative_embeddings
        return dict.fromkeys(("keys", "values") if vectors == "both" else (vectors,), shape)

    def _indices(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """Index of the vector for every query and key, int32 (B, T, S)."""
        clip = self.config.position.max_relative_position
        return jnp.clip(k_positions[:, None, :] - q_positions[:, :, None], -clip, clip) + clip

    def keys(self, q: jax.Array, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> jax.Array | None:
        if "keys" not in table:
            return None
        scores_BTNR = weights.dot(q, table["keys"], transposed=True, out_dtype=jnp.float32) * q.shape[-1] ** -0.5
        scores_BNTR = jnp.moveaxis(scores_BTNR, 2, 1)
        indices_BNTS = jnp.broadcast_to(
            self._indices(q_positions, k_positions)[:, None], (*scores_BNTR.shape[:3], k_positions.shape[1])
        )
        return jnp.take_along_axis(scores_BNTR, indices_BNTS, -1)

    def values(self, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> Any:
        if "values" not in table:
            return None
        indices_BTS = self._indices(q_positions, k_positions)
        distances = 2 * self.config.position.max_relative_position + 1

        def by_distance(indices_S: jax.Array, probs_NS: jax.Array) -> jax.Array:
            return jnp.zeros((probs_NS.shape[0], distances), probs_NS.dtype).at[:, indices_S].add(probs_NS)

        def add(probs_BNTS: jax.Array) -> jax.Array:
            probs_BTNR = jax.vmap(jax.vmap(by_distance))(indices_BTS, jnp.moveaxis(probs_BNTS, 1, 2))
            return weights.dot(probs_BTNR, table["values"])

        return add


def sinusoids(positions: jax.Array, width: int, base: float) -> jax.Array:
    """PE(p, 2i) = sin(p / base^(2i/width)), PE(p, 2i + 1) = cos(p / base^(2i/width)) (Vaswani et al. 2017).

    Args:
      positions: int32 (...).
      width: number of features, even.
      base: base of the wavelengths, 10000 in the paper.

    Returns:
      float32 (..., width).
    """
    frequencies = jnp.asarray(base ** (-np.arange(0, width, 2) / width), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions.shape, width)


SCHEMES: dict[str, type[Position]] = {
    "none": Position,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "shaw": Shaw,
    "t5": T5,
    "alibi": Alibi,
    "rope": Rope,
}


def make(config: ModelConfig, kind: str = "global") -> Position:
    """Returns the position scheme of `config.position` for one kind of layer.

    Args:
      kind: kind of the layer, see `model.layer_pattern`: "local" layers may have another RoPE base
        (`model.position.local_base`), and "nope" layers have no positions.

    Raises:
      UserError: the kind is unknown, or the scheme cannot be used with the shape of the model.
    """
    if kind == "nope":
        return Position(config)
    if kind == "local" and config.position.local_base:
        position = dataclasses.replace(config.position, base=config.position.local_base, scaling="none")
        config = dataclasses.replace(config, position=position)
    cls = extensions.select("model.position.kind", config.position.kind, SCHEMES)
    if isinstance(cls, extensions.Extension):
        return _custom(cls, config)
    if cls is Rope and config.position.scaling in rope.LENGTH_DEPENDENT:
        cls = LengthDependentRope
    scheme = cls(config)
    scheme.check()
    return scheme


@functools.lru_cache(64)
def _custom(extension: extensions.Extension, config: ModelConfig) -> Position:
    """Creates a custom scheme and checks its hooks."""
    scheme: Position = extension.call(extension.bind(extension.subclass_of(Position)), config)
    extension.call(scheme.check)
    custom_position.check(extension, scheme, head_dim(config))
    return scheme


def head_dim(config: ModelConfig) -> int:
    """Width of an attention head: `model.head_dim`, or model.width / model.num_heads if it is 0.

    Raises:
      UserError: num_heads is not a multiple of num_kv_heads, or width is not a multiple of num_heads.
    """
    if config.num_heads % config.num_kv_heads:
        cure = f"set model.num_kv_heads={math.gcd(config.num_heads, config.num_kv_heads)}, or another divisor"
        if config.num_kv_heads > config.num_heads:
            cure = f"set model.num_kv_heads={config.num_heads} (keys and values for each head), or another divisor"
        raise UserError(
            f"model.num_kv_heads={config.num_kv_heads} does not divide model.num_heads={config.num_heads}; {cure}"
        )
    if config.head_dim:
        return config.head_dim
    if config.width % config.num_heads:
        raise UserError(
            f"model.num_heads={config.num_heads} does not divide model.width={config.width}; change one of them, or "
            "set model.head_dim"
        )
    return config.width // config.num_heads
