"""`Encoded`: a weight in a custom number format (`kernels.custom_format`)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llm_jax import trees
from llm_jax.kernels import number_formats
from llm_jax.kernels.custom_format import CustomFormat
from llm_jax.weights.nodes import Node, take

_STATIC: dict[str, Any] = {"static": True}


@trees.register
@dataclasses.dataclass(frozen=True)
class Encoded(Node):
    """A weight as the arrays that the user's `encode` returns; `decode` expands it for every use, by XLA.

    It is frozen: its gradient is zero, and the backward pass of a product saves only the arrays.

    Attributes: for a weight (I, O), where leading layer axes precede those of every leaf.
      parts: {name: array with two axes}, for OUT those of the transposed weight.
      scheme: FILE:NAME(OPTIONS)#SHA256.
      axis: IN, or OUT for embedding tables; see `QTensor`.
    """

    parts: dict[str, Any]
    scheme: str = dataclasses.field(metadata=_STATIC)
    axis: int = dataclasses.field(metadata=_STATIC)

    @classmethod
    def encode(cls, w: jax.Array, custom: CustomFormat, axis: int) -> "Encoded":
        """Encodes an array, float (..., I, O), with leading layer axes."""
        if w.ndim > 2:
            return jax.vmap(lambda layer: cls.encode(layer, custom, axis))(w)
        return cls(custom.encode(w, axis), custom.specification, axis)

    @property
    def shape(self) -> tuple[int, ...]:
        leading = next(iter(self.parts.values())).shape[:-2]
        layer = {name: jax.ShapeDtypeStruct(part.shape[-2:], part.dtype) for name, part in self.parts.items()}
        return (*leading, *self._custom_format().shape(layer, self.axis))

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        return checkpoint_name(_dot(x, self, transposed, jnp.dtype(out_dtype), jnp.dtype(accumulate)), "dot")

    def take(self, ids: jax.Array) -> jax.Array:
        return take(self.dense(), ids)

    def dense(self) -> jax.Array:
        return self._custom_format().decode(self.parts, self.axis)

    def partition(self, spec: P) -> "Encoded":
        *layer, rows, columns = spec
        turned = P(*layer, rows, columns) if self.axis == -2 else P(*layer, columns, rows)
        return dataclasses.replace(self, parts=dict.fromkeys(self.parts, turned))

    def _custom_format(self) -> CustomFormat:
        custom = number_formats.scheme(self.scheme).custom
        assert custom is not None
        return custom


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dot(x: jax.Array, w: Encoded, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
    """The product of x with w, which is rounded to the dtype of x."""
    return _product(x, w, int(transposed), accumulate).astype(out_dtype)


def _product(x: jax.Array, w: Encoded, contracted: int, accumulate: Any) -> jax.Array:
    axes = (((x.ndim - 1,), (contracted,)), ((), ()))
    return lax.dot_general(x, w.dense().astype(x.dtype), axes, preferred_element_type=accumulate)


def _dot_forward(x, w, transposed, out_dtype, accumulate):
    # The gradient needs only the dtype of x, which the empty array carries.
    return _dot(x, w, transposed, out_dtype, accumulate), (w, jnp.zeros(0, x.dtype))


def _dot_backward(transposed, out_dtype, accumulate, saved, g):
    w, like = saved
    dx = _product(g.astype(like.dtype), w, 1 - int(transposed), accumulate).astype(like.dtype)
    return dx, jax.tree.map(no_gradient, w)


_dot.defvjp(_dot_forward, _dot_backward)


def no_gradient(leaf: jax.Array) -> Any:
    """The gradient of an array that is not trained: zeros, of the dtype float0 for integers."""
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)
