"""Products of activations with a weight of one number format, and the error of each."""

import functools
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks.worker import Job, timed

_REPEATS = 20  # products of a turn, so that the time of starting one counts little


def llm_jax(scheme: str, rows: Sequence[int], inputs: int = 4096, outputs: int = 4096) -> Job:
    """`weights.dot` of bfloat16 activations with a weight of `inputs` x `outputs`.

    Figures: products per second by the number of rows, and "relative error" of the product with one row, beside the
    float32 product with the expanded weight, relative to its largest magnitude.

    Args:
      scheme: a scheme of `llm_jax.quantize`, or "bfloat16" for a dense weight.
    """
    import jax
    import jax.numpy as jnp

    from llm_jax import weights

    dense = jax.random.normal(jax.random.key(0), (inputs, outputs), jnp.float32)
    weight: Any = dense.astype(jnp.bfloat16)
    if scheme != "bfloat16":
        weight = jax.jit(functools.partial(weights.to_qtensor, scheme=scheme, axis=weights.IN))(dense)
    product = jax.jit(functools.partial(weights.dot, out_dtype=jnp.float32))
    x = {n: jax.random.normal(jax.random.key(n), (n, inputs), jnp.bfloat16) for n in rows}
    least = x[min(rows)]
    with jax.default_matmul_precision("highest"):
        expected = jnp.dot(least.astype(jnp.float32), weights.dense(weight).astype(jnp.float32))
    error = jnp.max(jnp.abs(product(least, weight) - expected)) / jnp.max(jnp.abs(expected))

    def turn(number: int) -> dict[str, float]:
        figures = {}
        for n in rows:
            seconds, _ = timed(lambda n=n: [product(x[n], weight) for _ in range(_REPEATS)])  # type: ignore[misc]
            figures[f"{n} rows, products/s"] = _REPEATS / seconds
        return figures | {"relative error": float(error)}

    size = weights.num_bytes(weight)
    bounds = [[f"{min(rows)} rows, products/s", "read GB/s", size / 1e9]]
    bounds += [[f"{max(rows)} rows, products/s", "bfloat16 GFLOP/s", 2 * max(rows) * inputs * outputs / 1e9]]
    return Job(
        turn,
        f"jax {jax.__version__} on {jax.default_backend()}",
        {"weights MiB": round(size / 2**20, 1), "bounds": bounds},
    )
