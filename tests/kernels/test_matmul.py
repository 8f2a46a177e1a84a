"""The memory of products with quantized weights."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax import weights
from llm_jax.weights import IN, to_qtensor

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "int4_affine"])
def test_one_token_expands_no_weight_whole(scheme):
    """XLA would expand all of them first, as none waits for the token, and keep them until they are used."""
    width, layers = 384, 8
    ws = [to_qtensor(jax.random.normal(jax.random.key(i), (width, width)), scheme, IN) for i in range(layers)]

    def forward(x, ws):
        for w in ws:
            x = jnp.tanh(weights.dot(x, w))
        return x

    compiled = jax.jit(forward).lower(jnp.ones((1, width)), ws).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * width * width
