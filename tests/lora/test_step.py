"""The gradients, optimizer state and memory of a training step over a frozen base."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import checkpoints, lora, trees
from llm_jax.model.transformer import Transformer
from llm_jax.training import losses, memory, optim, step
from llm_jax.training.trainable import AdapterTraining
from tests.lora import cases

IDS = jnp.asarray(np.random.RandomState(1).randint(3, 259, (3, 8)))


def parts(model, base, settings, config, chunk=0, sparse=False):
    """(step, state, frozen, batch); three rows of seven tokens, so that no activation is shaped like a weight."""
    method = AdapterTraining(dataclasses.replace(config, lora=settings))
    trainable, constants = method.init(base, jax.random.key(0))
    ones = jnp.ones((3, 7), jnp.int32)
    batch = {
        "inputs": IDS[:, :-1],
        "targets": IDS[:, 1:],
        "positions": jnp.broadcast_to(jnp.arange(7), (3, 7)),
        "segments": ones,
        "mask": ones,
    }

    def loss(trainable, frozen, batch, count, key):
        return losses.language_model(model, method.model_params(trainable, frozen, key), batch, chunk, sparse)

    optimizer = optax.adam(1e-2)
    one = jax.jit(step.make(loss, optimizer, lambda _: 1e-2, 0, 1))
    return one, step.init(optimizer, trainable), method.freeze(base, constants), batch


def products_like(text: str, base) -> list[str]:
    """Instructions of compiled HLO that make an array of the shape of a weight (or its transpose): sums, or zeros."""
    shapes = set()
    for path, w in trees.flatten(base).items():
        stacked = trees.layers_of(path) is not None
        if w.ndim - stacked == 2:
            lead, (i, o) = w.shape[:stacked], w.shape[stacked:]
            for pair in ((i, o), (o, i)):
                shapes |= {pair, (*lead, *pair), (1, *pair)}
    made = re.compile(r"= \w+\[([\d,]*)\]\S* (dot|scatter|convolution|dynamic-update-slice|custom-call|broadcast)\(")
    found = []
    for line in text.splitlines():
        hit = made.search(line)
        if hit and tuple(int(n) for n in hit[1].split(",") if n) in shapes:
            found.append(line.strip()[:160])
    return found


@pytest.mark.parametrize(("chunk", "sparse"), [(0, False), (1, False), (1, True)])
@pytest.mark.parametrize("scan", [True, False])
def test_no_dense_gradient_is_computed(make, tiny, scan, chunk, sparse):
    model, base = make(scan_layers=scan)
    settings = cases.config(tiny, targets=("linear", "embeddings"))
    one, state, frozen, batch = parts(model, base, settings, tiny, chunk, sparse)
    assert not products_like(one.lower(state, frozen, batch).compile().as_text(), base)


def test_the_check_above_finds_the_dense_gradients_of_full_training(make):
    model, base = make()
    full = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, IDS)))))
    found = " ".join(products_like(full.lower(base).compile().as_text(), base))
    assert "[259,32]" in found and "48" in found


@pytest.mark.parametrize("variant", ["lora", "fa", "dora", "pissa"])
def test_the_optimizer_holds_adapters_only_and_the_base_is_not_touched(make, tiny, variant):
    model, base = make()
    before = trees.fingerprint(base)
    one, state, frozen, batch = parts(model, base, cases.config(tiny, variant=variant), tiny)
    rebased = trees.fingerprint(frozen["base"])
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(state.opt_state) <= 2 * size(state.params) + 8 and size(state.params) < 0.5 * size(base)
    start, losses_seen = state.params, []
    for _ in range(4):
        state, metrics = one(state, frozen, batch)
        losses_seen.append(float(metrics["loss"]))
    assert losses_seen[-1] < losses_seen[0]
    assert all(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (state.params, start)), strict=True))
    assert trees.fingerprint(base) == before and trees.fingerprint(frozen["base"]) == rebased
    assert (rebased == before) == (variant != "pissa")


def test_lora_plus_gives_b_its_own_rate_and_adapters_decay_as_their_weights(tiny):
    base = {"embed": {"table": jnp.zeros((4, 3))}, "mlp": {"up": jnp.zeros((3, 2))}}
    adapters = {
        "embed": {"table": {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 3))}},
        "mlp": {"up": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}},
    }
    config = dataclasses.replace(
        tiny.optim, weight_decay=0.1, clip_norm=0.0, kind="sgd", schedule="constant", lr=1.0, warmup_steps=0,
        decay_rules=((r"embed/.*", 0.0), (r".*", 0.5)),
    )  # fmt: skip
    optimizer = optim.make(config, 8, base, adapters=adapters, b_lr_ratio=4.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, adapters), optimizer.init(adapters), adapters)
    expected = {"embed/table/a": -1.0, "embed/table/b": -4.0, "mlp/up/a": -1.05, "mlp/up/b": -4.2}
    for path, update in trees.flatten(updates).items():
        np.testing.assert_allclose(update, expected[path], rtol=1e-6)


def test_lora_fa_keeps_no_inputs_for_the_gradient(tiny):
    """Of `down`, LoRA keeps the hidden activations of every layer; LoRA-FA only their products with a."""
    model = dataclasses.replace(tiny.model, vocab_size=64, mlp_dim=512, num_layers=4, qk_norm=False)
    train = dataclasses.replace(tiny.train, batch_size=4, seq_len=64)
    config = dataclasses.replace(tiny, model=model, train=train, init_from="unnamed")
    settings = cases.config(tiny, targets=("layers/.*/down",), rank=4)
    lora_, fa = (
        memory.of_variant(
            dataclasses.replace(config, lora=dataclasses.replace(settings, variant=v)), "as given"
        ).temporaries
        for v in ("lora", "fa")
    )
    hidden = 4 * 4 * 64 * 512 * 4  # layers x rows x tokens x MLP width, float32
    assert 0.9 * hidden < lora_ - fa < 1.2 * hidden


def test_a_policy_that_keeps_products_computes_none_again_and_keeps_each_once(tiny, make):
    settings = cases.config(tiny)

    def products(remat):
        model, base = make(remat=remat)
        adapters = lora.init(jax.random.key(0), base, settings)
        loss = lambda a: jnp.var(model.apply({"params": lora.attach(base, a)}, IDS))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(adapters)).count("dot_general")

    assert products("none") == products("dots") < products("full")
    shape = {"vocab_size": 64, "width": 64, "mlp_dim": 512, "num_layers": 6, "qk_norm": False}
    rows, length, rank = 4, 64, settings.rank
    train = dataclasses.replace(tiny.train, batch_size=rows, seq_len=length)
    taken = {}
    for layers in (6, 12):
        model = dataclasses.replace(tiny.model, **shape | {"num_layers": layers, "remat": "dots"})
        config = dataclasses.replace(tiny, model=model, train=train, lora=settings, init_from="unnamed")
        taken[layers] = memory.of_variant(config, "as given").temporaries
    m = model
    key_width = m.width // m.num_heads * m.num_kv_heads
    # What comes in; queries, keys, values; what attention gives, and its sums; `out`; gate and up; x a of all seven.
    kept = m.width + (m.width + 2 * key_width) + m.width + m.num_heads + m.width + 2 * m.mlp_dim + 7 * rank
    # Beside these, gradients of a and b.
    pairs = 2 * (m.width + m.width) + 2 * (m.width + key_width) + 3 * (m.width + m.mlp_dim)
    expected = 6 * 4 * (rows * length * kept + pairs * rank)
    assert 0.97 * expected < taken[12] - taken[6] < 1.03 * expected


def test_memory_of_a_step_is_what_its_arrays_take(tiny):
    config = dataclasses.replace(tiny, lora=cases.config(tiny), train=dataclasses.replace(tiny.train, batch_size=4))
    found = {kind: memory.of_variant(config, kind) for kind in ("forward", "full", "lora")}
    weights = found["forward"].arguments - 5 * 4 * tiny.train.seq_len * 4  # besides the batch
    entries = sum(w.size for w in jax.tree.leaves(checkpoints.abstract_params(Transformer(config.model))))
    assert weights == 4 * entries
    assert found["full"].optimizer == 2 * 4 * entries + 8 and found["forward"].optimizer == 0
    assert found["lora"].optimizer < 0.5 * found["full"].optimizer
