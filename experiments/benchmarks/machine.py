"""The bounds of this machine: what it reads from memory and what its matrix products reach."""

import functools

from experiments.benchmarks.worker import Job, timed

# Bytes that are read, and rows and columns of the matrices of a product, by device.
_SIZES = {"cpu": (1 << 29, 2048), "gpu": (1 << 32, 8192)}


def bounds() -> Job:
    """Bandwidth (a vector times a large matrix) and matmul peaks (square matrices), both through XLA."""
    import jax
    import jax.numpy as jnp

    num_bytes, side = _SIZES[jax.default_backend()]
    data, row = jnp.ones((1 << 10, num_bytes >> 12), jnp.float32), jnp.ones((1, 1 << 10), jnp.float32)
    product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
    square = {dtype: jnp.ones((side, side), dtype) for dtype in ("float32", "bfloat16")}

    def turn(number: int) -> dict[str, float]:
        seconds = min(timed(lambda: product(row, data))[0] for _ in range(3))
        figures = {"read GB/s": num_bytes / seconds / 1e9}
        for dtype, matrix in square.items():
            seconds = min(timed(functools.partial(product, matrix, matrix))[0] for _ in range(2))
            figures[f"{dtype} GFLOP/s"] = 2 * side**3 / seconds / 1e9
        return figures

    return Job(turn, f"jax {jax.__version__}")
