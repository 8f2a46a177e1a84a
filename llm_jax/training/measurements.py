"""Measurements of the machine and the model: matmul peak, layer statistics, peak memory."""

import functools
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import trees
from llm_jax.data.rows import Batch
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.layers import ACTIVATION_STATS
from llm_jax.model.transformer import Transformer


@functools.cache
def matmul_peak(dtype: Any) -> float:
    """The measured FLOP/s of a square matrix product in `dtype`, over all devices of this kind.

    Measured once per process. Simulated CPU devices share the same cores and count once.
    """
    n = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best * (1 if jax.default_backend() == "cpu" else jax.device_count())


def layer_statistics(model: Transformer) -> Callable[[Any, Batch], dict[str, dict[str, jax.Array]]]:
    """Returns a function (params, batch) -> {"activation": values, "attention_entropy": values}; jit it before use.

    The values are float32 () by layer, such as "layers/0": the root mean square of its output, and the mean entropy of
    its attention probabilities in nats (`attention_kernels.entropy`).
    """

    def statistics(params: Any, batch: Batch) -> dict[str, dict[str, jax.Array]]:
        metadata = TokenMetadata(batch["positions"], batch["segments"])
        _, state = model.apply(
            {"params": params}, batch["inputs"], metadata, method="features", mutable=[ACTIVATION_STATS]
        )
        kinds = {"rms": "activation", "attention/entropy": "attention_entropy"}
        values: dict[str, dict[str, jax.Array]] = {kind: {} for kind in kinds.values()}
        for path, (value,) in trees.flatten(state[ACTIVATION_STATS]).items():
            for name, kind in kinds.items():
                if path.endswith(f"/{name}"):
                    layers = trees.expand(path.removesuffix(f"/{name}"))
                    values[kind] |= dict(zip(layers, jnp.atleast_1d(value), strict=True))
        return values

    return statistics


def peak_memory() -> dict[str, int]:
    """The peak memory so far, in bytes: of this process, and of one device if it reports its peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.local_devices()[0].memory_stats()
    return peaks | ({"peak_device_bytes": stats["peak_bytes_in_use"]} if stats else {})
