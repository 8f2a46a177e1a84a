"""Every loss against its paper's formula in numpy float64, whole and in chunks, micro-batches and on a mesh."""

import dataclasses
import json
import shutil

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import checkpoints
from llm_jax import configuration as config_lib
from llm_jax.errors import UserError
from llm_jax.model.attention import TokenMetadata
from llm_jax.tokenizers.byte import ByteTokenizer
from llm_jax.tokenizers.char import CharTokenizer
from llm_jax.training import losses, step

KINDS = losses.KINDS
EXTRAS = {"cross_entropy": {"z_loss": 0.1, "label_smoothing": 0.2}, "unlikelihood": {"unlikelihood": 0.7}}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entmax_by_bisection(z):
    """1.5-entmax of one row."""
    low, high = z.max() / 2 - 1, z.max() / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.maximum(z / 2 - middle, 0) ** 2).sum() > 1 else (low, middle)
    return np.maximum(z / 2 - low, 0) ** 2


rows = arrays.arrays(np.float32, draws.integers(1, 60), elements=draws.floats(-30, 30, width=32))


@hypothesis.settings(max_examples=60)
@hypothesis.given(rows)
def test_entmax_is_that_of_bisection(z):
    padded = np.concatenate([z, np.full(60 - len(z), -1e9, np.float32)])  # one shape: one compilation
    np.testing.assert_allclose(
        jax.jit(losses.entmax15)(padded)[: len(z)], entmax_by_bisection(z.astype(float)), atol=2e-6
    )


@pytest.mark.parametrize("size", [1, 2, 2**16])
def test_entmax_of_equal_logits_is_uniform(size):
    p = losses.entmax15(jnp.full((1, size), 3.0, jnp.bfloat16))
    assert p.dtype == jnp.float32
    np.testing.assert_allclose(p * size, 1, rtol=1e-4)


@hypothesis.settings(max_examples=30)
@hypothesis.given(rows, draws.integers(0, 59))
def test_the_entmax_loss_and_its_gradient(z, target):
    target %= len(z)
    padded = np.concatenate([z, np.full(60 - len(z), -1e9, np.float32)])
    value, gradient = jax.jit(jax.value_and_grad(losses.entmax_loss))(padded, target)
    p, onehot = entmax_by_bisection(z.astype(float)), np.eye(len(z))[target]
    want = ((p - onehot) * z).sum() + (p * (1 - p**0.5)).sum() / (1.5 * 0.5)
    np.testing.assert_allclose(value, want, atol=1e-4)
    np.testing.assert_allclose(gradient[: len(z)], p - onehot, atol=2e-6)
    assert value > -1e-5


def numpy_loss(kind, logits, other, batch):
    """(sum, count) in float64 loops over tokens."""
    inputs, targets, segments, mask = (np.asarray(batch[k]) for k in ("inputs", "targets", "segments", "mask"))
    total, scores = 0.0, np.zeros((2, len(inputs)))
    for b, t in np.argwhere(mask):
        z, y, teacher = logits[b, t], targets[b, t], other[b, t]
        p = softmax(z)
        scores[:, b] += np.log(p[y]), np.log(softmax(teacher)[y])
        if kind == "cross_entropy":
            q = 0.8 * np.eye(len(z))[y] + 0.2 / len(z)
            total += -(q * np.log(p)).sum() + 0.1 * np.log(np.exp(z).sum()) ** 2
        elif kind == "unlikelihood":
            context = {inputs[b, s] for s in range(t + 1) if segments[b, s] == segments[b, t]} - {y}
            total += -np.log(p[y]) - 0.7 * sum(np.log(1 - p[c]) for c in context)
        elif kind == "entmax":
            q = entmax_by_bisection(z)
            total += (q * z).sum() - z[y] + (q - q**1.5).sum() / 0.75
        elif kind == "distillation":
            q, r = softmax(teacher / 2), softmax(z / 2)
            total += 0.5 * -np.log(p[y]) + 0.5 * 4 * (q * np.log(q / r)).sum()
    if kind != "dpo":
        return total, mask.sum()
    ratios = scores[0] - scores[1]
    pairs = [i for i in range(0, len(inputs), 2) if mask[i : i + 2].any()]
    return sum(np.log1p(np.exp(-0.1 * (ratios[i] - ratios[i + 1]))) for i in pairs), len(pairs)


@pytest.fixture(scope="module")
def make(make):
    """make() -> (a model of one layer, its parameters): losses depend on its output alone."""
    return lambda: make(num_layers=1, scan_layers=False)


@pytest.fixture(scope="module")
def other(make):
    model, _ = make()
    return jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.fixture
def batch(batch):
    """Ids out of 30, so that they come again; the last pair of rows is padding."""
    ids = {name: batch[name] % 30 for name in ("inputs", "targets")}
    return batch | ids | {"mask": without(batch, slice(6, None))}


def without(batch, rows):
    """The mask of a batch in which these rows do not count."""
    mask = batch["mask"].copy()
    mask[rows] = 0
    return mask


def built(tiny, model, kind, chunk=0, sparse=False):
    config = dataclasses.replace(tiny.loss, kind=kind, **EXTRAS.get(kind, {}))
    other = model if kind in ("distillation", "dpo") else None
    return losses.make(config, model, chunk, other, sparse=sparse), config


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_that_of_numpy_whole_in_chunks_and_in_micro_batches(make, tiny, other, batch, kind):
    model, params = make()
    where = TokenMetadata(batch["positions"], batch["segments"])
    apply = jax.jit(lambda p: model.apply({"params": p}, batch["inputs"], where))
    logits, others = (np.asarray(apply(p), np.float64) for p in (params, other))
    want = numpy_loss(kind, logits, others, batch)
    gradients = []
    for chunk in (0, 8):
        loss, _ = built(tiny, model, kind, chunk)
        one = jax.jit(
            jax.value_and_grad(lambda p, loss=loss: loss(p, {"reference": other}, batch, 0, None), has_aux=True)
        )
        (total, count), gradient = one(params)
        np.testing.assert_allclose([total, count], want, rtol=2e-5)
        gradients.append(gradient)
    # Chunks of the targets that count, in two micro-batches: the update is the gradient of the mean.
    loss, config = built(tiny, model, kind, 8, sparse=True)
    optimizer = optax.sgd(1.0)
    update = step.make(loss, optimizer, lambda _: 1.0, 0, 2, rows_together=losses.rows_together(config))
    state, metrics = jax.jit(update)(step.init(optimizer, params), {"reference": other}, batch)
    gradients.append(jax.tree.map(lambda old, new: (np.float64(old) - new) * want[1], params, state.params))
    for other_way in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients[0], other_way)
    norm = optax.tree.norm(gradients[0])
    expected = [want[0] / want[1], norm / want[1], batch["mask"].sum()]
    np.testing.assert_allclose([metrics[k] for k in ("loss", "grad_norm", "tokens")], expected, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_of_16_bits_have_the_loss_and_gradients_of_their_float32_values(smoothing):
    logits = jax.random.normal(jax.random.key(0), (3, 5, 11), jnp.bfloat16) * 4
    targets = jax.random.randint(jax.random.key(1), (3, 5), 0, 11)

    def total(logits):
        return jnp.sum(losses.smoothed(logits, targets, smoothing, 1e-3))

    expected, slope = jax.jit(jax.value_and_grad(total))(logits.astype(jnp.float32))
    value, gradient = jax.jit(jax.value_and_grad(total))(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient.astype(jnp.float32), slope, rtol=2**-8, atol=2**-9)


def test_chunks_in_which_nothing_counts_are_not_computed():
    mask = np.zeros((2, 32), np.int32)
    mask[0, [3, 30]] = mask[1, 17] = 1  # in four chunks of 8, and after sorting in one
    tokens = {"mask": jnp.asarray(mask), "x": jnp.arange(64.0).reshape(2, 32)}

    def part(some):
        number = jnp.sum(some["x"] * some["mask"], -1)
        return jnp.where(jnp.any(some["mask"]), number, jnp.nan)

    np.testing.assert_array_equal(jax.jit(lambda t: losses.sum_of_rows(part, 8, t, True))(tokens), [33, 49])
    assert np.all(np.isnan(losses.sum_of_rows(part, 4, tokens)))


def test_distillation_starts_at_0_for_the_teacher_and_dpo_at_log_2(make, tiny, batch):
    """A student that is its teacher diverges by nothing; a policy that is its reference loses log 2 a pair."""
    model, params = make()
    loss, config = built(tiny, model, "distillation")
    loss = losses.make(dataclasses.replace(config, teacher_weight=1.0), model, 0, model)
    gradient, _ = jax.jit(jax.grad(lambda p: loss(p, {"reference": params}, batch, 0, None), has_aux=True))(params)
    assert float(optax.tree.norm(gradient)) < 1e-3
    loss, _ = built(tiny, model, "dpo")
    total, count = jax.jit(lambda p: loss(p, {"reference": p}, batch, 0, None))(params)
    np.testing.assert_allclose([total, count], [3 * np.log(2), 3], rtol=1e-6)


def test_dpo_comes_to_prefer_the_chosen_rows(make, tiny, batch):
    model, params = make()
    loss, _ = built(tiny, model, "dpo")
    optimizer = optax.sgd(1.0)
    one = jax.jit(step.make(loss, optimizer, lambda _: 1.0, 0, 1))
    scores = jax.jit(lambda p: -losses.row_losses(model, p, batch, 0))
    state, frozen = step.init(optimizer, params), {"reference": params}
    for _ in range(3):
        state, _ = one(state, frozen, batch)
    gain = np.asarray(scores(state.params) - scores(params)).reshape(-1, 2)[:3]
    assert (gain[:, 0] > gain[:, 1]).all()
    preferences = jax.jit(lambda params, other, batch: losses.preferences(model, params, model, other, batch, 0.5, 0))
    measured = preferences(state.params, params, batch)
    np.testing.assert_allclose(measured, [3, 0.5 * (gain[:, 0] - gain[:, 1]).sum(), 3], rtol=1e-4)
    halved = batch | {"mask": without(batch, 1)}  # a pair of which one row counts is no pair
    assert tuple(map(int, preferences(params, state.params, halved)[::2])) == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.kind": "focal"}, "config key 'loss.kind' is 'focal'; expected one of cross_entropy, distillation"),
        ({"loss.kind": "entmax", "loss.z_loss": 0.1}, "loss.z_loss=0.1 has no effect with loss.kind=entmax"),
        (
            {"loss.kind": "dpo", "loss.label_smoothing": 0.1},
            "loss.label_smoothing=0.1 has no effect with loss.kind=dpo",
        ),
        (
            {"loss.teacher": "runs/x"},
            "loss.teacher=runs/x is used by loss.kind=distillation only, not by cross_entropy",
        ),
        ({"loss.kind": "distillation"}, "loss.kind=distillation needs a checkpoint: set loss.teacher"),
        ({"loss.kind": "dpo"}, "set init_from"),
        ({"loss.kind": "dpo", "init_from": "x", "train.batch_size": 3}, "train.batch_size=3 is odd"),
        ({"train.loss_chunk": 5}, "config key 'train.loss_chunk' is 5; it must divide train.seq_len=32"),
        ({"loss.label_smoothing": 1.5}, "config key 'loss.label_smoothing' is 1.5; expected a number of at most 1.0"),
    ],
)
def test_what_contradicts_itself_is_refused(tiny, changes, message):
    mapping = config_lib.as_dict(tiny)
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        (mapping[sections[0]] if sections else mapping)[key] = value
    with pytest.raises(UserError) as error:
        losses.check(config_lib.build(mapping))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_another_vocabulary_is_refused(tiny):
    mine, foreign = ByteTokenizer(), CharTokenizer.train(["abc"], 10)
    with pytest.raises(
        UserError, match=r"runs/t: its vocabulary \(259 ids, .*\) differs from the vocabulary of the run \(259 ids, "
    ):
        losses.check_reference("runs/t", tiny.model, tiny.model, foreign, mine)
    losses.check_reference("runs/t", tiny.model, tiny.model, mine, mine)
    larger = dataclasses.replace(tiny.model, vocab_size=512)
    with pytest.raises(UserError, match="512 ids"):
        losses.check_reference("runs/t", larger, tiny.model, mine, mine)


def test_a_run_learns_from_a_teacher_and_is_its_average(command, trained, tmp_path):
    """From the command line: the figures are those of the average, and another teacher is noticed."""
    teacher, workdir = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(trained, teacher)
    flags = (
        f"--workdir={workdir}", "--config.loss.kind=distillation", f"--config.loss.teacher={teacher}",
        "--config.optim.ema_decay=0.9",
    )  # fmt: skip
    command("train", *flags)
    found = json.loads((workdir / "summary.json").read_text())["validation_loss"]
    text = command("evaluate", f"--checkpoint={workdir}", "--json").stdout
    assert json.loads(text)["loss"] == pytest.approx(found, rel=1e-5)
    record = checkpoints.verify(checkpoints.find(workdir))
    assert sorted(record["ema"]) == sorted(record["params"])
    shutil.rmtree(teacher / "checkpoints" / "8")
    done = command("train", *flags, "--config.train.steps=9", code=2)
    assert f"{teacher}: its weights have changed since {workdir} was started" in done.stderr
