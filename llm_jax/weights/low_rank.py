"""Weights with a low-rank update: `Adapted` (LoRA), `InputDropout` (its dropout) and `Decomposed` (DoRA)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llm_jax import trees
from llm_jax.weights.nodes import Node, cast, dense, dot, partition, take


@trees.register
@dataclasses.dataclass(frozen=True)
class Adapted(Node):
    """A base weight and a low-rank update: W + a · diag(scale) · b (Hu et al. 2021, arXiv:2106.09685).

    Several adapters form one adapter of their summed rank: their `a` and `b` are concatenated along the
    rank, and `scale` has the scale of each adapter in its columns. In a batch whose rows use different
    adapters, `scale` has a row per batch row, with zeros for the adapters that the row does not use.
    Switching and mixing adapters therefore changes values only, and nothing is recompiled.

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
        # Named again, so that a remat policy saves the sum instead of its two terms.
        return checkpoint_name((base + update).astype(out_dtype), "dot")

    def take(self, ids: jax.Array) -> jax.Array:
        rows = take(self.base, ids)
        scale = self.scale
        if scale.ndim == 2:
            scale = scale.reshape(scale.shape[0], *(1,) * (ids.ndim - 1), scale.shape[1])
        return rows + dot(take(self.a, ids) * scale, self.b).astype(rows.dtype)

    def dense(self) -> jax.Array:
        if self.scale.ndim == 2:
            raise ValueError("the rows of the batch use different adapters; there is no single dense weight")
        base = dense(self.base)
        return (base + dot(dense(self.a) * self.scale, dense(self.b))).astype(base.dtype)

    def cast(self, dtype: Any) -> "Adapted":
        return dataclasses.replace(self, base=cast(self.base, dtype))

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
    """Returns the parameters for a batch in which every row is repeated `count` times, as for beams or samples.

    Only adapters that differ by batch row (`lora.mix`) change: their `scale` (B, R) becomes (B * count, R).

    Args:
      params: a tree of weights of any kind, one entry per layer (`trees.unstack`).
    """

    if count == 1:
        return params

    def repeat(w: Any) -> Any:
        if not isinstance(w, Adapted) or w.scale.ndim < 2:
            return w
        return dataclasses.replace(w, scale=jnp.repeat(w.scale, count, 0))

    return jax.tree.map(repeat, params, is_leaf=lambda w: isinstance(w, Adapted))


@trees.register
@dataclasses.dataclass(frozen=True)
class InputDropout(Node):
    """A weight with dropout on its inputs: 0 with probability `rate`, else divided by 1 - rate (arXiv:1207.0580).

    Attributes:
      weight: (I, O), any kind of weight.
      key: a random key, different in every step and layer.
      rate: dropout probability in [0, 1).
    """

    weight: Any
    key: jax.Array
    rate: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        mask = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        x = jnp.where(mask, x / (1 - self.rate), 0).astype(x.dtype)
        return dot(x, self.weight, transposed, out_dtype=out_dtype, accumulate=accumulate)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows without dropout: the inputs are ids."""
        return take(self.weight, ids)

    def dense(self) -> jax.Array:
        return dense(self.weight)

    def partition(self, spec: P) -> "InputDropout":
        copies: Any = P()
        return InputDropout(partition(self.weight, spec), copies, self.rate)


@trees.register
@dataclasses.dataclass(frozen=True)
class Decomposed(Node):
    """DoRA: an adapted weight with trained column norms (Liu et al. 2024, arXiv:2402.09353, equation 5).

    The column norms of W + s a b are computed without forming a b, and are constants of the gradient
    (section 4.3):  |W + s a b|^2 = |W|^2 + 2 s <W^T a, b^T> + s^2 b^T (a^T a) b, per column.

    Attributes:
      weight: Adapted, (I, O), with a scalar scale.
      magnitude: float (O,), the trained column norms.
      squares: float (O,), |W|^2 of the columns of the base weight.
    """

    weight: Adapted
    magnitude: jax.Array
    squares: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def _ratio(self) -> jax.Array:
        """float32 (O,): magnitude over the column norms of W + s a b."""
        w = self.weight
        a, b = (dense(factor).astype(self.squares.dtype) for factor in (w.a, w.b))
        cross_term = jnp.sum(dot(a.T, w.base, accumulate=a.dtype) * b, 0)
        update_squares = jnp.sum(b * dot(dot(a.T, a), b), 0)
        squares = jax.lax.stop_gradient(self.squares + 2 * w.scale * cross_term + w.scale**2 * update_squares)
        norms = jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny))
        # Exactly 1 if both are equal, unlike magnitude / norms, which XLA compiles to a product with 1 / norms.
        return 1 + (self.magnitude - norms) / norms

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        ratio = self._ratio()
        if transposed:
            x = (x * ratio).astype(x.dtype)
            return dot(x, self.weight, True, out_dtype=out_dtype, accumulate=accumulate)
        y = dot(x, self.weight, out_dtype=out_dtype, accumulate=accumulate) * ratio
        return checkpoint_name(y.astype(out_dtype), "dot")

    def take(self, ids: jax.Array) -> jax.Array:
        rows = take(self.weight, ids)
        return (rows * self._ratio()).astype(rows.dtype)

    def dense(self) -> jax.Array:
        base = dense(self.weight)
        return (base * self._ratio()).astype(base.dtype)

    def cast(self, dtype: Any) -> "Decomposed":
        return dataclasses.replace(self, weight=self.weight.cast(dtype))

    def partition(self, spec: P) -> "Decomposed":
        columns: Any = P(*spec[:-2], spec[-1])
        return Decomposed(self.weight.partition(spec), columns, columns)
