import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import trees
from llm_jax.checkpoints import abstract_params
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.training import losses, optim, step
from llm_jax.weights import Adapted
from tests import compilation

GOLDEN = pathlib.Path(__file__).with_name("golden.json")


def loss_of(model, chunk=0):
    return lambda trained, frozen, batch, count, key: losses.language_model(model, trained, batch, chunk)


def run(model, params, config, batch, count=3, accumulation=1, chunk=0):
    optimizer = optim.make(config.optim, 8, params)
    one = jax.jit(step.make(loss_of(model, chunk), optimizer, optim.schedule(config.optim, 8), 0, accumulation))
    state, seen = jax.jit(lambda params: step.init(optimizer, params))(params), []
    for _ in range(count):
        state, metrics = one(state, None, batch)
        seen.append({name: float(value) for name, value in metrics.items() if value.ndim == 0})
    return state, seen


@pytest.mark.optimized
def test_golden_steps(make, tiny, batch):
    model, params = make()
    _, seen = run(model, params, tiny, batch)
    golden = json.loads(GOLDEN.read_text())
    for got, expected in zip(seen, golden, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(
                got[name],
                value,
                rtol=2e-5,
                err_msg=f"{name} of a training step has changed. If intended, write {json.dumps(seen)} to {GOLDEN}",
            )


def test_the_first_loss_is_that_of_numpy(make, tiny, batch):
    model, params = make()
    _, seen = run(model, params, tiny, batch, count=1)
    where = jax.tree.map(jnp.asarray, (batch["positions"], batch["segments"]))
    from llm_jax.model.attention import TokenMetadata

    logits = np.asarray(jax.jit(model.apply)({"params": params}, batch["inputs"], TokenMetadata(*where)), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probabilities, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    mask = np.asarray(batch["mask"])
    np.testing.assert_allclose(seen[0]["loss"], -(picked * mask).sum() / mask.sum(), rtol=1e-5)
    assert seen[0]["tokens"] == mask.sum()
    assert seen[0]["input_tokens"] == (np.asarray(batch["segments"]) > 0).sum() > mask.sum()


@pytest.mark.parametrize("variant", [{"accumulation": 4}, {"chunk": 8}, {"accumulation": 2, "chunk": 16}], ids=str)
def test_micro_batches_and_chunks_change_no_update(make, tiny, batch, variant):
    model, params = make(num_layers=1, scan_layers=False)
    state, seen = run(model, params, tiny, batch, 2)
    other, others = run(model, params, tiny, batch, 2, **variant)
    np.testing.assert_allclose([s["loss"] for s in others], [s["loss"] for s in seen], rtol=1e-5)
    np.testing.assert_allclose(others[0]["grad_norm"], seen[0]["grad_norm"], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), other.params, state.params)


def test_chunked_loss_holds_no_full_logits(tiny, batch):
    model = Transformer(dataclasses.replace(tiny.model, vocab_size=8192, num_layers=1, scan_layers=False))

    def optimized_hlo(chunk):
        # The batch is an argument: of a constant, XLA would compute the targets by token and id while it compiles.
        loss = lambda p, batch: losses.language_model(model, p, batch, chunk)[0]  # noqa: E731
        return compilation.with_optimized_hlo(jax.jit(jax.grad(loss)).lower(abstract_params(model), batch)).as_text()

    whole, chunked = optimized_hlo(0), optimized_hlo(8)
    assert "f32[8,32,8192]" in whole
    assert "8,32,8192]" not in chunked and "f32[8,8,8192]" in chunked


def test_a_step_trains_a_small_tree_over_a_frozen_base(make, tiny, batch):
    """Adapters over a frozen base through the same step: the contract that LoRA will use."""
    model, params = make()
    path = "layers/0:2/0::1/attention/query"
    base = trees.flatten(params)[path]
    layers, rows, columns = base.shape
    adapters = {"a": jnp.ones((layers, rows, 2)) / rows, "b": jnp.zeros((layers, 2, columns))}
    scale = jnp.ones(layers)

    def bind(frozen, trained):
        node = Adapted(trees.flatten(frozen)[path], trained["a"], trained["b"], scale)
        return trees.unflatten(trees.flatten(frozen) | {path: node})

    def loss(trained, frozen, batch, count, key):
        return losses.language_model(model, bind(frozen, trained), batch, 0)

    logits = jax.jit(lambda p: model.apply({"params": p}, batch["inputs"]))
    np.testing.assert_array_equal(logits(bind(params, adapters)), logits(params))  # b is zero: bit for bit

    optimizer = optax.adam(1e-2)
    one = jax.jit(step.make(loss, optimizer, lambda _: 1e-2, 0, 1))
    state = step.init(optimizer, adapters)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 3 * sum(x.size for x in jax.tree.leaves(adapters))
    first, metrics = one(state, params, batch)
    start = float(metrics["loss"])
    for _ in range(3):
        first, metrics = one(first, params, batch)
    assert float(metrics["loss"]) < start
    text = one.lower(state, params, batch).compile().as_text()
    shapes = {
        f"f32[{w.shape[-2]},{w.shape[-1]}]" for p, w in trees.flatten(params).items() if "mlp" in p and w.ndim == 3
    }
    assert not [
        line for line in text.splitlines() if " dot(" in line and any(s in line.split(" dot(")[0] for s in shapes)
    ]


def test_decay_follows_the_rules(tiny):
    params = {"embed": {"table": jnp.ones((3, 2))}, "mlp": {"up": jnp.ones((2, 2))}}
    config = dataclasses.replace(
        tiny.optim, weight_decay=0.1, clip_norm=0.0, kind="sgd", schedule="constant", lr=1.0, warmup_steps=0,
        decay_rules=((r"embed/.*", 0.0), (r".*", 0.5)),
    )  # fmt: skip
    optimizer = optim.make(config, 8, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["embed"]["table"], 0)
    np.testing.assert_allclose(updates["mlp"]["up"], -0.05)


@pytest.mark.parametrize("kind", sorted(optim.SCHEDULES))
def test_schedules_warm_up_and_end_where_they_should(tiny, kind):
    config = dataclasses.replace(tiny.optim, lr=2.0, warmup_steps=10, schedule=kind, final_lr_fraction=0.1)
    rate = optim.schedule(config, 100)
    np.testing.assert_allclose([rate(0), rate(4), rate(9)], [0.2, 1.0, 2.0], rtol=1e-6)
    last = {"constant": 2.0, "inverse_sqrt": 2.0 * (10 / 101) ** 0.5}
    np.testing.assert_allclose(rate(100), last.get(kind, 0.2), rtol=1e-5)


def test_impossible_schedules_and_splits_are_refused(tiny):
    with pytest.raises(UserError, match="warmup_steps"):
        optim.schedule(dataclasses.replace(tiny.optim, warmup_steps=8), 8)
    with pytest.raises(UserError, match="optim.kind"):
        optim.make(dataclasses.replace(tiny.optim, kind="adam"), 8, {})
    with pytest.raises(UserError, match="micro-batches"):
        step.check_accumulation(8, 3, 1)
