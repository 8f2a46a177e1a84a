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

    def decay_mask(self) -> Any:
        """The same structure with a bool per leaf: True where weight decay applies. All leaves, unless overridden."""
        return jax.tree.map(lambda leaf: True, self)

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


def decay_mask(w: Weight) -> Any:
    """`w`'s structure with True for every leaf that weight decay applies to; True for an array."""
    return w.decay_mask() if isinstance(w, Node) else True


def is_dense(w: Weight) -> bool:
    """Whether `w` is a plain array, with full precision and no adapter."""
    return not isinstance(w, Node)


def kind(w: Weight) -> str:
    """The name of `w`'s kind for messages: "array", or the class of a node, such as "QTensor"."""
    return type(w).__name__ if isinstance(w, Node) else "array"


def cast(w: Weight, dtype: Any) -> Weight:
    """An array in another dtype; a node unchanged, whose leaves have the dtypes of their formats."""
    return w if isinstance(w, Node) else w.astype(dtype)


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
