"""Weights as typed values. A model uses a weight through three functions only:

    dot(x, w)      x (..., in) times w (in, out)
    take(w, ids)   rows of w (rows, out), for embeddings
    dense(w)       w expanded to an array

`w` is a `jax.Array` or a `Node`. Nodes are dataclasses registered as pytrees: arrays are leaves (with a
leading layer axis under scan), and static fields are compared when a checkpoint is restored. A node may
contain other nodes, so that kinds compose, and the model has no code for any of them:

    array                                       full training
    Adapted(array, a, b)                        LoRA
    Adapted(array, InputDropout(a), b)          LoRA with dropout
    Decomposed(Adapted(array, a, b), m, n)      DoRA
    QTensor(codes, scale)                       quantized after training (`quantized.py`, which also has the next)
    Encoded(parts)                              quantized by a custom number format (`encoded.py`)
    FakeQuant(array)                            quantization-aware training
    Adapted(QTensor, a, b)                      QLoRA
    Adapted(array, FakeQuant(a), FakeQuant(b))  low-rank factors in 8 bits

To add a kind, subclass `Node`, implement its abstract methods, and call kernels that take arrays.
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
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from llm_jax import extensions, trees
from llm_jax.errors import UserError
from llm_jax.kernels import cpu_dense, native

# Letters of shapes: B batch, I in, O out, R rank.


NODES: dict[str, type["Node"]] = {}


class Node(abc.ABC):
    """A weight represented by several arrays. Shapes below are those of a single layer.

    A subclass is a frozen dataclass registered with JAX, whose static fields are JSON values marked
    `metadata={"static": True}`.
    """

    def __init_subclass__(cls) -> None:
        NODES[cls.__name__] = cls
        if "__repr__" not in vars(cls):  # the default repr of a dataclass prints all numbers
            setattr(cls, "__repr__", Node.__repr__)  # noqa: B010

    def __repr__(self) -> str:
        return summary(self)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """Displays the weight in a notebook with treescope: its fields, shape and size."""
        from treescope import rendering_parts, repr_lib

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        tree = repr_lib.render_object_constructor(type(self), fields, path, subtree_renderer)
        note = rendering_parts.comment_color(
            rendering_parts.text(f"  # {tuple(self.shape)}, {num_bytes(self):,} bytes")
        )
        return rendering_parts.siblings_with_annotations(tree, extra_annotations=[note])

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array that the node represents: (in, out)."""

    @abc.abstractmethod
    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        """x (..., in) @ w -> (..., out), or x (..., out) @ w.T -> (..., in), in `out_dtype`; see `dot`."""

    @abc.abstractmethod
    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of w: int32 ids (...) -> (..., out); see `take`."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The dense array (in, out)."""

    def cast(self, dtype: Any) -> "Node":
        """Converts the dense weight in the node, if it has one, to another dtype; other leaves keep their dtypes."""
        return self

    def decay_mask(self) -> Any:
        """The same structure with a bool per leaf: whether weight decay applies; by default True for all leaves."""
        return jax.tree.map(lambda leaf: True, self)

    @abc.abstractmethod
    def partition(self, spec: P) -> "Node":
        """The same structure with a PartitionSpec for every leaf.

        Args:
          spec: the PartitionSpec of the dense array, with one entry per axis, a leading layer axis included.
        """


Weight = jax.Array | Node


@trees.register
@dataclasses.dataclass(frozen=True)
class Gathered(Node):
    """A sharded array and a gathered copy of it. Matrix products use the copy; the gradient is that of the array.

    Only used within a training step.

    Attributes:
      weight: (I, O), sharded.
      copy: (I, O), the same values in the dtype of the computation, gathered; its gradient is zero.
    """

    weight: jax.Array
    copy: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        return dot(x, self, transposed, out_dtype=out_dtype, accumulate=accumulate)

    def take(self, ids: jax.Array) -> jax.Array:
        return take(self.weight, ids)

    def dense(self) -> jax.Array:
        return self.weight

    def partition(self, spec: P) -> "Gathered":
        return Gathered(spec, spec)  # type: ignore[arg-type]


def dot(
    x: jax.Array,
    w: Weight,
    transposed: bool = False,
    *,
    out_dtype: Any = None,
    accumulate: Any = jnp.float32,
    gathered: P | None = None,
) -> jax.Array:
    """Matrix product of activations with a weight of any kind.

    The operands have the dtype of x. Gradients follow the same rule; the gradient of a dense weight is
    converted from the accumulation dtype to the dtype of the weight without an intermediate rounding.

    Args:
      x: (..., in), or (..., out) with `transposed`.
      w: (in, out).
      transposed: multiply by w.T.
      out_dtype: dtype of the result; default: the dtype of x.
      accumulate: dtype of the sums, or the dtype of x if it is wider.
      gathered: sharding of the weight during the product, on the current mesh; None: the compiler decides.

    Returns:
      (..., out), or (..., in) with `transposed`.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    accumulate = jnp.promote_types(accumulate, x.dtype)
    copy = None
    if isinstance(w, Gathered):
        w, copy = w.weight, w.copy
    elif isinstance(w, Node):
        return gather(w, gathered).dot(x, transposed, out_dtype, accumulate)
    # Remat policies select results by this name; they cannot see the product within the custom gradient.
    return checkpoint_name(_dense_dot(x, w, copy, transposed, out_dtype, accumulate, gathered), "dot")


def gather(w: Weight, spec: P | None) -> Any:
    """Applies the sharding `spec` on the current mesh; sharded axes that are not in `spec` are gathered."""
    if spec is None:
        return w
    return jax.tree.map(
        lambda s, leaf: jax.lax.with_sharding_constraint(leaf, s),
        partition(w, spec),
        w,
        is_leaf=lambda s: isinstance(s, P),
    )


@jax.custom_vjp
def reduce_first(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x and w unchanged; in the backward pass, the gradient of w is complete before the gradient of x is used.

    For the product of x with a large w at the end of a sharded model. Without it, XLA may sum the gradient of w over
    the devices only after the backward pass of all layers, and every device keeps the whole gradient until then.
    """
    return x, w


def _reduce_first_forward(x, w):
    # Without a gradient of w, the order would only keep XLA from removing its computation.
    return (x.value, w.value), (() if w.perturbed else None)


def _reduce_first_backward(saved, gradients):
    if any(isinstance(gradient, SymbolicZero) for gradient in gradients):  # nothing to order
        return tuple(None if isinstance(gradient, SymbolicZero) else gradient for gradient in gradients)
    return gradients if saved is None else lax.optimization_barrier(gradients)


reduce_first.defvjp(_reduce_first_forward, _reduce_first_backward, symbolic_zeros=True)


def take(w: Weight, ids: jax.Array) -> jax.Array:
    """Rows of an embedding table.

    Args:
      w: (rows, out).
      ids: int32 (...).

    Returns:
      (..., out) in the dtype of w (float32 for codes); NaN for ids out of range.
    """
    return w.take(ids) if isinstance(w, Node) else jnp.take(w, ids, axis=0, mode="fill")


def dense(w: Weight) -> jax.Array:
    """The dense array of a weight: (in, out), or (layers, in, out) if layers are stacked.

    Raises:
      ValueError: the rows of a batch use different adapters, so that there is no single dense array.
    """
    if not isinstance(w, Node):
        return w
    return jax.vmap(dense)(w) if len(w.shape) > 2 else w.dense()


def partition(w: Weight, spec: P) -> Any:
    """The structure of `w` with a PartitionSpec for every leaf, derived from the `spec` of the dense array."""
    return w.partition(spec) if isinstance(w, Node) else spec


def decay_mask(w: Weight) -> Any:
    """The structure of `w` with True for every leaf with weight decay; True for an array."""
    return w.decay_mask() if isinstance(w, Node) else True


def is_dense(w: Weight) -> bool:
    """Whether `w` is a plain array, with full precision and no adapter."""
    return not isinstance(w, Node)


def kind(w: Weight) -> str:
    """The kind of a weight for messages: "array", or the class of a node, such as "QTensor"."""
    return type(w).__name__ if isinstance(w, Node) else "array"


def summary(w: Any) -> str:
    """A weight in one line, without its numbers: "float32[64, 32]", "QTensor(codes=int8[64, 32], ...)"."""
    if isinstance(w, Node):
        fields = [(f, getattr(w, f.name)) for f in dataclasses.fields(w)]  # type: ignore[arg-type]
        parts = (
            f"{f.name}={v!r}" if f.metadata.get("static") else f"{f.name}={summary(v)}"
            for f, v in fields
            if v is not None
        )
        return f"{type(w).__name__}({', '.join(parts)})"
    if isinstance(w, Mapping):
        return f"({', '.join(f'{name}={summary(part)}' for name, part in w.items())})"
    return f"{w.dtype}{list(w.shape)}" if hasattr(w, "dtype") and hasattr(w, "shape") else repr(w)


def num_bytes(tree: Any) -> int:
    """Total bytes of all arrays (or `jax.ShapeDtypeStruct`s) of a weight or a tree, summed over devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def cast(w: Weight, dtype: Any) -> Weight:
    """Converts an array to another dtype; for a node, see `Node.cast`."""
    return w.cast(dtype) if isinstance(w, Node) else w.astype(dtype)


def abstract(record: Mapping[str, Any] | None) -> Any:
    """The weight described by a record of `trees.describe`, with `jax.ShapeDtypeStruct` leaves.

    Raises:
      UserError: the record names a kind of node that this version does not have, or a number format of the user's
        own whose file is missing or has changed.
    """
    if record is None:
        return None
    if "parts" in record:
        return {name: abstract(part) for name, part in record["parts"].items()}
    if "node" not in record:
        return jax.ShapeDtypeStruct(tuple(record["shape"]), record["dtype"])
    if record["node"] not in NODES:
        raise UserError(f"weights of the kind '{record['node']}' are unknown to this version of llm_jax")
    for scheme in extensions.specifications(record["static"].get("scheme")):  # the file may have changed since its use
        extensions.load("scheme", extensions.require_hash("scheme", scheme))
    static = {name: tuple(v) if isinstance(v, list) else v for name, v in record["static"].items()}
    return NODES[record["node"]](**static, **{name: abstract(field) for name, field in record["fields"].items()})


# A custom gradient, because automatic differentiation of a bf16 product with f32 sums gives an f32
# product (half the speed), or bf16 sums (weight gradients lose their low bits).
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _dense_dot(
    x: jax.Array, w: jax.Array, copy: jax.Array | None, transposed: bool, out_dtype: Any, accumulate: Any,
    gathered: P | None,
) -> jax.Array:  # fmt: skip
    """The product of x with a dense w; `copy` is w in the dtype of x, already gathered, or None."""

    def by_xla(x, w):
        return _product(x, _operand(x, w, copy, gathered), (x.ndim - 1,), (int(transposed),), accumulate)

    is_whole = copy is None and gathered is None
    if not is_whole or cpu_dense.unsupported_reason(x, w, accumulate) or native.library(silent=True) is None:
        return by_xla(x, w).astype(out_dtype)
    kernel = functools.partial(cpu_dense.product, transposed=transposed)
    return lax.platform_dependent(x, w, cpu=kernel, default=by_xla).astype(out_dtype)


def _operand(x, w, copy, gathered):
    return gather(w.astype(x.dtype), gathered) if copy is None else copy.astype(x.dtype)


def _dense_dot_forward(x, w, copy, transposed, out_dtype, accumulate, gathered):
    return _dense_dot(x, w, copy, transposed, out_dtype, accumulate, gathered), (x, w, copy)


def _dense_dot_backward(transposed, out_dtype, accumulate, gathered, saved, g):
    x, w, copy = saved
    g = g.astype(x.dtype)
    # Cast and gathered as in the forward pass: under rematerialization both products share one gather.
    dx = _product(g, _operand(x, w, copy, gathered), (g.ndim - 1,), (1 - int(transposed),), accumulate)
    # The leading axes are contracted without flattening, which would halve the speed on CPU.
    leading = tuple(range(x.ndim - 1))
    dw = _product(g, x, leading, leading, accumulate) if transposed else _product(x, g, leading, leading, accumulate)
    if gathered is not None:  # otherwise XLA may keep the sum over all devices until the optimizer reads its part
        dw = lax.optimization_barrier(dw)
    return dx.astype(x.dtype), dw.astype(w.dtype), None if copy is None else jnp.zeros_like(copy)


_dense_dot.defvjp(_dense_dot_forward, _dense_dot_backward)


def _product(a, b, a_axes, b_axes, accumulate):
    return lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=accumulate)
