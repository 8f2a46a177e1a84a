"""Every update rule against the formula of its paper in numpy, per layer, on a mesh and across a resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoints, trees
from llm_jax.checkpoints import run as run_form
from llm_jax.errors import UserError
from llm_jax.tokenizers.byte import ByteTokenizer
from llm_jax.training import optim, step
from tests.training import on_mesh

KINDS = sorted(optim.OPTIMIZERS)
QUERY, NORM, TABLE = "layers/0:3/0::1/attention/query", "layers/0:3/0::1/mlp_norm/scale", "embed/table"
SHAPES = {QUERY: (3, 6, 4), NORM: (3, 5), TABLE: (7, 4)}
B1, B2, EPS = 0.9, 0.95, 1e-8


def draw(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape) * 10.0 ** rng.integers(-3, 2) for path, shape in SHAPES.items()}


def tree(flat):
    return trees.unflatten({path: jnp.asarray(value, jnp.float32) for path, value in flat.items()})


def plain(config, **changes):
    base = {"clip_norm": 0.0, "weight_decay": 0.0, "schedule": "constant", "lr": 0.5, "warmup_steps": 0}
    return dataclasses.replace(config.optim, **base | changes)


# One weight of one layer at a time: f(gradients of all steps so far) -> the update of the last step, in float64.


def adamw(gradients):
    m = v = 0.0
    for g in gradients:
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
    t = len(gradients)
    return (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)


def lion(gradients):
    m = 0.0
    for g in gradients:
        c, m = B1 * m + (1 - B1) * g, B2 * m + (1 - B2) * g
    return np.sign(c)


def sgd(gradients):
    m = 0.0
    for g in gradients:
        m = B1 * m + g
    return m


def adafactor(gradients):
    r = c = v = 0.0
    for t, g in enumerate(gradients, 1):
        beta, square = 1 - t**-0.8, g**2 + 1e-30
        if g.ndim == 2:
            r, c = beta * r + (1 - beta) * square.sum(1), beta * c + (1 - beta) * square.sum(0)
            v = np.outer(r, c) / r.sum()
        else:
            v = beta * v + (1 - beta) * square
    u = g / np.sqrt(v)
    return u / max(1.0, np.sqrt((u**2).mean()))


def muon(gradients):
    beta, m = 0.95, 0.0
    for g in gradients:
        m = beta * m + (1 - beta) * g
    t = len(gradients)
    x = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)  # Nesterov's, as in NAdam
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return 0.2 * np.sqrt(max(x.shape)) * x


FORMULAS = {
    "adamw": lambda path: adamw,
    "lion": lambda path: lion,
    "sgd": lambda path: sgd,
    "adafactor": lambda path: adafactor,
    "muon": lambda path: muon if path == QUERY else adamw,
}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_the_paper(tiny, kind):
    optimizer = optim.make(plain(tiny, kind=kind, beta1=B1, beta2=B2, eps=EPS, momentum=0.95), 8, tree(draw(0)))
    state, gradients = optimizer.init(tree(draw(0))), [draw(seed) for seed in (1, 2, 3, 4)]
    update = jax.jit(optimizer.update)
    for t in range(1, 5):
        updates, state = update(tree(gradients[t - 1]), state, tree(draw(0)))
        for path, got in trees.flatten(updates).items():
            seen = [g[path] for g in gradients[:t]]
            one = FORMULAS[kind](path)
            want = np.stack([one([g[i] for g in seen]) for i in range(3)]) if path != TABLE else one(seen)
            np.testing.assert_allclose(got, -0.5 * want, rtol=2e-4, atol=2e-6, err_msg=f"{path} at step {t}")


def test_muon_makes_momentum_orthogonal(tiny):
    optimizer = optim.make(plain(tiny, kind="muon", lr=1.0), 8, tree(draw(0)))
    updates, _ = optimizer.update(tree(draw(1)), optimizer.init(tree(draw(0))), tree(draw(0)))
    values = np.linalg.svd(trees.flatten(updates)[QUERY] / (0.2 * 6**0.5), compute_uv=False)
    assert values.shape == (3, 4) and (values > 0.6).all() and (values < 1.3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients_change_nothing(tiny, kind):
    params = tree(draw(0))
    optimizer = optim.make(plain(tiny, kind=kind), 8, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates)


@pytest.mark.parametrize("kind", KINDS)
def test_scanned_layers_are_updated_as_separate_ones(tiny, kind):
    params, config = tree(draw(0)), plain(tiny, kind=kind, weight_decay=0.1, lr_rules=((r".*query", 0.5), (r".*", 1.0)))
    results = []
    for layout in ([(1, 3)], []):
        own = trees.restage(params, layout)
        optimizer = optim.make(config, 8, own)
        state, update = optimizer.init(own), jax.jit(optimizer.update)
        for seed in (1, 2):
            updates, state = update(trees.restage(tree(draw(seed)), layout), state, own)
        results.append(trees.unstack(updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise(make, tiny, tmp_path, kind):
    _, params = make()
    config = dataclasses.replace(tiny, optim=dataclasses.replace(tiny.optim, kind=kind, ema_decay=0.5))
    optimizer = optim.make(config.optim, 8, params)
    batch = {"mask": jnp.ones((1, 1))}

    def loss(trained, frozen, batch, count, key):  # whose gradients differ from step to step
        return sum(jnp.sum(jnp.sin(leaf * (count + 1))) for leaf in jax.tree.leaves(trained)), jnp.float32(1)

    update = jax.jit(step.make(loss, optimizer, optim.schedule(config.optim, 8), 0, 1, ema_decay=0.5))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    # Committed to the device as restored arrays are, so that both call one program.
    whole = [jax.device_put(jax.jit(lambda params: step.init(optimizer, params, True))(params), device)]
    for _ in range(3):
        whole.append(update(whole[-1], None, batch)[0])
    writer = checkpoints.Writer(tmp_path, config, ByteTokenizer(), "")
    writer.save(2, whole[2].params, whole[2].opt_state, None, ema=whole[2].ema)
    writer.close()
    directory = checkpoints.find(tmp_path)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), whole[2])
    read = run_form.restore_state(
        directory, checkpoints.verify(directory), abstract.params, abstract.opt_state, abstract.ema
    )
    loaded = checkpoints.load(directory, scan_layers=True).params  # what is loaded is the average
    jax.tree.map(np.testing.assert_array_equal, loaded, whole[2].ema)
    resumed = step.TrainState(jax.device_put(jnp.int32(2), device), *read)
    jax.tree.map(np.testing.assert_array_equal, update(resumed, None, batch)[0], whole[3])


def test_the_average_is_its_formula(tiny):
    params, decay = tree(draw(0)), 0.3
    optimizer = optim.make(plain(tiny, kind="sgd", lr=0.1), 8, params)

    def loss(trained, frozen, batch, count, key):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(trained)), jnp.float32(1)

    one = jax.jit(step.make(loss, optimizer, lambda _: 0.1, 0, 1, ema_decay=decay))
    state, batch = step.init(optimizer, params, ema=True), {"mask": jnp.ones((1, 1))}
    want = draw(0)
    for t in range(5):
        state, _ = one(state, None, batch)
        d, now = min(decay, (1 + t) / (10 + t)), trees.flatten(state.params)
        want = {path: d * want[path] + (1 - d) * np.asarray(now[path], np.float64) for path in want}
        for path, got in trees.flatten(state.ema).items():
            np.testing.assert_allclose(got, want[path], rtol=1e-4)
    assert step.init(optimizer, params).ema is None and step.init(optimizer, params).eval_params is params
    half = step.init(optimizer, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), ema=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.ema)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.eval_params)} == {"bfloat16"}


@pytest.mark.parametrize("kind", KINDS)
def test_width_transfer_scales_rates_as_table_8_says(tiny, kind):
    power = {"adamw": (1, 0), "lion": (1, 0), "adafactor": (1, 0), "muon": (0.5, 0), "sgd": (0, -1)}[kind]
    params, made = tree(draw(0)), []
    for ratio in (1.0, 0.25):
        optimizer = optim.make(plain(tiny, kind=kind), 8, params, ratio)
        made.append(trees.flatten(optimizer.update(tree(draw(1)), optimizer.init(params), params)[0]))
    for path in SHAPES:
        want = made[0][path] * 0.25 ** (power[0] if path == QUERY else power[1])
        np.testing.assert_allclose(made[1][path], want, rtol=1e-5)


def test_width_transfer_leaves_the_decay_alone(tiny):
    params = tree(draw(0))
    optimizer = optim.make(plain(tiny, weight_decay=0.1), 8, params, 0.25)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(trees.flatten(updates)[QUERY], -0.5 * 0.1 * draw(0)[QUERY], rtol=1e-5)


def test_width_transfer_scales_the_logits(make):
    plain_model, params = make()
    scaled, _ = make(base_width=8)
    tokens = jnp.arange(6)[None]
    apply = lambda model: jax.jit(lambda p: model.apply({"params": p}, tokens))(params)  # noqa: E731
    np.testing.assert_allclose(apply(scaled), 0.25 * apply(plain_model), rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match="requires model.scale_embeddings=False"):
        make(base_width=8, scale_embeddings=True)


# Every loss and optimizer once, except those of tests/parallel (AdamW with cross-entropy) and SGD, whose state is one
# tree, as Lion's.
@pytest.mark.parametrize(
    ("kind", "loss"),
    [("lion", "distillation"), ("adafactor", "entmax"), ("muon", "unlikelihood"), ("adamw", "dpo")],
)
def test_on_a_mesh_all_are_split_and_give_the_losses_of_one_device(simulated, kind, loss):
    one_device, mesh, split = simulated(4)(on_mesh.compare, kind, loss)
    np.testing.assert_allclose(one_device, mesh, rtol=2e-3)
    assert split > 0.7  # the rest: norms, counts, and what an axis of size 1 cannot split


def test_rates_follow_the_rules(tiny):
    rules = ((r"layers/\d/attention/.*", 0.25), (r"layers/.*", 0.0), (r".*", 2.0))
    config = plain(tiny, kind="sgd", lr=1.0, beta1=0.0, lr_rules=rules, weight_decay=0.5)
    params = tree(draw(0))
    optimizer = optim.make(config, 8, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    got = trees.flatten(updates)
    np.testing.assert_allclose(got[QUERY], -0.25 * (1 + 0.5 * draw(0)[QUERY]), rtol=1e-5)  # decay is a part of it
    np.testing.assert_array_equal(got[NORM], 0)
    np.testing.assert_allclose(got[TABLE], -2.0, rtol=1e-5)  # embeddings do not decay


def test_schedules_are_their_formulas(tiny):
    config = plain(tiny, lr=2.0, warmup_steps=10, schedule="wsd", final_lr_fraction=0.1, decay_fraction=0.25)
    rate = optim.schedule(config, 100)
    want = [2 * min(1, (t + 1) / 10) * (1 - 0.9 * max(0, t - 75) / 25) for t in range(101)]
    np.testing.assert_allclose([rate(t) for t in range(101)], want, rtol=1e-5)
    rate = optim.schedule(dataclasses.replace(config, schedule="inverse_sqrt"), 100)
    want = [2 * min((t + 1) / 10, (10 / (t + 1)) ** 0.5) for t in range(101)]
    np.testing.assert_allclose([rate(t) for t in range(101)], want, rtol=1e-5)
    rate = optim.schedule(dataclasses.replace(config, schedule="inverse_sqrt", warmup_steps=0), 100)
    np.testing.assert_allclose([rate(t) for t in range(101)], [2 * (t + 1) ** -0.5 for t in range(101)], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "adam"}, "config key 'optim.kind' is 'adam'; expected one of adafactor, adamw, lion, muon, sgd"),
        ({"schedule": "step"}, "config key 'optim.schedule' is 'step'; expected one of constant, cosine"),
        ({"schedule": "wsd", "decay_fraction": 0.9, "warmup_steps": 4}, "optim.decay_fraction=0.9 of 8 steps"),
        ({"lr_rules": ((r".*/head", 2.0), (r".*", 1.0))}, "optim.lr_rules: the rule '.*/head' matches no parameter"),
        ({"lr_rules": ((r"embed/.*", 2.0),)}, "optim.lr_rules: no rule matches the parameter 'layers/0/"),
        ({"lr_rules": ((r".*", "fast"),)}, "optim.lr_rules: 'fast' is not a factor"),
        ({"lr_rules": ((r".*", -1.0),)}, "optim.lr_rules: -1.0 is not a factor"),
        ({"weight_decay": 1.0, "decay_rules": ((r".*", float("inf")),)}, "optim.decay_rules: inf is not a factor"),
    ],
)
def test_invalid_optimizer_options_are_rejected(tiny, changes, message):
    with pytest.raises(UserError) as error:
        optim.make(plain(tiny, **changes), 8, tree(draw(0)))
    assert message in str(error.value) and "\n" not in str(error.value)
