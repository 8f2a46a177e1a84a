import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import lora, trees
from llm_jax.errors import UserError
from tests.lora import cases


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_equals_attached_up_to_rounding(make, tiny, dtype, variant):
    precision = dataclasses.replace(tiny.model.precision, params=dtype, compute=dtype)
    model, base = make(precision=precision)
    adapters = cases.made(base, cases.config(tiny, variant=variant, targets=("linear", "embeddings")))
    merged = lora.merge(base, adapters)
    assert {w.dtype for w in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
    logits = jax.jit(lambda p: model.apply({"params": p}, cases.IDS))
    attached, plain = logits(lora.attach(base, adapters)), logits(base)
    size = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))  # noqa: E731
    rounding = float(jnp.finfo(dtype).eps)  # two layers of some ten roundings each
    assert size(logits(merged) - attached) < 8 * rounding * size(attached)
    assert size(attached - plain) > 0.5 * size(attached)


def test_unmerge_gives_the_base_again(make, tiny):
    _, base = make()
    adapters = cases.made(base, cases.config(tiny, targets=("linear", "embeddings")))
    merged = lora.merge(base, adapters)
    moved = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (merged, base)), strict=True))
    assert moved > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), lora.unmerge(merged, adapters), base)
    coarse = lora.merge(base, adapters, factors="int8")
    again = lora.unmerge(coarse, adapters, factors="int8")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, base)
    with pytest.raises(UserError, match=r"DoRA\) and cannot be unmerged"):
        lora.unmerge(merged, cases.made(base, cases.config(tiny, variant="dora")))


class Convolutions(nn.Module):
    """Not ours: a plain and a depthwise convolution and a dense layer, as in a ConvNeXt block."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = x + nn.Dense(8, name="out")(nn.gelu(nn.Conv(8, (5, 5), feature_group_count=8, name="depthwise")(x)))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_any_flax_model_is_adapted_by_materialize(tiny):
    model, x = Convolutions(), jax.random.normal(jax.random.key(0), (2, 9, 9, 4))
    base = model.init(jax.random.key(1), x)["params"]
    settings = cases.config(tiny, rank=2, targets=("(stem|depthwise|out)/kernel",))
    start = lora.init(jax.random.key(2), base, settings)
    run = jax.jit(lambda adapters: model.apply({"params": lora.materialize(base, adapters)}, x))
    np.testing.assert_array_equal(run(start), jax.jit(lambda p: model.apply({"params": p}, x))(base))
    adapters = cases.made(base, settings)

    # The same by composition: convolve to R channels, then a 1 x 1 convolution.
    stem = trees.flatten(adapters)
    low = nn.Conv(2, (3, 3), use_bias=False).apply({"params": {"kernel": stem["stem/kernel/a"].reshape(3, 3, 4, 2)}}, x)
    update = stem["stem/kernel/scale"] * low @ stem["stem/kernel/b"]
    conv = nn.Conv(8, (3, 3))
    whole = lora.materialize(base, adapters)["stem"]
    np.testing.assert_allclose(
        conv.apply({"params": whole}, x), conv.apply({"params": base["stem"]}, x) + update, atol=1e-5
    )
    loss = lambda a: jnp.sum(model.apply({"params": lora.materialize(base, a)}, x) ** 2)  # noqa: E731
    gradient = trees.flatten(jax.jit(jax.grad(loss))(adapters))
    assert all(np.abs(gradient[f"{w}/kernel/b"]).max() > 0 for w in ("stem", "depthwise", "out"))
    with pytest.raises(UserError, match=r"'depthwise/kernel' of shape \(5, 5, 1, 8\) is not a matrix; use lora.materi"):
        lora.attach(base, adapters)
