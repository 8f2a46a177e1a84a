import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ROOT


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


@pytest.fixture
def on_mesh():
    """on_mesh("optimizers" or "losses") -> what tests/training/on_mesh.py prints."""

    def run(what: str):
        # The programs are tiny: most of the time would go into optimizing them.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
        full = [sys.executable, "-m", "tests.training.on_mesh", what]
        done = subprocess.run(full, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert not done.returncode, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
