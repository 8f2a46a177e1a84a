"""Is the tail of a model's distribution too heavy, and does the loss make it so? D3, D6.

A small decoder is trained on text whose distribution is known, and compared with it.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import decoders
from llm_jax import cli, configuration
from llm_jax.data.rows import NAMES
from llm_jax.intervals import mean
from llm_jax.model.transformer import Transformer
from llm_jax.research import experiments, findings
from llm_jax.research.findings import Figures, Finding
from llm_jax.training import losses
from llm_jax.training.setup import setup

VOCAB, LENGTH, BATCH, RECENT, RARE = 96, 64, 16, 8, 0.01
BASELINE = "cross-entropy"
LOSSES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "unlikelihood": {"kind": "unlikelihood", "unlikelihood": 1.0},
    "entmax 1.5": {"kind": "entmax"},
}
FIGURES = {
    "tail": "mass of rare tokens, minus the truth",
    "impossible": "mass of tokens that never come",
    "recent": "mass of the last 8 tokens, minus the truth",
    "distance": "total variation distance to the truth",
}

flags.DEFINE_integer("seeds", 3, "number of sources, each with its own models", lower_bound=2)
flags.DEFINE_integer("steps", 400, "training steps", lower_bound=1)
flags.DEFINE_integer("width", 48, "width of the model")


def main() -> None:
    f = flags.FLAGS
    root = experiments.directory(f.runs, f.width, f.steps)
    figures, origins = experiments.measure(root, LOSSES, f.seeds, train_and_compare)
    lines = ["", *findings.condition_table("loss", figures, {title: half_width(n) for n, title in FIGURES.items()})]
    print(experiments.publish(__file__, judge(figures), lines, origins=origins))


def source(key: jax.Array) -> jax.Array:
    """Next-token probabilities float32 (VOCAB, VOCAB): rank^-1.5 for a third of the tokens, in random order, else 0."""
    ranks = jnp.argsort(jax.random.uniform(key, (VOCAB, VOCAB)), axis=-1) + 1.0
    p = jnp.where(ranks <= VOCAB // 3, ranks**-1.5, 0.0)
    return p / jnp.sum(p, -1, keepdims=True)


def texts(key: jax.Array, p: jax.Array, count: int) -> jax.Array:
    """Random texts of the source `p`, int32 (count, LENGTH + 1)."""
    first, rest = jax.random.split(key)

    def step(last: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = jax.random.categorical(key, jnp.log(p)[last])
        return new, new

    start = jax.random.randint(first, (count,), 0, VOCAB)
    _, more = jax.lax.scan(step, start, jax.random.split(rest, LENGTH))
    return jnp.concatenate([start[:, None], more.T], 1).astype(jnp.int32)


def train_and_compare(loss: str, seed: int) -> dict[str, float]:
    """The figures of a model that is trained with a loss on text of the source of a seed."""
    f = flags.FLAGS
    model = {"vocab_size": VOCAB, "width": f.width, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4}
    # AdamW with decay of all weights and a cosine to zero, without warm-up and clipping.
    optim = {"lr": 3e-3, "warmup_steps": 0, "final_lr_fraction": 0.0, "beta2": 0.999, "clip_norm": 0.0}
    changes = {
        "model": model | {"mlp_dim": 2 * f.width},
        "loss": LOSSES[loss],
        "optim": optim | {"weight_decay": 0.01, "decay_rules": ((".*", 1.0),)},
        "train": {"steps": f.steps, "batch_size": BATCH, "seq_len": LENGTH, "loss_chunk": 0},
    }
    parts = setup(configuration.load("default", changes))
    for_source, for_model, for_training, for_test = jax.random.split(jax.random.key(seed), 4)
    p = source(for_source)

    def batch(key: jax.Array) -> dict[str, jax.Array]:
        ids = texts(key, p, BATCH)
        ones = jnp.ones_like(ids[:, 1:])
        columns = (ids[:, :-1], ids[:, 1:], jnp.cumsum(ones, -1) - 1, ones, ones)
        return dict(zip(NAMES, columns, strict=True))

    initial = jax.jit(parts.model.init)(for_model, jnp.zeros((1, 1), jnp.int32))["params"]
    params = decoders.train(parts, initial, batch, for_training)
    probabilities = losses.entmax15 if loss.startswith("entmax") else jax.nn.softmax
    compared = jax.jit(lambda params: compare(parts.model, params, p, for_test, probabilities))(params)
    return {name: float(value) for name, value in compared.items()}


def compare(model: Transformer, params: Any, p: jax.Array, key: jax.Array, probabilities: Any) -> dict[str, jax.Array]:
    """The figures of a model, means over the tokens from the 16th on of 64 new texts."""
    ids = texts(key, p, 64)[:, :-1]
    q, truth = probabilities(model.apply({"params": params}, ids)), p[ids]
    before = jnp.stack([jnp.roll(ids, i, 1) for i in range(RECENT)], -1)
    recent = jnp.max(jax.nn.one_hot(before, VOCAB), 2)
    figures = {
        "tail": jnp.sum(jnp.where(truth < RARE, q - truth, 0), -1),
        "impossible": jnp.sum(jnp.where(truth == 0, q, 0), -1),
        "recent": jnp.sum(recent * (q - truth), -1),
        "distance": 0.5 * jnp.sum(jnp.abs(q - truth), -1),
    }
    return {name: jnp.mean(value[:, 16:]) for name, value in figures.items()}


def half_width(name: str) -> Callable[[findings.Runs], str]:
    """A column: the mean of a figure over the seeds, and half of its interval."""

    def cell(runs: findings.Runs) -> str:
        estimate, _, high = mean([run[name] for run in runs])
        return f"{estimate:.4f} ± {high - estimate:.4f}"

    return cell


def growth() -> list[float]:
    """Increments of the cross-entropy as the right token's score falls from 0 to -20, one at a time."""
    logits = jnp.zeros((21, VOCAB)).at[:, 0].set(-jnp.arange(21.0))
    return np.diff(np.asarray(losses.cross_entropy(logits, jnp.zeros(21, jnp.int32)))).tolist()


def judge(figures: Figures) -> list[Finding]:
    """The verdicts by the rules of statements.toml."""
    masses, excess = (findings.means(figures, name) for name in ("tail", "recent"))
    tail, recent = (findings.differences(figures, name, BASELINE) for name in ("tail", "recent"))
    exponential = all(after >= 1.5 * before for before, after in itertools.pairwise(growth()))
    lighter, rarer = ([loss for loss, x in less.items() if x.high < 0] for less in (tail, recent))
    repeats = excess[BASELINE].low > 0.005
    parts = [
        f"the growth is {'exponential' if exponential else 'not exponential (at most 1 a step: linear)'}",
        f"a lighter tail with {' and '.join(lighter) or 'none'}",
        f"repetition {'is in excess' if repeats else 'is not in excess'}, less with {' and '.join(rarer) or 'none'}",
    ]
    d3 = "holds" if masses[BASELINE].low > 0.005 else "fails"
    d6 = f"{'holds' if exponential and lighter and repeats and rarer else 'fails'}: {'; '.join(parts)}"
    differences = tail | {f"{loss}, last 8 tokens": x for loss, x in recent.items()}
    rows = [
        ("D3", "mass of tokens of probability below .01, minus the truth", masses, d3),
        ("D6", "the same, minus that of cross-entropy", differences, d6),
    ]
    return [findings.finding(*row, n=len(figures[BASELINE])) for row in rows]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"seeds": 2, "steps": 4, "width": 16}))
