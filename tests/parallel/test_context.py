"""Context parallelism: packed segments, windows and every kind of positions give the results of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.model import attention_kernels
from llm_jax.model.attention import TokenMetadata, attention_mask
from llm_jax.parallel import mesh as mesh_lib
from tests.parallel import on_mesh

MESH = (("data", 1), ("fsdp", 2), ("context", 2), ("tensor", 2))
WINDOWS = (("model.layer_pattern", ("local", "global")), ("model.window", 5), ("train.loss_chunk", 8))


@pytest.mark.slow
def test_a_sharded_sequence_gives_the_loss_and_gradients_of_one_device(simulated):
    one, sharded = (simulated(8)(on_mesh.losses_and_gradients, sizes, WINDOWS) for sizes in ((), MESH))
    assert sharded[0] == pytest.approx(one[0], rel=1e-5)
    np.testing.assert_allclose(sharded[1], one[1], rtol=2e-3)


def splash_error(window):
    """The largest differences of splash over a sharded sequence from `attend`: outputs and gradients."""
    mesh = mesh_lib.make(on_mesh.tiny(**{f"mesh.{axis}": size for axis, size in MESH}).mesh)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 512, heads, 128)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    segments = jnp.repeat(jnp.array([[1, 1, 2, 2], [1, 2, 2, 3]]), 128, 1)
    starts = jnp.array([[0, 0, 256, 256], [0, 128, 128, 384]])
    where = TokenMetadata(jnp.arange(512) - jnp.repeat(starts, 128, 1), segments)

    def splash(q, k, v):
        return attention_kernels.splash(q, k, v, segments, window, True, interpret=True)

    def plain(q, k, v):
        return attention_kernels.attend(q, k, v, attention_mask(where, where, window), None)

    def both(function, *arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(out)

    sharded = jax.jit(
        mesh_lib.with_mesh(mesh, lambda *arrays: both(splash, *arrays)), in_shardings=mesh_lib.replicated(mesh)
    )
    results = sharded(q, k, v), both(plain, q, k, v)
    return [float(jnp.max(jnp.abs(a - b))) for a, b in zip(*results, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 100])
def test_splash_masks_a_sharded_sequence_as_a_whole_one(simulated, window):
    assert max(simulated(8)(splash_error, window)) < 1e-4


def test_a_sequence_that_does_not_split_is_refused(command, tmp_path):
    flags = ("--config.mesh.context=8", "--config.mesh.data=1", "--config.train.seq_len=36")
    done = command("train", f"--workdir={tmp_path / 'x'}", "--devices=8", *flags, code=2)
    assert "train.seq_len=36 cannot be split over mesh.context=8 devices" in done.stderr
