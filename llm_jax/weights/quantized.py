"""Quantized weights: `QTensor` (codes only) and `FakeQuant` (a dense weight that is rounded in every use).

Both have a scheme (`kernels.number_formats`) and the axis along which groups of numbers share a scale: IN, the
input axis of a product, or OUT for embedding tables, which are read by rows and multiplied transposed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.kernels import matmul, number_formats
from llm_jax.weights.encoded import Encoded, no_gradient
from llm_jax.weights.nodes import Node, Weight, cast, decay_mask, dense, dot, num_bytes, partition, take

# Letters of shapes: I in, O out, G groups.

IN, OUT = -2, -1
ACTIVATIONS = ("float", "int8")  # dtypes of the activations that quantized weights are multiplied with
_STATIC: dict[str, Any] = {"static": True}


@trees.register
@dataclasses.dataclass(frozen=True)
class QTensor(Node):
    """A weight stored as codes of a number format. It is frozen: its gradient is zero, and the backward pass of a
    product saves only the codes.

    Attributes: for a weight (I, O) with the scheme s, where leading layer axes precede those of every leaf.
      codes: (I, O) in the dtype of the format, or uint8 with the axis of the groups divided by 8 / bits.
      scale: (G, O) along IN, (I, G) along OUT; G = 1 for a channel, (1, 1) for a tensor; in the dtype of s.scale, or
        a QTensor if the scales are quantized.
      offset: None, or an array with the shape and dtype of the scale, or float32 (1, 1) for a mean.
      smooth: None, or float16 (I,): the weight is diag(smooth) times the decoded codes.
      input_scale: None, or float32 (): the scale of int8 activations, set if and only if s.activations is "static".
      scheme: a name that `number_formats.scheme` accepts.
      axis: IN or OUT.
    """

    codes: jax.Array
    scale: Any
    offset: jax.Array | None
    smooth: jax.Array | None
    input_scale: jax.Array | None
    scheme: str = dataclasses.field(metadata=_STATIC)
    axis: int = dataclasses.field(metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return number_formats.logical_shape(self.codes.shape, number_formats.scheme(self.scheme), self.axis)

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        if self.smooth is not None and not transposed:
            x = x * self.smooth.astype(x.dtype)
        y = _quantized_dots(x, (self,), transposed, jnp.dtype(out_dtype), jnp.dtype(accumulate))[0]
        if self.smooth is not None and transposed:
            y = y * self.smooth.astype(y.dtype)
        return checkpoint_name(y, "dot")

    def take(self, ids: jax.Array) -> jax.Array:
        if self.axis == IN or self.smooth is not None:  # a group spans several rows
            return take(self.dense(), ids)

        def rows(a: jax.Array | None) -> jax.Array | None:
            if a is None or a.shape[0] == 1:
                return a
            return jnp.take(a, ids.reshape(-1), axis=0, mode="clip")

        parts = (rows(self.codes), rows(dense(self.scale)), rows(self.offset))
        values = number_formats.decode(*parts, number_formats.scheme(self.scheme), self.axis)  # type: ignore[arg-type]
        values = values.reshape(*ids.shape, -1)
        return jnp.where(((ids >= 0) & (ids < self.shape[0]))[..., None], values, jnp.nan)

    def dense(self) -> jax.Array:
        w = number_formats.decode(*self._codes(), number_formats.scheme(self.scheme), self.axis)
        return w if self.smooth is None else w * self.smooth.astype(w.dtype)[..., None]

    def partition(self, spec: P) -> "QTensor":
        *layer, rows, _ = spec
        mean = self.offset is not None and number_formats.scheme(self.scheme).offset == "mean"
        parts: dict[str, Any] = {
            "codes": spec,
            "scale": partition(self.scale, spec),
            "offset": None if self.offset is None else P(*layer, None, None) if mean else spec,
            "smooth": None if self.smooth is None else P(*layer, rows),
            "input_scale": None if self.input_scale is None else P(*layer),
        }
        return dataclasses.replace(self, **parts)

    def _codes(self) -> matmul.Codes:
        return self.codes, dense(self.scale), self.offset

    def _stored(self) -> matmul.Codes:
        """Like `_codes`, but quantized scales are not decoded."""
        return self.codes, self.scale._stored() if isinstance(self.scale, QTensor) else self.scale, self.offset


def to_qtensor(
    w: jax.Array,
    scheme: str,
    axis: int,
    *,
    scale: jax.Array | None = None,
    offset: jax.Array | None = None,
    smooth: jax.Array | None = None,
    input_scale: jax.Array | None = None,
) -> QTensor:
    """Quantizes an array.

    Args:
      w: float (..., I, O).
      scheme: a name that `number_formats.scheme` accepts.
      axis: IN or OUT, the axis of the groups.
      scale, offset: float32, in the shapes of `number_formats.scales`; by default the absmax scales.
      smooth: float16 (..., I); w is divided by it before it is encoded, see `QTensor`.
      input_scale: float32 (...), for a scheme with static activations.

    Raises:
      UserError: the scheme does not exist, or is a custom format; see `quantize` for it.
    """
    s = number_formats.scheme(scheme)
    if s.custom:
        raise s.custom.extension.error("it gives no QTensor; weights.quantize encodes arrays by any scheme")
    if smooth is not None:
        w = w / smooth.astype(w.dtype)[..., None]
    if scale is None:
        scale, offset = number_formats.scales(w, s, axis)
    stored: Any = number_formats.store_scales(scale, s)
    if offset is not None:
        offset = offset if s.offset == "mean" else number_formats.store_scales(offset, s)
    codes = number_formats.encode(w, stored, offset, s, axis)
    if s.scale in number_formats.SCHEMES:
        other = IN + OUT - axis
        stored = to_qtensor(stored, number_formats.nested(s, stored.shape[other]), other)
    return QTensor(codes, stored, offset, smooth, input_scale, scheme, axis)


def quantize(w: jax.Array, scheme: str, axis: int, **options: Any) -> QTensor | Encoded:
    """Quantizes an array by any scheme.

    Args:
      w: float (..., I, O).
      scheme: a name that `number_formats.scheme` accepts.
      axis: IN or OUT, the axis of the groups.
      options: see `to_qtensor`; custom formats have none.

    Raises:
      UserError: see `number_formats.scheme`.
    """
    custom = number_formats.scheme(scheme).custom
    return Encoded.encode(w, custom, axis) if custom else to_qtensor(w, scheme, axis, **options)


def with_activations(params: Any, activations: str) -> Any:
    """Returns parameters whose products with quantized weights use activations of a dtype.

    Args:
      params: a tree of weights of any kind.
      activations: "float", which changes nothing, or "int8": activations are rounded to 8 bits in blocks of at most 32
        (`kernels.matmul.round_blocks`) for weights of integers, NF4 and MXFP4 that have no int8 activations yet.

    Returns:
      The same tree, with changed schemes of its `QTensor`s.

    Raises:
      UserError: the dtype is unknown, or no weight supports int8 activations.
    """
    if activations not in ACTIVATIONS:
        raise UserError(f"activations={activations!r}; expected one of {', '.join(ACTIVATIONS)}")
    if activations == "float":
        return params

    def rounded(w: Any) -> Any:
        if not is_quantized(w) or not number_formats.accepts_int8_activations(number_formats.scheme(w.scheme)):
            return w
        return dataclasses.replace(w, scheme=w.scheme + number_formats.ACTIVATIONS_INT8)

    params = jax.tree.map(rounded, params, is_leaf=is_quantized)
    schemes = [
        number_formats.scheme(w.scheme) for w in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(w)
    ]
    if not any(s.activations for s in schemes):
        raise UserError(
            "--activations=int8 expects weights that are quantized to integers, NF4 or MXFP4; quantize the checkpoint, "
            "or give --as_stored for a .gguf file"
        )
    return params


def is_quantized(weight: Weight) -> bool:
    """Whether `weight` is stored in a number format."""
    return isinstance(weight, QTensor | Encoded)


def bits_per_weight(weight: Any) -> float:
    """Bits per entry of the dense array that a weight represents, including scales."""
    return 8 * num_bytes(weight) / int(np.prod(weight.shape))


def dots(x: jax.Array, ws: list[Weight], *, accumulate: Any, gathered: list[P | None]) -> list[jax.Array]:
    """The products of x with several weights; each product equals `dot`.

    Quantized weights with the same scheme are passed to the kernel in one call, which prepares x once and divides all
    weights among its threads.

    Args:
      x: (..., in).
      ws: weights (in, out) of any kind.
      accumulate, gathered: see `dot`; `gathered` has one entry per weight.
    """
    first = ws[0]
    if gathered == [None] * len(ws) and all(_share_activations(first, w) for w in ws):
        ys = _quantized_dots(x, tuple(ws), False, x.dtype, jnp.promote_types(accumulate, x.dtype))
        return [checkpoint_name(y, "dot") for y in ys]
    return [dot(x, w, accumulate=accumulate, gathered=spec) for w, spec in zip(ws, gathered, strict=True)]


def _share_activations(q: Weight, w: Weight) -> bool:
    """Whether one kernel call can compute the products of x with `q` and `w`: they need the same preparation of x."""
    return (
        isinstance(q, QTensor)
        and type(w) is type(q)
        and number_formats.scheme(q.scheme).activations in ("", "blocks")
        and (w.scheme, w.axis, w.smooth, q.smooth) == (q.scheme, IN, None, None)
        and (w.offset is None) == (q.offset is None)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _quantized_dots(
    x: jax.Array, qs: tuple[QTensor, ...], transposed: bool, out_dtype: Any, accumulate: Any
) -> tuple[jax.Array, ...]:
    """The products of x with weights of one scheme."""
    s, contracted, axis = number_formats.scheme(qs[0].scheme), int(transposed), qs[0].axis
    groups_are_contracted = axis == contracted - 2
    if s.activations == "blocks" and groups_are_contracted:
        ys = matmul.blockwise_products(x, [q._stored() for q in qs], s, axis, contracted)
    elif s.activations and groups_are_contracted:
        ys = tuple(_integer_dot(x, q, out_dtype) for q in qs)
    else:
        ys = matmul.expanded_products(x, [q._stored() for q in qs], s, axis, contracted, accumulate, out_dtype)
    return tuple(y.astype(out_dtype) for y in ys)


def _integer_dot(x: jax.Array, q: QTensor, out_dtype: Any) -> jax.Array:
    codes, scale, _ = q._stored()
    if q.input_scale is None:
        x8, x_scale = matmul.quantize_rows(x)
    else:
        x8, x_scale = matmul.round_to_int8(x, q.input_scale), q.input_scale
    return matmul.integer_product(x8, x_scale, codes, scale, q.axis, out_dtype)


def _quantized_dots_forward(x, qs, transposed, out_dtype, accumulate):
    # The gradient needs only the dtype of x, which the empty array carries.
    return _quantized_dots(x, qs, transposed, out_dtype, accumulate), (qs, jnp.zeros(0, x.dtype))


def _quantized_dots_backward(transposed, out_dtype, accumulate, saved, gs):
    qs, like = saved
    s, contracted = number_formats.scheme(qs[0].scheme), 1 - int(transposed)
    # The straight-through estimate ignores the rounding of the activations.
    dxs: list[jax.Array] = []
    for g, q in zip(reversed(gs), reversed(qs), strict=True):  # the order of separate products
        g = g.astype(like.dtype)
        dxs += matmul.expanded_products(g, [q._stored()], s, q.axis, contracted, accumulate, like.dtype)
    return functools.reduce(jnp.add, dxs), jax.tree.map(no_gradient, qs)


_quantized_dots.defvjp(_quantized_dots_forward, _quantized_dots_backward)


@trees.register
@dataclasses.dataclass(frozen=True)
class FakeQuant(Node):
    """A dense weight in quantization-aware training; every use rounds it like the final QTensor.

    Gradients use the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432). With `step` the scales are
    trained too (LSQ: Esser et al. 2020, arXiv:1902.08153, equations 1 to 3).

    Attributes:
      weight: float (I, O).
      step: None (absmax scales), or trained float32 scales in the shape of `number_formats.scales`.
      input_scale: None, or float32 (): the scale of int8 activations of a "static" scheme.
      active: None (always active), or bool (): False uses the weight and the activations without rounding.
      scheme, axis: as in `QTensor`.
    """

    weight: Any
    step: jax.Array | None
    input_scale: jax.Array | None
    active: jax.Array | None
    scheme: str = dataclasses.field(metadata=_STATIC)
    axis: int = dataclasses.field(metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def quantized(self) -> QTensor | Encoded:
        """The trained weight, quantized."""
        return quantize(dense(self.weight), self.scheme, self.axis, scale=self.step, input_scale=self.input_scale)

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        s = number_formats.scheme(self.scheme)
        if s.activations and self.axis == int(transposed) - 2:
            x = self._where_active(_straight_through(x, self._rounded_activations(x, s)), x)
        return dot(x, self._rounded(), transposed, out_dtype=out_dtype, accumulate=accumulate)

    def _rounded_activations(self, x: jax.Array, s: number_formats.Scheme) -> jax.Array:
        if s.activations == "blocks":
            return matmul.round_blocks(x, s.group if s.group > 0 else x.shape[-1])
        return _rounded_rows(x, self.input_scale)

    def take(self, ids: jax.Array) -> jax.Array:
        return take(self._rounded(), ids)

    def dense(self) -> jax.Array:
        return self._rounded()

    def cast(self, dtype: Any) -> "FakeQuant":
        return dataclasses.replace(self, weight=cast(self.weight, dtype))

    def decay_mask(self) -> "FakeQuant":
        """The weight decays; learned scales do not."""
        step, scale, active = (jax.tree.map(lambda leaf: False, x) for x in (self.step, self.input_scale, self.active))
        masks: dict[str, Any] = {"step": step, "input_scale": scale, "active": active}
        return dataclasses.replace(self, weight=decay_mask(self.weight), **masks)

    def partition(self, spec: P) -> "FakeQuant":
        parts: dict[str, Any] = {
            "weight": partition(self.weight, spec),
            "step": None if self.step is None else spec,
            "input_scale": None if self.input_scale is None else P(*spec[:-2]),
            "active": None if self.active is None else P(*spec[:-2]),
        }
        return dataclasses.replace(self, **parts)

    def _rounded(self) -> jax.Array:
        w = dense(self.weight)
        if self.step is None:
            rounded = _straight_through(w, self.quantized().dense())
        else:
            rounded = _learned(w, self.step, number_formats.scheme(self.scheme), self.axis)
        return self._where_active(rounded.astype(w.dtype), w)

    def _where_active(self, rounded: jax.Array, plain: jax.Array) -> jax.Array:
        return rounded if self.active is None else jnp.where(self.active, rounded, plain)


def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(rounded.astype(x.dtype)) + (x - jax.lax.stop_gradient(x))  # adds exactly 0


def _rounded_rows(x: jax.Array, input_scale: jax.Array | None) -> jax.Array:
    if input_scale is None:
        codes, scale = matmul.quantize_rows(x)
        return codes.astype(jnp.float32) * scale
    return matmul.round_to_int8(x, input_scale).astype(jnp.float32) * input_scale


def _learned(w: jax.Array, step: jax.Array, s: number_formats.Scheme, axis: int) -> jax.Array:
    """w rounded to multiples of its steps, with the gradients of LSQ."""
    f = number_formats.FORMATS[s.format]
    factor = (step.size / (w.size * f.high)) ** 0.5  # 1 / sqrt(numbers of a group * high), equation 4
    step = step * factor + jax.lax.stop_gradient(step * (1 - factor))
    step = _straight_through(step, number_formats.scale_values(number_formats.store_scales(step, s)))
    inside = jnp.clip(number_formats.divide_by_scales(w, step, None, s, axis), f.low, f.high)
    rounded = _straight_through(inside, jnp.round(inside))
    return number_formats.join_groups(rounded * jnp.expand_dims(step, axis), axis)
