"""Weights with a low-rank update: `Adapted` (LoRA), `Dropped` (its dropout) and `Decomposed` (DoRA)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llm_jax.weights.nodes import Node, dense, dot, partition, take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(Node):
    """A base weight and a low-rank update: W + a · diag(scale) · b (Hu et al. 2021, arXiv:2106.09685).

    Several adapters are one of their summed rank: concatenate their `a` and `b` along the rank and
    repeat each one's strength over its columns of `scale`. A batch whose rows use different
    adapters has a `scale` row per batch row, zero for the adapters that row does not use. So
    switching and mixing change numbers only, and nothing recompiles.

    Attributes:
      base: (I, O), any kind of weight.
      a: (I, R), any kind of weight.
      b: (R, O), any kind of weight.
      scale: (), (R,) or (B, R), float; alpha / rank for one plain adapter.
    """

    base: Any
    a: Any
    b: Any
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        first, second = (self.b, self.a) if transposed else (self.a, self.b)
        scale = self.scale.astype(x.dtype)
        if scale.ndim == 2:  # a row of scales per batch row of x (B, ..., I)
            scale = scale.reshape(scale.shape[0], *(1,) * (x.ndim - 2), scale.shape[1])
        low = dot(x, first, transposed, accumulate=accumulate) * scale
        base, update = (
            dot(rows, w, transposed, out_dtype=accumulate, accumulate=accumulate)
            for rows, w in ((x, self.base), (low, second))
        )
        # Named again: a remat policy then keeps the sum, and neither of its parts.
        return checkpoint_name((base + update).astype(out_dtype), "dot")

    def take(self, ids: jax.Array) -> jax.Array:
        rows = take(self.base, ids)
        scale = self.scale
        if scale.ndim == 2:
            scale = scale.reshape(scale.shape[0], *(1,) * (ids.ndim - 1), scale.shape[1])
        return rows + dot(take(self.a, ids) * scale, self.b).astype(rows.dtype)

    def dense(self) -> jax.Array:
        if self.scale.ndim == 2:
            raise ValueError("a weight whose rows use different adapters has no one dense array")
        base = dense(self.base)
        return (base + dot(dense(self.a) * self.scale, dense(self.b))).astype(base.dtype)

    def partition(self, spec: P) -> "Adapted":
        *layer, rows, columns = spec
        copies: Any = P()
        return Adapted(
            partition(self.base, spec),
            partition(self.a, P(*layer, rows, None)),
            partition(self.b, P(*layer, None, columns)),
            copies,
        )


def repeat_rows(params: Any, count: int) -> Any:
    """Parameters for a batch whose every row is repeated `count` times, as beams or samples of one prompt are.

    Only adapters that differ by batch row (`lora.mix`) change: their `scale` (B, R) becomes (B * count, R).

    Args:
      params: a tree of weights of any kind, one entry per layer (`trees.unstack`).
    """

    def repeat(w: Any) -> Any:
        if not isinstance(w, Adapted) or w.scale.ndim < 2:
            return w
        return dataclasses.replace(w, scale=jnp.repeat(w.scale, count, 0))

    return jax.tree.map(repeat, params, is_leaf=lambda w: isinstance(w, Adapted))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropped(Node):
    """A weight whose inputs are dropped in training: zero with probability `rate`, else divided by 1 - rate.

    Attributes:
      weight: (I, O), any kind of weight.
      key: a random key; another one in every step, and in every layer.
      rate: from 0 to below 1.
    """

    weight: Any
    key: jax.Array
    rate: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        kept = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        x = jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)
        return dot(x, self.weight, transposed, out_dtype=out_dtype, accumulate=accumulate)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows as they are: an id cannot be dropped."""
        return take(self.weight, ids)

    def dense(self) -> jax.Array:
        return dense(self.weight)

    def partition(self, spec: P) -> "Dropped":
        copies: Any = P()
        return Dropped(partition(self.weight, spec), copies, self.rate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decomposed(Node):
    """DoRA: every column of an adapted weight with a length of its own (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    The lengths of W + s a b are computed without forming a b, and are constants of the gradient
    (section 4.3):  |W + s a b|^2 = |W|^2 + 2 s <W^T a, b^T> + s^2 b^T (a^T a) b, per column.

    Attributes:
      weight: Adapted, (I, O), with one scale, (), for all of its rank.
      magnitude: (O,), the lengths of the columns.
      squares: (O,), |W|^2 of the columns of the base.
    """

    weight: Adapted
    magnitude: jax.Array
    squares: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def _stretch(self) -> jax.Array:
        """(O,) float32: the wanted lengths over those of W + s a b."""
        w = self.weight
        a, b = (dense(factor).astype(self.squares.dtype) for factor in (w.a, w.b))
        crossed = jnp.sum(dot(a.T, w.base, accumulate=a.dtype) * b, 0)
        own = jnp.sum(b * dot(dot(a.T, a), b), 0)
        squares = jax.lax.stop_gradient(self.squares + 2 * w.scale * crossed + w.scale**2 * own)
        length = jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny))
        # Exactly 1 where they are equal: XLA makes of magnitude / length a product with 1 / length.
        return 1 + (self.magnitude - length) / length

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        stretch = self._stretch()
        if transposed:
            x = (x * stretch).astype(x.dtype)
            return dot(x, self.weight, True, out_dtype=out_dtype, accumulate=accumulate)
        y = dot(x, self.weight, out_dtype=out_dtype, accumulate=accumulate) * stretch
        return checkpoint_name(y.astype(out_dtype), "dot")

    def take(self, ids: jax.Array) -> jax.Array:
        rows = take(self.weight, ids)
        return (rows * self._stretch()).astype(rows.dtype)

    def dense(self) -> jax.Array:
        base = dense(self.weight)
        return (base * self._stretch()).astype(base.dtype)

    def partition(self, spec: P) -> "Decomposed":
        columns: Any = P(*spec[:-2], spec[-1])
        return Decomposed(self.weight.partition(spec), columns, columns)
