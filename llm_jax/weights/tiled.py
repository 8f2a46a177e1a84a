"""Quantized weights in the layout that the C++ kernels of this machine read, which never leaves the process."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax import trees
from llm_jax.kernels import number_formats, tiles
from llm_jax.weights.quantized import IN, QTensor


@trees.register
@dataclasses.dataclass(frozen=True)
class TiledQTensor(QTensor):
    """A `QTensor` whose arrays lie in tiles (`kernels.tiles`).

    `lay_out` makes it when a checkpoint is loaded on a CPU whose kernels read tiles; `in_rows` is its inverse.

    Attributes: for the product with a weight (I, O), or along OUT with a transposed table (O, I), where the I inputs
    take B bytes and have G groups; the others are those of `QTensor`.
      codes: (O / 16, B / 4, 16, 4).
      scale, offset: (O / 16, G, 16), or in the shape of `QTensor` where all outputs share them. Quantized scales are a
        QTensor with such codes.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        *layers, tiles_of_outputs, quads, outputs, rows = self.codes.shape
        codes = quads * rows, tiles_of_outputs * outputs
        codes = codes if self.axis == IN else codes[::-1]
        return number_formats.logical_shape((*layers, *codes), number_formats.scheme(self.scheme), self.axis)

    def take(self, ids: jax.Array) -> jax.Array:
        if self.axis == IN or self.smooth is not None:  # a group spans several rows
            return self.in_rows().take(ids)
        inside = (ids >= 0) & (ids < self.shape[0])
        rows = tiles.take(self._stored(), jnp.where(inside, ids, 0).reshape(-1))
        values = number_formats.decode(*rows, number_formats.scheme(self.scheme), self.axis)
        return jnp.where(inside[..., None], values.reshape(*ids.shape, -1), jnp.nan)

    def dense(self) -> jax.Array:
        return self.in_rows().dense()

    def partition(self, spec: P) -> "TiledQTensor":
        """Every leaf is replicated: no kernel reads a part of it on another device."""
        return jax.tree.map(lambda leaf: P(), self)

    def in_rows(self) -> QTensor:
        """The weight with the arrays of `QTensor`."""
        if self.codes.ndim > 4:  # `trees.restage` stacked layers that were loaded one by one
            return jax.vmap(TiledQTensor.in_rows)(self)
        codes, scale, offset = tiles.from_tiles(self._stored(), self.axis)
        return QTensor(codes, _like(self.scale, scale), offset, self.smooth, self.input_scale, self.scheme, self.axis)

    def _codes(self) -> tiles.Codes:
        return self.in_rows()._codes()


def lay_out(params: Any) -> Any:
    """Converts the quantized weights of `params` to the layout in which the kernels of this process read them.

    Weights that no kernel reads in tiles, such as stacked layers, are returned unchanged.

    Args:
      params: a weight of any kind, or a tree of them. Both layouts of all of them exist at once.

    Raises:
      UserError: see `kernels.native.library`.
    """
    if not any(_has_tiles(w) for w in jax.tree.leaves(params, is_leaf=_is_qtensor)) or tiles.unusable_reason():
        return params
    return jax.tree.map(lambda w: _tiled(w) if _has_tiles(w) else w, params, is_leaf=_is_qtensor)


def in_rows(params: Any) -> Any:
    """`params` without `TiledQTensor`s; the inverse of `lay_out`."""

    def convert(w: Any) -> Any:
        return w.in_rows() if isinstance(w, TiledQTensor) else w

    return jax.tree.map(convert, params, is_leaf=lambda w: isinstance(w, TiledQTensor))


def _is_qtensor(w: Any) -> bool:
    return isinstance(w, QTensor)


def _has_tiles(w: Any) -> bool:
    if type(w) is not QTensor:
        return False
    s = number_formats.scheme(w.scheme)  # XLA computes products with int8 activations of other kinds
    return s.activations in ("", "blocks") and not tiles.unsupported_reason(w.codes.shape, s, w.axis)


@jax.jit
def _tiled(q: QTensor) -> TiledQTensor:
    codes, scale, offset = tiles.to_tiles(q._stored(), q.axis)
    return TiledQTensor(codes, _like(q.scale, scale), offset, q.smooth, q.input_scale, q.scheme, q.axis)


def _like(scale: Any, stored: Any) -> Any:
    """The scale of a QTensor with other arrays."""
    return dataclasses.replace(scale, codes=stored[0]) if isinstance(scale, QTensor) else stored
