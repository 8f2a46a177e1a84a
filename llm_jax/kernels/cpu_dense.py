"""Products of a few rows with a bfloat16 weight, by a C++ kernel (`cpu/bfloat16_product.cc`).

XLA reads float32 weights at the full memory bandwidth, but bfloat16 weights at a fraction of it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels import native

# Letters of shapes: ... leading axes of x, C the contracted axis of the weight, F its free one.

MAX_ROWS = 1  # with more rows, XLA's matmul is faster
MAX_ROWS_AMX = 2**20  # with AMX, which has not been compared with XLA's matmul: only if the user selects its path
_LEAST_SIZE = 2**17  # entries of a weight; with fewer, XLA takes less time than compiling the kernel


def unsupported_reason(x: jax.Array, w: jax.Array, accumulate: Any) -> str:
    """The reason why the kernel does not compute a product, or ""; see `product` for the arguments."""
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16 or jnp.dtype(accumulate) != jnp.float32:
        return f"{x.dtype} activations, {w.dtype} weights and {jnp.dtype(accumulate)} sums"
    most = MAX_ROWS_AMX if native.path_setting() == "avx512_amx" else MAX_ROWS
    if not 1 <= (rows := x.size // max(x.shape[-1], 1)) <= most:
        return f"{rows} rows of activations; the kernel takes 1 to {most}"
    if w.ndim != 2 or w.size < _LEAST_SIZE:
        return f"a weight of the shape {w.shape}, which XLA reads fast"
    return native.unusable_reason()


def product(x: jax.Array, w: jax.Array, transposed: bool, path: str = "auto") -> jax.Array:
    """The product of a few rows and a weight, with float32 sums.

    The result of a row depends neither on other rows nor on the number of threads.

    Args:
      x: bfloat16 (..., C).
      w: bfloat16 (C, F), or (F, C) if `transposed`.
      path: a name of `native.PATHS`, for tests.

    Returns:
      float32 (..., F).
    """
    outputs = w.shape[0 if transposed else 1]
    result = jax.ShapeDtypeStruct((x.size // x.shape[-1], outputs), jnp.float32)
    y = jax.ffi.ffi_call("llm_jax_bfloat16_product", result, vmap_method="sequential")(
        x.reshape(-1, x.shape[-1]), w, by_output=int(transposed), path=native.PATHS.index(path)
    )
    return y.reshape(*x.shape[:-1], outputs)
