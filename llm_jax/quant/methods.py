"""Quantization methods for one weight: absmax, percentile, mse, smoothquant, awq, gptq.

A method is a function (w, scheme, axis, inputs, act_order) -> QTensor that can be jitted:

  w: the weight, float32 (I, O).
  scheme: the name of the quantization scheme (`number_formats.scheme`).
  axis: the axis along which groups share a scale.
  inputs: calibration statistics of the inputs of the weight (`InputStatistics`), or None for methods without
    calibration.
  act_order: whether gptq processes inputs in the order of decreasing activation; the other methods ignore it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import trees
from llm_jax.kernels import number_formats
from llm_jax.kernels.number_formats import Scheme
from llm_jax.weights import IN, QTensor, quantized

# Letters of shapes: I in, O out, G groups.

_SHRINKS = np.linspace(1.0, 0.5, 26, dtype=np.float32)  # factors on the absmax scales in the grid search of `clip`
_ALPHAS = np.linspace(0.0, 0.95, 20, dtype=np.float32)  # smoothing exponents in the grid search of `awq`
_PERCENTILE = 0.999
_DAMPING = 0.01  # of the Hessian in `gptq`, relative to the mean of its diagonal


@trees.register
@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Statistics of the inputs x (tokens, I) of a weight, float32, which `add` accumulates over batches.

    Attributes:
      gram: (I, I), the sum of x^T x.
      largest: (I,), the largest |x|.
      total: (I,), the sum of |x|.
      clipped: (), the sum over batches of the 99.9th percentile of |x|.
      tokens: (), the number of tokens.
      batches: (), the number of batches.
    """

    gram: jax.Array
    largest: jax.Array
    total: jax.Array
    clipped: jax.Array
    tokens: jax.Array
    batches: jax.Array


def observe(x: jax.Array, mask: jax.Array) -> InputStatistics:
    """Statistics of one batch: x, float (B, T, I), at the tokens where `mask`, bool (B, T), is True."""
    x = x.astype(jnp.float32) * mask[..., None]
    size = jnp.abs(x)
    return InputStatistics(
        jnp.einsum("bti,btj->ij", x, x),
        jnp.max(size, (0, 1)),
        jnp.sum(size, (0, 1)),
        jnp.nan_to_num(jnp.nanquantile(jnp.where(mask[..., None], size, jnp.nan), _PERCENTILE)),
        jnp.sum(mask).astype(jnp.float32),
        jnp.float32(1),
    )


def add(a: InputStatistics, b: InputStatistics) -> InputStatistics:
    """The statistics of two sets of batches together."""
    return dataclasses.replace(jax.tree.map(jnp.add, a, b), largest=jnp.maximum(a.largest, b.largest))


def objective(w: jax.Array, q: QTensor, inputs: InputStatistics) -> jax.Array:
    """|| x (W - Q) ||^2 over the calibration text per output, for w float32 (I, O): float32 (O,)."""
    change = w - q.dense()
    return jnp.sum((inputs.gram @ change) * change, 0)


def absmax(w: jax.Array, scheme: str, axis: int, inputs: InputStatistics | None, act_order: bool) -> Any:
    """Absmax scales: the largest magnitude of every group is represented by the largest code.

    A custom number format encodes the weight instead, and has no other method.
    """
    if number_formats.scheme(scheme).custom:
        return quantized.quantize(w, scheme, axis)
    return quantized.to_qtensor(w, scheme, axis, input_scale=_input_scale(scheme, inputs))


def percentile(w: jax.Array, scheme: str, axis: int, inputs: InputStatistics | None, act_order: bool) -> QTensor:
    """Scales from the 99.9th percentile of the magnitudes of weights and activations; larger values are clipped."""
    s = number_formats.scheme(scheme)
    f = number_formats.FORMATS[s.format]

    def quantile(share: float) -> Callable[..., jax.Array]:
        return lambda a, axis, keepdims: jnp.quantile(a, share, axis, keepdims=keepdims)

    if s.offset == "minimum":
        low = number_formats.reduce_groups(quantile(1 - _PERCENTILE), w, s, axis)
        high = number_formats.reduce_groups(quantile(_PERCENTILE), w, s, axis)
        scale, offset = (high - low) / (f.high - f.low), low
    else:
        scale, offset = number_formats.reduce_groups(quantile(_PERCENTILE), jnp.abs(w), s, axis) / f.high, None
    clipped = None
    if s.activations == "static" and inputs is not None:
        clipped = inputs.clipped / inputs.batches / 127
    return quantized.to_qtensor(w, scheme, axis, scale=scale, offset=offset, input_scale=clipped)


def mse(w: jax.Array, scheme: str, axis: int, inputs: InputStatistics | None, act_order: bool) -> QTensor:
    """Scales that minimize the squared error of every group, by a grid search over clipping factors; see `clip`."""
    scale, offset = clip(w, number_formats.scheme(scheme), axis)
    return quantized.to_qtensor(w, scheme, axis, scale=scale, offset=offset, input_scale=_input_scale(scheme, inputs))


def clip(
    w: jax.Array, s: Scheme, axis: int, importance: jax.Array | float = 1.0, signed: bool = True
) -> tuple[jax.Array, jax.Array | None]:
    """The scales that minimize the weighted squared error of every group, among absmax scales times 1.0 to 0.5.

    Args:
      w: float32 (I, O).
      s: the quantization scheme.
      axis: the axis along which groups share a scale.
      importance: weights of the squared errors, float, broadcast to (I, O).
      signed: also try negative scales, because symmetric integer formats have one more negative than positive value.

    Returns:
      (scale, offset) as `number_formats.scales` returns them.
    """
    f = number_formats.FORMATS[s.format]
    scale, offset = number_formats.scales(w, s, axis)
    starts = [scale]
    if signed and f.integers and not s.offset:
        high, low = number_formats.reduce_groups(jnp.max, w, s, axis), number_formats.reduce_groups(jnp.min, w, s, axis)
        starts.append(jnp.where(high > -low, high, low) / f.low)

    def error(scale: jax.Array, offset: jax.Array | None) -> jax.Array:
        stored = number_formats.store_scales(scale, s)
        offset = offset if offset is None or s.offset == "mean" else number_formats.store_scales(offset, s)
        decoded = number_formats.decode(number_formats.encode(w, stored, offset, s, axis), stored, offset, s, axis)
        return number_formats.reduce_groups(jnp.sum, importance * jnp.square(decoded - w), s, axis)

    def better(best, candidate):
        smaller = candidate[0] < best[0]
        return jax.tree.map(lambda new, old: jnp.where(smaller, new, old), candidate, best), None

    best = (error(scale, offset), scale, offset)
    for start in starts:

        def attempt(best, shrink, start=start):
            scale, offset = number_formats.scales(w, s, axis, shrink)
            scale = scale if start is starts[0] else start * shrink
            return better(best, (error(scale, offset), scale, offset))

        best, _ = jax.lax.scan(attempt, best, jnp.asarray(_SHRINKS))
    return best[1], best[2]


def smoothquant(w: jax.Array, scheme: str, axis: int, inputs: InputStatistics | None, act_order: bool) -> QTensor:
    """SmoothQuant: scales inputs and weight, x W = (x / t) (t W), so that outliers of x become smaller; alpha = 0.5.

    Source: Xiao et al. 2022, arXiv:2211.10438, equations 3 and 4.
    """
    assert inputs is not None
    t = jnp.sqrt(jnp.maximum(inputs.largest, 1e-5)) / jnp.sqrt(jnp.maximum(jnp.max(jnp.abs(w), 1), 1e-5))
    smooth = _smooth(t)
    return quantized.to_qtensor(w, scheme, axis, smooth=smooth, input_scale=_input_scale(scheme, inputs, smooth))


def awq(w: jax.Array, scheme: str, axis: int, inputs: InputStatistics | None, act_order: bool) -> QTensor:
    """AWQ: scales the rows of the weight by t = mean|x|^alpha of their inputs, then searches over clipping factors.

    A grid search selects the alpha that minimizes the squared error of the outputs on the calibration text. Clipping
    is kept if it reduces this error.
    Source: Lin et al. 2023, arXiv:2306.00978, equations 4 and 5.
    """
    assert inputs is not None
    mean = jnp.maximum(inputs.total / jnp.maximum(inputs.tokens, 1), 1e-5)

    def smoothed(alpha: jax.Array, clipped: bool) -> QTensor:
        smooth = _smooth(mean**alpha)
        scale = offset = None
        if clipped:
            s, squared = number_formats.scheme(scheme), jnp.square(smooth.astype(jnp.float32))
            importance = (jnp.diag(inputs.gram) * squared)[:, None] + 1e-12
            scale, offset = clip(w / smooth.astype(jnp.float32)[:, None], s, axis, importance)
        input_scale = _input_scale(scheme, inputs, smooth)
        return quantized.to_qtensor(w, scheme, axis, scale=scale, offset=offset, smooth=smooth, input_scale=input_scale)

    errors = jax.lax.map(lambda a: jnp.sum(objective(w, smoothed(a, False), inputs)), jnp.asarray(_ALPHAS))
    alpha = jnp.asarray(_ALPHAS)[jnp.argmin(errors)]
    plain, clipped = smoothed(alpha, False), smoothed(alpha, True)
    helps = jnp.sum(objective(w, clipped, inputs)) < jnp.sum(objective(w, plain, inputs))
    return jax.tree.map(lambda a, b: jnp.where(helps, a, b), clipped, plain)


def gptq(w: jax.Array, scheme: str, axis: int, inputs: InputStatistics | None, act_order: bool) -> QTensor:
    """GPTQ: rounds the rows of the weight one after the other; the remaining rows compensate for the error.

    Scales are computed by "mse" before the first row is rounded, so that rows can be processed in any order: with
    `act_order` in the order of decreasing diagonal entries of the Hessian. Outputs (columns) for which rounding to the
    nearest code has a smaller error keep the nearest codes.
    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1.
    """
    assert inputs is not None and axis == IN
    plain = mse(w, scheme, axis, inputs, act_order)
    s = number_formats.scheme(scheme)
    diagonal = jnp.diag(inputs.gram)
    unseen = diagonal <= 0
    hessian = inputs.gram + jnp.diag(jnp.where(unseen, 1.0, 0.0) + _DAMPING * jnp.mean(diagonal))
    order = jnp.argsort(-diagonal) if act_order else jnp.arange(w.shape[0])
    inverse = jnp.linalg.inv(hessian[order][:, order])
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T  # inverse = upper^T upper

    def per_input(stored: jax.Array) -> jax.Array:
        values = number_formats.scale_values(stored)
        return jnp.repeat(jnp.broadcast_to(values, (values.shape[0], w.shape[1])), w.shape[0] // values.shape[0], 0)

    codes, stored, stored_offset = plain._codes()
    scale = per_input(stored)[order]
    offset = jnp.zeros_like(scale) if stored_offset is None else per_input(stored_offset)[order]

    def round_input(i: jax.Array, left: jax.Array) -> jax.Array:
        unit = jnp.where(jnp.abs(scale[i]) < np.finfo(np.float32).tiny, 1.0, scale[i])
        rounded = number_formats.round_to_format((left[i] - offset[i]) / unit, s.format) * scale[i] + offset[i]
        # upper[i] is 0 for rows before i, which stay as they are; row i becomes `rounded`.
        return left - upper[i][:, None] * ((left[i] - rounded) / upper[i, i])

    rounded = jax.lax.fori_loop(0, w.shape[0], round_input, w[order])[jnp.argsort(order)]
    compensated = number_formats.encode(rounded, stored, stored_offset, s, axis)
    other = dataclasses.replace(plain, codes=compensated)
    better = objective(w, other, inputs) < objective(w, plain, inputs)  # false where the factors are not finite
    return dataclasses.replace(plain, codes=jnp.where(better, compensated, codes))


# Name -> (method, whether it needs calibration statistics).
METHODS: dict[str, tuple[Callable[..., Any], bool]] = {
    "absmax": (absmax, False),
    "percentile": (percentile, False),
    "mse": (mse, False),
    "smoothquant": (smoothquant, True),
    "awq": (awq, True),
    "gptq": (gptq, True),
}


def _smooth(t: jax.Array) -> jax.Array:
    """The factors on the inputs, float16 (I,): 1 / t, scaled so that the smallest and largest multiply to 1."""
    t = t / jnp.sqrt(jnp.max(t) * jnp.min(t))
    return (1 / jnp.clip(t, 2.0**-10, 2.0**10)).astype(jnp.float16)


def _input_scale(scheme: str, inputs: InputStatistics | None, smooth: jax.Array | None = None) -> jax.Array | None:
    """The static scale of int8 activations, float32 (), from the largest input; None for other schemes."""
    if number_formats.scheme(scheme).activations != "static" or inputs is None:
        return None
    largest = inputs.largest if smooth is None else inputs.largest * smooth.astype(jnp.float32)
    return jnp.maximum(jnp.max(largest), 1e-12) / 127
