"""Several adapters of one base: switched, summed, and one for each row, in training and in decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import lora, trees
from llm_jax.decoding import loop, samplers
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from tests.lora import cases


@pytest.fixture(scope="module")
def pair(make, tiny):
    """Adapters of different ranks and targets (two of them of the same weights)."""
    _, base = make()
    settings = (
        cases.config(tiny),
        cases.config(tiny, rank=2, targets=("attention", "embeddings"), rank_stabilized=True),
    )
    return [cases.made(base, s, seed) for seed, s in enumerate(settings)]


def test_switching_and_summing_change_numbers_only(make, pair):
    model, base = make()
    combined, compiled = lora.combine(*pair), []

    @jax.jit
    def logits(mixture):
        compiled.append(mixture)
        return model.apply({"params": lora.attach(base, lora.mix(combined, mixture))}, cases.IDS)

    alone = jax.jit(lambda a: model.apply({"params": lora.attach(base, a)}, cases.IDS))
    for i, adapters in enumerate(pair):
        expected = np.asarray(alone(adapters))
        np.testing.assert_allclose(logits(jnp.eye(2)[i]), expected, atol=1e-6 * np.abs(expected).max())
    sums = trees.flatten(base)
    for weight, adapters in zip((0.3, -0.7), pair, strict=True):
        for path, w in trees.flatten(cases.dense(base, adapters)).items():
            sums[path] = sums[path] + weight * (w - np.asarray(trees.flatten(base)[path]))
    expected = jax.jit(lambda p: model.apply({"params": p}, cases.IDS))(
        jax.tree.map(jnp.float32, trees.unflatten(sums))
    )
    # Relative to the largest logit, as above: the order of float32 sums differs between CPUs.
    np.testing.assert_allclose(logits(jnp.array([0.3, -0.7])), expected, atol=1e-6 * np.abs(expected).max())
    assert len(compiled) == 1


def test_plain_adapters_of_pissa_fit_the_base_that_was_not_rebased(make, tiny):
    """W + (a b - start_a start_b) s equals (W - start_a start_b s) + a b s, after a and b have been trained."""
    _, base = make()
    initial = jax.jit(lambda key: lora.init(key, base, cases.config(tiny, variant="pissa")))(jax.random.key(0))
    trained = trees.map_weights(lambda path, w: w * 1.5 if path.endswith("/b") else w, initial)
    expected = trees.flatten(cases.dense(base, trained))
    got = trees.flatten(cases.dense(base, lora.to_lora(trained)))
    for path, w in trees.flatten(base).items():
        np.testing.assert_allclose(got[path], expected[path], atol=1e-5)
        if f"{path}/a" in trees.flatten(trained):
            assert np.abs(got[path] - w).max() > 1e-3


def test_every_row_has_its_own_adapter_and_trains_it_alone(make, pair):
    model, base = make()
    combined = lora.combine(*pair)
    rows = jnp.array([[1.0, 0], [0, 1.0], [0, 0], [0, 1.0]])

    def loss(trained, mixture, ids):
        adapters = lora.mix(trees.unflatten(trees.flatten(combined) | trees.flatten(trained)), mixture)
        out = model.apply({"params": lora.attach(base, adapters)}, ids)
        return jnp.sum(jnp.sin(out)), out

    trained, _ = lora.split(combined, "lora")
    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, out), gradient = both(trained, rows, cases.IDS)
    for i, row in enumerate(rows):
        (_, one), _ = both(trained, row[None], cases.IDS[i : i + 1])
        np.testing.assert_allclose(out[i], one[0], atol=1e-5)
    (_, _), first = both(trained, rows[:1], cases.IDS[:1])
    path = "layers/0:2/0::1/attention/query/b"  # rows of b: three of the first adapter, two of the second
    got, expected = (np.asarray(trees.flatten(g)[path])[:, :3] for g in (gradient, first))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3


def test_rows_of_one_decoded_batch_use_different_adapters(make, tiny, pair):
    _, base = make()
    import dataclasses

    model = Transformer(dataclasses.replace(tiny.model, scan_layers=False))
    base, greedy = trees.unstack(base), samplers.Sampler(greedy=True)
    adapters = [trees.unstack(one) for one in pair]
    prompts = [[1, 5, 9], [1, 70, 71, 72], [1, 5]]

    def decode(params, prompts):
        return [made.ids for made in loop.generate(model, params, prompts, greedy, max_new_tokens=6)]

    mixed = lora.mix(lora.combine(*adapters), jnp.array([[1.0, 0], [0, 1.0], [0, 0]]))
    alone = [lora.attach(base, adapters[0]), lora.attach(base, adapters[1]), base]
    expected = [decode(params, [prompt])[0] for params, prompt in zip(alone, prompts, strict=True)]
    assert decode(lora.attach(base, mixed), prompts) == expected
    assert expected[0] != decode(base, prompts[:1])[0]


def test_dora_is_not_combined(make, tiny):
    _, base = make()
    dora = cases.made(base, cases.config(tiny, variant="dora"))
    with pytest.raises(UserError, match=r"magnitude \(DoRA\); its update is not of low rank and cannot be combined"):
        lora.combine(dora, dora)
