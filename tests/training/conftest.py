import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture
def batch():
    tokens = jax.random.randint(jax.random.key(5), (8, 33), 3, 259)
    segments = jnp.asarray(np.repeat([[1] * 20 + [2] * 12], 8, 0))
    positions = jnp.asarray(np.repeat([[*range(20), *range(12)]], 8, 0))
    mask = jnp.ones((8, 32), jnp.int32).at[:, 19].set(0).at[0, 25:].set(0)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions,
        "segments": segments,
        "mask": mask,
    }
