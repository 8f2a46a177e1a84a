"""A weight is a typed value, and a model touches it by three verbs only.

    dot(x, w)      x (..., in) times w (in, out)
    take(w, ids)   rows of w (rows, out), for embeddings
    dense(w)       w expanded to an array

`w` is a `jax.Array` or a `Node`. Nodes are registered dataclasses: what is numeric is a leaf (with
the leading layer axis under scan, like an array's), what is static is compared on restore. A node
may hold other nodes, so kinds compose as values and the model has no code for any of them:

    array                                       full training
    Adapted(array, a, b)                        LoRA
    Adapted(array, Dropped(a), b)               LoRA with dropout
    Decomposed(Adapted(array, a, b), m, n)      DoRA
    QTensor(codes, scale)                       quantized after training (`quantized.py`, which also has the next)
    FakeQuant(array)                            quantization-aware training
    Adapted(QTensor, a, b)                      QLoRA
    Adapted(array, FakeQuant(a), FakeQuant(b))  low-rank factors in 8 bits

To add a kind: subclass `Node`, implement its five methods here, and call kernels that take arrays.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llm_jax.errors import UserError

# Letters of shapes: B batch, I in, O out, R rank.


NODES: dict[str, type["Node"]] = {}


class Node(abc.ABC):
    """A weight that is more than one array. Shapes below are those of one layer's slice.

    A subclass is a frozen dataclass registered with JAX, whose static fields are JSON values marked
    `metadata={"static": True}`.
    """

    def __init_subclass__(cls) -> None:
        NODES[cls.__name__] = cls

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array it stands for: (in, out)."""

    @abc.abstractmethod
    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array: ...

    @abc.abstractmethod
    def take(self, ids: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def dense(self) -> jax.Array: ...

    @abc.abstractmethod
    def partition(self, spec: P) -> "Node":
        """The same structure with a PartitionSpec per leaf, given that of the dense array.

        `spec` has one entry per axis of the stored array, a leading layer axis included.
        """


Weight = jax.Array | Node


def dot(
    x: jax.Array, w: Weight, transposed: bool = False, *, out_dtype: Any = None, accumulate: Any = jnp.float32
) -> jax.Array:
    """x (..., in) @ w (in, out) -> (..., out); with `transposed`, x (..., out) @ w.T -> (..., in).

    The product is computed in x's dtype with sums in `accumulate` (or x's dtype if that is wider)
    and returned in `out_dtype` (x's by default). Gradients follow the same rule, and that of a
    dense weight goes from the sums straight into the weight's own dtype.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    accumulate = jnp.promote_types(accumulate, x.dtype)
    if isinstance(w, Node):
        return w.dot(x, transposed, out_dtype, accumulate)
    # The name is what a remat policy can keep: the product itself is hidden by its custom gradient.
    return checkpoint_name(_dense_dot(x, w, transposed, out_dtype, accumulate), "dot")


def take(w: Weight, ids: jax.Array) -> jax.Array:
    """Rows `ids` (...) of w (rows, out) -> (..., out) in w's dtype; NaN for ids past the end."""
    return w.take(ids) if isinstance(w, Node) else jnp.take(w, ids, axis=0, mode="fill")


def dense(w: Weight) -> jax.Array:
    """The array (in, out) that `w` stands for; (layers, in, out) where its layers are stacked."""
    if not isinstance(w, Node):
        return w
    return jax.vmap(dense)(w) if len(w.shape) > 2 else w.dense()


def partition(w: Weight, spec: P) -> Any:
    """`w`'s structure with a PartitionSpec for every leaf, from that of the dense array."""
    return w.partition(spec) if isinstance(w, Node) else spec


def abstract(record: Mapping[str, Any] | None) -> Any:
    """The weight that a record of `trees.describe` stands for, with `jax.ShapeDtypeStruct` leaves.

    Raises:
      UserError: a kind of node that this version does not know.
    """
    if record is None:
        return None
    if "node" not in record:
        return jax.ShapeDtypeStruct(tuple(record["shape"]), record["dtype"])
    if record["node"] not in NODES:
        raise UserError(f"weights of the kind '{record['node']}' are unknown to this version of llm_jax")
    static = {name: tuple(v) if isinstance(v, list) else v for name, v in record["static"].items()}
    return NODES[record["node"]](**static, **{name: abstract(field) for name, field in record["fields"].items()})


# Why a custom gradient: under autodiff a bf16 product with f32 sums is differentiated as an f32
# product (half the speed), or with bf16 sums (weight gradients lose their low bits).
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dense_dot(x: jax.Array, w: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
    return _product(x, w.astype(x.dtype), (x.ndim - 1,), (int(transposed),), accumulate).astype(out_dtype)


def _dense_dot_forward(x, w, transposed, out_dtype, accumulate):
    return _dense_dot(x, w, transposed, out_dtype, accumulate), (x, w)


def _dense_dot_backward(transposed, out_dtype, accumulate, saved, g):
    x, w = saved
    g = g.astype(x.dtype)
    dx = _product(g, w.astype(x.dtype), (g.ndim - 1,), (1 - int(transposed),), accumulate)
    # The leading axes are contracted as they are: flattening them first halves the speed on CPU.
    leading = tuple(range(x.ndim - 1))
    dw = _product(g, x, leading, leading, accumulate) if transposed else _product(x, g, leading, leading, accumulate)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_dense_dot.defvjp(_dense_dot_forward, _dense_dot_backward)


def _product(a, b, a_axes, b_axes, accumulate):
    return lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=accumulate)


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
