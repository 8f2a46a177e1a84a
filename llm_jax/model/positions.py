"""Position schemes: how a model is told where a token stands. `model.position.kind` picks one.

A scheme is a small frozen dataclass with hooks, each the identity by default. Positions are int32
(B, T) and count from 0 in every document. Phases are computed in float32 whatever the compute dtype.
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

from llm_jax import weights
from llm_jax.errors import UserError
from llm_jax.model import rope
from llm_jax.schema import ModelConfig, choice

# Letters of shapes: B batch, T queries, S keys, D width, N heads, H head width, R distances.

Table = Mapping[str, Any]  # the scheme's own weights by name


@dataclasses.dataclass(frozen=True)
class Position:
    """No positions, and the hooks that the schemes override."""

    config: ModelConfig

    # Whether keys are cached as they come and rotated whenever they are read (their phases change
    # as the sequence grows), instead of once before they are cached.
    rotates_cache: ClassVar[bool] = False

    @property
    def adds_to_scores(self) -> bool:
        """Whether attention needs more than queries, keys and a mask."""
        changed = (getattr(type(self), name) is not getattr(Position, name) for name in ("bias", "keys", "values"))
        return any(changed)

    def check(self) -> None:
        """Raises UserError where the scheme and the shape of the model do not go together."""

    def declare(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of weights that the whole model shares; `embed` and `bias` get them."""
        return {}

    def declare_layer(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of weights that every layer has of its own; `keys` and `values` get them."""
        return {}

    def token_width(self) -> int:
        """The width of the token embeddings, before `embed`."""
        return self.config.width

    def max_length(self) -> int | None:
        """The number of positions there are, or None for no bound."""
        return None

    def embed(self, x: jax.Array, positions: jax.Array, table: Table) -> jax.Array:
        """Token embeddings (B, T, token width) -> embeddings with positions (B, T, D)."""
        return x

    def rotate(self, x: jax.Array, positions: jax.Array, length: jax.Array | None) -> jax.Array:
        """Queries or keys (B, T, N, H) -> the same, rotated.

        `length`: int32 (B, T), that of the document of each so far, for a scheme that `rotates_cache`.
        """
        return x

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> jax.Array | None:
        """What is added to the scores in all layers: float32 (B or 1, N, T, S), or None."""
        return None

    def keys(self, q: jax.Array, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> jax.Array | None:
        """What is added to the scores in one layer, from its queries (B, T, N, H): (B, N, T, S), or None."""
        return None

    def values(self, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> Any:
        """A function from attention shares (B, N, T, S) to what is added to the output (B, T, N, H), or None."""
        return None


@dataclasses.dataclass(frozen=True)
class Absolute(Position, abc.ABC):
    """What the schemes that give every position a vector have in common: it is added or concatenated."""

    def check(self) -> None:
        p = self.config.position
        if choice("model.position.combine", p.combine, ("add", "concatenate")) == "add":
            return
        if not 0 < p.width < self.config.width:
            raise UserError(f"model.position.width={p.width}; to concatenate, it must be between 0 and model.width")
        if self.config.tie_embeddings:
            raise UserError(
                "model.position.combine=concatenate needs model.tie_embeddings=False: the table is narrower"
            )

    def own_width(self) -> int:
        """The width of the vectors."""
        return self.config.position.width if self.config.position.combine == "concatenate" else self.config.width

    def token_width(self) -> int:
        return self.config.width - (self.own_width() if self.config.position.combine == "concatenate" else 0)

    @abc.abstractmethod
    def vectors(self, positions: jax.Array, table: Table) -> jax.Array:
        """(B, T) -> (B, T, own width)."""

    def embed(self, x: jax.Array, positions: jax.Array, table: Table) -> jax.Array:
        vectors = self.vectors(positions, table).astype(x.dtype)
        return x + vectors if self.config.position.combine == "add" else jnp.concatenate([x, vectors], -1)


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Absolute):
    """sin and cos at wavelengths from 2 pi to 2 pi base (Vaswani et al. 2017, arXiv:1706.03762, 3.5)."""

    def check(self) -> None:
        super().check()
        if self.own_width() % 2:
            raise UserError(f"model.position.kind=sinusoidal pairs sin and cos; the width {self.own_width()} is odd")

    def vectors(self, positions: jax.Array, table: Table) -> jax.Array:
        return sinusoids(positions, self.own_width(), self.config.position.base)


@dataclasses.dataclass(frozen=True)
class Learned(Absolute):
    """A trained vector for every position (Gehring et al. 2017, arXiv:1705.03122)."""

    def declare(self) -> dict[str, tuple[int, ...]]:
        return {"table": (self.config.position.max_length, self.own_width())}

    def max_length(self) -> int:
        return self.config.position.max_length

    def vectors(self, positions: jax.Array, table: Table) -> jax.Array:
        return weights.take(table["table"], positions)


@dataclasses.dataclass(frozen=True)
class Rope(Position):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864, equation 34) and their scalings: see `rope`."""

    def check(self) -> None:
        rope.check(self.config.position, head_dim(self.config))

    def rotate(self, x: jax.Array, positions: jax.Array, length: jax.Array | None) -> jax.Array:
        return rope.rotate(self.config.position, x, positions, length)


@dataclasses.dataclass(frozen=True)
class DynamicRope(Rope):
    """Rotary positions whose base grows with the sequence: keys that are cached must be rotated anew.

    A cached decode equals the full forward of each prefix in the first layer only: above it, the keys
    come from outputs that were computed while the sequence was shorter, and the full forward has
    computed those anew as well. That is the scheme's, whoever implements it.
    """

    rotates_cache: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Alibi(Position):
    """A penalty linear in the distance, one slope a head (Press et al. 2021, arXiv:2108.12409, section 3)."""

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> jax.Array:
        distance = jnp.abs(q_positions[:, None, :, None] - k_positions[:, None, None, :])
        slopes = jnp.asarray(alibi_slopes(self.config.num_heads), jnp.float32)
        return -slopes[None, :, None, None] * distance.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class T5(Position):
    """A trained bias per head and bucket of distances (Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""

    def check(self) -> None:
        p = self.config.position
        if p.num_buckets < 4 or p.num_buckets % 4 or p.max_distance <= p.num_buckets:
            raise UserError(
                f"model.position.num_buckets={p.num_buckets}, max_distance={p.max_distance}; expected a multiple of 4 "
                "and a larger distance"
            )

    def declare(self) -> dict[str, tuple[int, ...]]:
        return {"bias": (self.config.position.num_buckets, self.config.num_heads)}

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> jax.Array:
        p = self.config.position
        # Past max_distance every offset has the bucket of max_distance: a short list of biases by offset.
        far = p.max_distance
        buckets = t5_buckets(jnp.arange(-far, far + 1), p.num_buckets, far, self.config.causal)
        by_offset_NR = weights.take(table["bias"], buckets).astype(jnp.float32).T
        # Without the barrier every layer's scores would look it up anew.
        return jax.lax.optimization_barrier(_by_offset(by_offset_NR, q_positions, k_positions))


@dataclasses.dataclass(frozen=True)
class Shaw(Position):
    """Trained vectors per clipped distance, added to keys, values or both (Shaw et al. 2018, arXiv:1803.02155).

    Queries are multiplied with the 2 k + 1 vectors, k = max_relative_position, and the products are then
    gathered by distance (section 3.3), so that no array of size T x S x H exists.
    """

    def check(self) -> None:
        vectors = self.config.position.relative_embeddings
        choice("model.position.relative_embeddings", vectors, ("keys", "values", "both"))

    def declare_layer(self) -> dict[str, tuple[int, ...]]:
        shape = (2 * self.config.position.max_relative_position + 1, head_dim(self.config))
        vectors = self.config.position.relative_embeddings
        return dict.fromkeys(("keys", "values") if vectors == "both" else (vectors,), shape)

    def _places(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        clip = self.config.position.max_relative_position
        return jnp.clip(k_positions[:, None, :] - q_positions[:, :, None], -clip, clip) + clip

    def keys(self, q: jax.Array, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> jax.Array | None:
        if "keys" not in table:
            return None
        scores_BTNR = weights.dot(q, table["keys"], transposed=True, out_dtype=jnp.float32) * q.shape[-1] ** -0.5
        scores_BNTR = jnp.moveaxis(scores_BTNR, 2, 1)
        places = jnp.broadcast_to(
            self._places(q_positions, k_positions)[:, None], (*scores_BNTR.shape[:3], k_positions.shape[1])
        )
        return jnp.take_along_axis(scores_BNTR, places, -1)

    def values(self, q_positions: jax.Array, k_positions: jax.Array, table: Table) -> Any:
        if "values" not in table:
            return None
        places = self._places(q_positions, k_positions)
        distances = 2 * self.config.position.max_relative_position + 1

        def spread(places_S: jax.Array, shares_NS: jax.Array) -> jax.Array:
            return jnp.zeros((shares_NS.shape[0], distances), shares_NS.dtype).at[:, places_S].add(shares_NS)

        def add(shares_BNTS: jax.Array) -> jax.Array:
            shares_BTNR = jax.vmap(jax.vmap(spread))(places, jnp.moveaxis(shares_BNTS, 1, 2))
            return weights.dot(shares_BTNR, table["values"])

        return add


def _by_offset(table_NR: jax.Array, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
    """(B, N, T, S) of table_NR[n, offset + far], R = 2 far + 1, where offset is k - q cut to [-far, far].

    Where the queries are the keys and positions go up by one (or start again at 0, in a segment of its own),
    offsets are those of the places: rows of a matrix of diagonals, far faster than looking up every entry.
    """
    far = table_NR.shape[1] // 2

    def looked_up() -> jax.Array:
        places_BTS = jnp.clip(k_positions[:, None, :] - q_positions[:, :, None], -far, far) + far
        places_BTS = jax.lax.optimization_barrier(places_BTS)
        # All heads of an offset are copied at once: a gather goes entry by entry.
        return jnp.moveaxis(table_NR.T.at[places_BTS].get(mode="promise_in_bounds"), -1, 1)

    if q_positions is not k_positions:
        return looked_up()
    batch, length = q_positions.shape
    offsets = jnp.clip(jnp.arange(1 - length, length), -far, far) + far

    def diagonals() -> jax.Array:
        return jnp.broadcast_to(_diagonals(table_NR[:, offsets]), (batch, table_NR.shape[0], length, length))

    before, after = k_positions[:, :-1], k_positions[:, 1:]
    return jax.lax.cond(jnp.all((after == before + 1) | (after == 0)), diagonals, looked_up)


@jax.custom_vjp
def _diagonals(values_NR: jax.Array) -> jax.Array:
    """(N, 2 T - 1) -> (N, T, T) whose entry (t, s) is values[s - t + T - 1]."""
    length = (values_NR.shape[1] + 1) // 2
    row = functools.partial(jax.lax.dynamic_slice_in_dim, values_NR, slice_size=length, axis=1)
    return jax.vmap(lambda t: row(length - 1 - t), out_axes=1)(jnp.arange(length))


def _sum_diagonals(saved: None, g_NTT: jax.Array) -> tuple[jax.Array]:
    heads, length, _ = g_NTT.shape

    def add(t: jax.Array, total: jax.Array) -> jax.Array:  # row by row: a scatter would go entry by entry
        old = jax.lax.dynamic_slice_in_dim(total, length - 1 - t, length, 1)
        row = jax.lax.dynamic_index_in_dim(g_NTT, t, 1, keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(total, old + row, length - 1 - t, 1)

    return (jax.lax.fori_loop(0, length, add, jnp.zeros((heads, 2 * length - 1), g_NTT.dtype)),)


_diagonals.defvjp(lambda values_NR: (_diagonals(values_NR), None), _sum_diagonals)


def sinusoids(positions: jax.Array, width: int, base: float) -> jax.Array:
    """PE(p, 2i) = sin(p / base^(2i/width)), PE(p, 2i + 1) = cos(the same): (...) -> float32 (..., width)."""
    frequencies = jnp.asarray(base ** (-np.arange(0, width, 2) / width), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions.shape, width)


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes (heads,): 2^(-8i/n) for a power of two n; else those of the power below, then every
    other one of the power above (the paper's own code, attention_with_linear_biases)."""
    power = 2 ** int(np.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power), 2) / power)
    return np.concatenate([slopes, extra])


def t5_buckets(offset: jax.Array, buckets: int, max_distance: int, causal: bool) -> jax.Array:
    """The bucket of key position - query position: one each for near ones, logarithmic up to `max_distance`.

    Source: the T5 code, relative_position_bucket. A bidirectional model has half of them for each side.
    """
    start = jnp.int32(0)
    if not causal:
        buckets //= 2
        start = jnp.where(offset > 0, buckets, 0)
    distance = jnp.maximum(-offset, 0) if causal else jnp.abs(offset)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return start + jnp.where(distance < exact, distance, far)


SCHEMES: dict[str, type[Position]] = {
    "none": Position,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "shaw": Shaw,
    "t5": T5,
    "alibi": Alibi,
    "rope": Rope,
}


def make(config: ModelConfig, local: bool = False) -> Position:
    """The scheme that `config.position` names, as "local" layers have it or as the others do.

    Raises:
      UserError: an unknown kind, or a scheme that the model's shape does not admit.
    """
    if local and config.position.local_base:
        position = dataclasses.replace(config.position, base=config.position.local_base, scaling="none")
        config = dataclasses.replace(config, position=position)
    scheme = choice("model.position.kind", config.position.kind, SCHEMES)
    if scheme is Rope and config.position.scaling == "dynamic":
        scheme = DynamicRope
    made = scheme(config)
    made.check()
    return made


def head_dim(config: ModelConfig) -> int:
    """`model.head_dim`, or its default.

    Raises:
      UserError: the heads do not divide the width, or the key/value heads the heads.
    """
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"model.num_kv_heads={config.num_kv_heads} does not divide model.num_heads={config.num_heads}")
    if config.head_dim:
        return config.head_dim
    if config.width % config.num_heads:
        raise UserError(f"model.num_heads={config.num_heads} does not divide model.width={config.width}")
    return config.width // config.num_heads
