"""Every implementation of attention gives what the plain one gives, and the choice follows the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.model import attention_kernels
from llm_jax.model.attention import TokenMetadata, attention_mask
from llm_jax.parallel import mesh as mesh_lib

SHAPE = {"platform": "tpu", "batch": 4, "length": 256, "devices": {}}


@pytest.fixture
def packed():
    """(q, k, v, where, values that count): two documents and padding in 256 places."""
    draw = lambda i, heads: jax.random.normal(jax.random.key(i), (1, 256, heads, 16))  # noqa: E731
    lengths = [150, 90, 16]
    segments = jnp.repeat(jnp.array([1, 2, 0]), jnp.array(lengths), total_repeat_length=256)[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    return draw(0, 2), draw(1, 1), draw(2, 1), TokenMetadata(positions, segments), (segments > 0)[..., None, None]


@pytest.mark.parametrize(("window", "causal"), [(None, True), (None, False), (40, True), (40, False)])
@pytest.mark.parametrize("name", ["xla", "splash"])
def test_results_and_gradients_equal_those_of_plain(packed, name, window, causal):
    q, k, v, where, real = packed
    mask = attention_mask(where, where, window, causal)

    def plain(q, k, v):
        return attention_kernels.attend(q, k, v, mask, None) * real

    def other(q, k, v):
        if name == "xla":
            return attention_kernels.fused("xla", q, k, v, mask, None) * real
        return attention_kernels.splash(q, k, v, where.segments, window, causal, interpret=True) * real

    @functools.partial(jax.jit, static_argnums=0)
    def both(function):
        total = lambda *a: jnp.sum(jnp.sin(function(*a)))  # noqa: E731
        return function(q, k, v), jax.grad(total, (0, 1, 2))(q, k, v)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), both(other), both(plain))


def test_a_softcap_and_its_gradients_are_the_formula(packed):
    q, k, v, where, real = packed
    mask = attention_mask(where, where, None)

    def formula(q, k, v):
        scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, 2)) / 4
        shares = jax.nn.softmax(jnp.where(mask[:, None], 0.5 * jnp.tanh(scores / 0.5), -1e30), -1)
        return jnp.einsum("bnts,bsnh->btnh", shares, jnp.repeat(v, 2, 2)) * real

    @functools.partial(jax.jit, static_argnums=0)
    def both(function):
        total = lambda *a: jnp.sum(jnp.sin(function(*a)))  # noqa: E731
        return function(q, k, v), jax.grad(total, (0, 1, 2))(q, k, v)

    plain = lambda q, k, v: attention_kernels.attend(q, k, v, mask, None, 0.5) * real  # noqa: E731
    adding = lambda q, k, v: attention_kernels.attend_adding(q, k, v, mask, None, lambda s: 0 * q, 0.5) * real  # noqa: E731
    expected = both(formula)
    for ours in (plain, adding):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both(ours), expected)


def test_the_choice_follows_the_device(tiny):
    def found(kind="rope", attention_kernel="auto", compute="bfloat16", **shape):
        position = dataclasses.replace(tiny.model.position, kind=kind)
        precision = dataclasses.replace(tiny.model.precision, compute=compute)
        config = dataclasses.replace(
            tiny.model, position=position, attention_kernel=attention_kernel, precision=precision
        )
        return attention_kernels.describe(config, **(SHAPE | shape))

    assert found() == "splash" and found("alibi") == "plain (not splash: model.position.kind=alibi adds to the scores)"
    assert found(length=200) == "plain (not splash: the length 200 is not a multiple of 128)"
    assert found(devices={"data": 3}).startswith("plain (not splash: 4 rows or 2 key/value heads")
    assert found(platform="gpu") == "cudnn" and "half precision" in found(platform="gpu", compute="float32")
    assert found(platform="cpu") == "plain" and found(attention_kernel="xla") == "xla"
    with pytest.raises(
        UserError, match="attention_kernel=cudnn cannot be used: it needs a GPU, and this is cpu; choose auto"
    ):
        found(platform="cpu", attention_kernel="cudnn")
    with pytest.raises(UserError, match="attention_kernel=splash cannot be used: it needs a TPU"):
        found(platform="cpu", attention_kernel="splash")
    with pytest.raises(UserError, match="attention_kernel=splash cannot be used: .*kind=t5 adds to the scores"):
        found("t5", attention_kernel="splash")
    with pytest.raises(UserError, match="expected one of auto, cudnn, plain, splash, xla"):
        found(attention_kernel="flash")


def test_splash_under_a_mesh_is_mapped_over_its_devices(packed, tiny):
    q, k, v, where, real = packed
    mesh = mesh_lib.make(tiny.mesh)

    def splash(q, k, v):
        assert mesh_lib.current_axis_sizes() == dict.fromkeys(mesh_lib.AXES, 1)
        return attention_kernels.splash(q, k, v, where.segments, None, True, interpret=True)

    got = jax.jit(mesh_lib.with_mesh(mesh, splash))
    assert "shard_map" in str(jax.make_jaxpr(got)(q, k, v))
    expected = attention_kernels.attend(q, k, v, attention_mask(where, where, None), None)
    np.testing.assert_allclose(got(q, k, v) * real, expected * real, atol=2e-5)
    assert mesh_lib.current_axis_sizes() == {}


def test_what_the_device_cannot_run_is_refused_before_training(command, tmp_path):
    flags = ("--config.model.attention_kernel=splash", "--config.train.seq_len=128")
    done = command("train", f"--workdir={tmp_path / 'run'}", *flags, code=2)
    assert "attention_kernel=splash cannot be used: it needs a TPU, and this is cpu" in done.stderr
