"""Products with quantized weights by the kernels in C++.

`products` multiplies a few rows of float32 activations (`cpu/quantized_product.cc`), `integer_product` any number of
rows in int8 (`cpu/integer_product.cc`), `blockwise_products` any number of rows that are rounded to 8 bits in blocks
(`cpu/blockwise_product.cc`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import native, number_formats, tiles
from llm_jax.kernels.number_formats import Scheme

# Letters of shapes: M rows of activations, C the contracted axis of the weight, F its free one.

# Maximum numbers of rows, by the bits of a code: with more, XLA's matmul of the expanded weight is faster.
_MAX_ROWS = {8: 4, 4: 16, 2: 16}
_MAX_ROWS_IN_TILES = 24
_MOST_INPUTS = 2**20  # int32 sums of this many products do not overflow


def unsupported_reason(
    x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, contracted: int, accumulate: Any
) -> str:
    """The reason why the kernels do not compute a product, or ""; see `matmul.expanded_products` for the arguments."""
    rows = x.size // x.shape[-1] if x.shape[-1] else 0
    if reason := _unsupported_weight(x, codes, s, axis, contracted):
        return reason
    most_rows = max_rows(codes, s)
    if not 1 <= rows <= most_rows:
        return f"{rows} rows of activations; the kernels of {s.format} take 1 to {most_rows}"
    if x.dtype != jnp.float32 or jnp.dtype(accumulate) != jnp.float32:  # XLA rounds the weight to the dtype of x
        return f"{x.dtype} activations with {jnp.dtype(accumulate)} sums"
    return native.unusable_reason()


def max_rows(codes: tuple[Any, ...], s: Scheme) -> int:
    """The maximum number of rows of float32 activations that the kernels multiply with a weight."""
    return _MAX_ROWS_IN_TILES if tiles.is_tiled(codes[0]) else _MAX_ROWS[number_formats.FORMATS[s.format].bits]


def unsupported_blockwise_reason(x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, contracted: int) -> str:
    """The reason why the kernels do not compute a product of rounded activations, or ""; see `blockwise_products`."""
    if reason := _unsupported_weight(x, codes, s, axis, contracted):
        return reason
    return native.unusable_reason() if x.size else "no activations"


def _unsupported_weight(x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, contracted: int) -> str:
    if s.format not in tiles.FORMATS:
        return f"the format {s.format} has no kernel"
    if axis + 2 != contracted:
        return "the groups do not lie along the contracted axis"
    if (codes[0].ndim != 2 and not tiles.is_tiled(codes[0])) or x.shape[-1] > _MOST_INPUTS or not codes[0].size:
        return f"codes of the shape {codes[0].shape}"
    return ""


def products(
    x: jax.Array, weights: Sequence[tuple[Any, ...]], s: Scheme, axis: int, path: str = "auto"
) -> tuple[jax.Array, ...]:
    """The products of a few rows with quantized weights, with the values of the codes in full precision.

    Activations are not quantized: they enter as 24-bit integers, so the error is that of a float32 product (see
    `cpu/vnni_operands.h`). The result of a row depends neither on other rows nor on the number of threads.

    Args:
      x: float32 (..., C).
      weights: (codes, scale, offset) of each weight, whose groups lie along C: axis -2 for a weight (C, F), -1 for
        (F, C); all of the scheme s. The scale may be (codes, scale, mean) itself. They may all be in tiles
        (`tiles.to_tiles`).
      path: a name of `native.PATHS`, for tests.

    Returns:
      float32 (..., F) for each weight.
    """
    return _call("llm_jax_quantized_product", x, weights, s, axis, path)


def product(x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, path: str = "auto") -> jax.Array:
    """As `products`, with one weight."""
    return products(x, [codes], s, axis, path)[0]


def blockwise_products(
    x: jax.Array, weights: Sequence[tuple[Any, ...]], s: Scheme, axis: int, path: str = "auto"
) -> tuple[jax.Array, ...]:
    """The products of activations, rounded to 8 bits in blocks as by `matmul.round_blocks`, with quantized weights.

    The activations are rounded once. Sums within a block are exact; the values of NF4 are rounded to 8 bits. The result
    of a row depends neither on other rows nor on the number of threads.

    Args:
      x: float32 (..., C).
      weights, s, axis, path: as for `products`.

    Returns:
      float32 (..., F) for each weight.
    """
    return _call("llm_jax_blockwise_product", x, weights, s, axis, path)


def _call(
    target: str, x: jax.Array, weights: Sequence[tuple[Any, ...]], s: Scheme, axis: int, path: str
) -> tuple[jax.Array, ...]:
    inputs, outputs = x.shape[-1], [_num_outputs(codes[0], axis) for codes in weights]
    results = [jax.ShapeDtypeStruct((x.size // inputs, size), jnp.float32) for size in outputs]
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    operands = [operand for codes in weights for operand in _operands(codes)]
    ys = call(x.reshape(-1, inputs), *operands, **_attributes(weights[0], s, axis, inputs, path))
    return tuple(y.reshape(*x.shape[:-1], size) for y, size in zip(ys, outputs, strict=True))


def expanded_weight(codes: tuple[Any, ...], s: Scheme, path: str = "auto") -> jax.Array:
    """The values of a weight in tiles: float32 (C, F), as by `number_formats.decode`, for both axes of its groups.

    Args:
      codes: (codes, scale, offset), see `tiles.to_tiles`.
      s, path: as for `products`.
    """
    inputs = codes[0].shape[1] * tiles.ROWS * (8 // number_formats.FORMATS[s.format].bits)
    result = jax.ShapeDtypeStruct((inputs, _num_outputs(codes[0], -2)), jnp.float32)
    call = jax.ffi.ffi_call("llm_jax_expanded_weight", result, vmap_method="sequential")
    return call(*_operands(codes), **_attributes(codes, s, -2, inputs, path))


def _num_outputs(codes: jax.Array, axis: int) -> int:
    return codes.shape[0] * tiles.OUTPUTS if tiles.is_tiled(codes) else codes.shape[1 if axis == -2 else 0]


def _operands(codes: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    """The operands of a custom call that describe a weight: codes, scale, inner scale, mean of the scales, offset."""
    nothing = jnp.zeros((0, 0), jnp.float32)
    packed, scale, offset = codes
    scale, inner, mean = scale if isinstance(scale, tuple) else (scale, nothing, nothing)
    return packed, scale, inner, mean, nothing if offset is None else offset


def _attributes(codes: tuple[Any, ...], s: Scheme, axis: int, inputs: int, path: str) -> dict[str, Any]:
    f = number_formats.FORMATS[s.format]
    values = f.values or (np.arange(2**f.bits) + f.low if f.bits < 8 else ())
    scale_values = number_formats.FORMATS["dynamic8"].values if isinstance(codes[1], tuple) else ()
    return {
        "bits": f.bits,
        "group": s.group if s.group > 0 else inputs,
        "by_output": int(axis == -1 and not tiles.is_tiled(codes[0])),
        "path": native.PATHS.index(path),
        "values": np.asarray(values, np.float32),
        "scale_values": np.asarray(scale_values, np.float32),
    }


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
    needed = "avx512_vnni", "avx512_amx", "neon_dot"
    return "" if fastest in needed else f"this CPU has {fastest}; the kernel needs {' or '.join(needed)}"


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
