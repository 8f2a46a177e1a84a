import jax
import numpy as np
import pytest


@pytest.fixture
def batch():
    tokens = np.asarray(jax.random.randint(jax.random.key(5), (8, 33), 3, 259))
    segments = np.repeat(np.int32([[1] * 20 + [2] * 12]), 8, 0)
    positions = np.repeat(np.int32([[*range(20), *range(12)]]), 8, 0)
    mask = np.ones((8, 32), np.int32)
    mask[:, 19] = mask[0, 25:] = 0
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions,
        "segments": segments,
        "mask": mask,
    }
