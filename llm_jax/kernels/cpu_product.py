"""Products with quantized weights by the kernels in C++.

`product` multiplies a few rows of float32 activations (`cpu/quantized_product.cc`), `integer_product` any number of
rows in int8 (`cpu/integer_product.cc`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import native, number_formats
from llm_jax.kernels.number_formats import Scheme

# Letters of shapes: M rows of activations, C the contracted axis of the weight, F its free one.

# The most rows of activations by the bits of a code. With more, XLA's matmul of the expanded weight is faster.
MOST_ROWS = {8: 4, 4: 16, 2: 16}
_FORMATS = ("int8", "uint8", "int4", "uint4", "int2", "uint2", "nf4", "e2m1")
_MOST_INPUTS = 2**20  # integer sums of as many products fit 32 bits


def unsupported_reason(
    x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, contracted: int, accumulate: Any
) -> str:
    """The reason why the kernels do not compute a product, or ""; see `matmul.expanded_product` for the arguments."""
    rows = x.size // x.shape[-1] if x.shape[-1] else 0
    if s.format not in _FORMATS:
        return f"the format {s.format} has no kernel"
    if axis + 2 != contracted:
        return "the groups do not lie along the contracted axis"
    most_rows = MOST_ROWS[number_formats.FORMATS[s.format].bits]
    if not 1 <= rows <= most_rows:
        return f"{rows} rows of activations; the kernels of {s.format} take 1 to {most_rows}"
    if x.dtype != jnp.float32 or jnp.dtype(accumulate) != jnp.float32:  # XLA rounds the weight to the dtype of x
        return f"{x.dtype} activations with {jnp.dtype(accumulate)} sums"
    if codes[0].ndim != 2 or x.shape[-1] > _MOST_INPUTS or not codes[0].size:
        return f"codes of the shape {codes[0].shape}"
    return native.unusable_reason()


def product(x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, path: str = "auto") -> jax.Array:
    """The product of a few rows and a quantized weight, with the values of the codes in full precision.

    Activations are not quantized: they enter as 24-bit integers, so the error is that of a float32 product (see
    `cpu/vnni_operands.h`). The result of a row depends neither on other rows nor on the number of threads.

    Args:
      x: float32 (..., C).
      codes: (codes, scale, offset) of a weight whose groups lie along C: axis -2 for a weight (C, F), -1 for (F, C).
        The scale may be (codes, scale, mean) itself.
      path: a name of `native.PATHS`, for tests.

    Returns:
      float32 (..., F).
    """
    f = number_formats.FORMATS[s.format]
    packed, scale, offset = codes
    nothing = jnp.zeros((0, 0), jnp.float32)
    inner, mean, scale_values = nothing, nothing, np.zeros(0, np.float32)
    if isinstance(scale, tuple):
        scale_values = np.asarray(number_formats.FORMATS["dynamic8"].values, np.float32)
        scale, inner, mean = scale
    inputs = x.shape[-1]
    outputs = packed.shape[1 if axis == -2 else 0]
    values = f.values or (np.arange(2**f.bits) + f.low if f.bits < 8 else ())
    call = jax.ffi.ffi_call(
        "llm_jax_quantized_product",
        jax.ShapeDtypeStruct((x.size // inputs, outputs), jnp.float32),
        vmap_method="sequential",
    )
    y = call(
        x.reshape(-1, inputs),
        packed,
        scale,
        inner,
        mean,
        nothing if offset is None else offset,
        bits=f.bits,
        group=s.group if s.group > 0 else inputs,
        by_output=int(axis == -1),
        path=native.PATHS.index(path),
        values=np.asarray(values, np.float32),
        scale_values=scale_values,
    )
    return y.reshape(*x.shape[:-1], outputs)


def unsupported_integer_reason(x: jax.Array, codes: jax.Array) -> str:
    """The reason why the kernels do not compute a product of integers, or ""; see `integer_product`."""
    if codes.ndim != 2 or not x.size or not codes.size or x.shape[-1] > _MOST_INPUTS:
        return f"activations of the shape {x.shape} and codes of the shape {codes.shape}"
    if reason := native.unusable_reason():
        return reason
    library = native.library()
    if library is None:
        return "XLA computes everything"
    fastest = native.PATHS[library.llm_jax_fastest_path()]
    return "" if fastest == "avx512_vnni" else f"this CPU has {fastest}; the kernel needs avx512_vnni"


def integer_product(x: jax.Array, x_scale: jax.Array, codes: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """The product of int8 activations and int8 weights (`cpu/integer_product.cc`); see `matmul.integer_product`."""
    inputs, outputs = x.shape[-1], codes.shape[1 if axis == -2 else 0]
    result = jax.ShapeDtypeStruct((x.size // inputs, outputs), jnp.float32)
    y = jax.ffi.ffi_call("llm_jax_integer_product", result, vmap_method="sequential")(
        x.reshape(-1, inputs),
        jnp.broadcast_to(x_scale.astype(jnp.float32), (*x.shape[:-1], 1)).reshape(-1),
        codes,
        scale.astype(jnp.float32).reshape(-1),
        by_output=int(axis == -1),
    )
    return y.reshape(*x.shape[:-1], outputs)
