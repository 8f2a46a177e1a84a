"""MiniLM with a classification head on film reviews: frozen, LoRA, full. L14.

The features of a sentence are the mean over its tokens; the head is linear and starts at zero. Sentences are padded or
truncated to 48 tokens. One epoch of 2,000 training sentences in batches of 32, 50 epochs for the head on frozen
features; 1,000 test sentences. The learning rates are usual values that were not tuned.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import padded
from llm_jax import checkpoints, cli, configuration, lora
from llm_jax.data.labelled import LabelledSource
from llm_jax.embeddings import contextual
from llm_jax.intervals import Interval, wilson
from llm_jax.research import experiments, findings, verdicts
from llm_jax.research.findings import Figures, Finding
from llm_jax.training import losses, memory

LENGTH, BATCH = 48, 32
KINDS = {"frozen": 1e-2, "LoRA r=8": 1e-3, "full": 1e-4}  # with their learning rates

flags.DEFINE_integer("seeds", 3, "models of each kind")
flags.DEFINE_integer(
    "sentences", 2000, "maximum number of training sentences; half as many are test sentences", lower_bound=BATCH
)
flags.DEFINE_integer("rounds", 50, "epochs with frozen features", lower_bound=1)


def main() -> None:
    f = flags.FLAGS
    loaded = checkpoints.load("asset:minilm-l6-v2", scan_layers=True)

    def encoded(asset: str, part: str, count: int) -> dict[str, jax.Array]:
        """Token ids and mask, see `padded.pad`, and labels (N,)."""
        data = configuration.load("sentiment_lora", {"data.source": f"asset:{asset}"}).data
        sentences = LabelledSource(data).parts[part][:count]
        tokens, mask = padded.pad([contextual.ids(loaded, s.text) for s in sentences], LENGTH)
        arrays = {"tokens": tokens, "mask": mask, "labels": np.asarray([s.label for s in sentences], np.int32)}
        return jax.tree.map(jnp.asarray, arrays)

    parts = [encoded("movie-reviews", "train", f.sentences)]
    parts += [encoded(asset, "test", f.sentences // 2) for asset in ("movie-reviews", "amazon-reviews")]
    root = experiments.directory(f.runs, f.sentences, f.rounds)
    figures, origins = experiments.measure(root, KINDS, f.seeds, functools.partial(train, loaded, parts))
    print(experiments.publish(__file__, [judge(figures, f.seeds)], table(figures), origins=origins))


def train(loaded: checkpoints.Loaded, parts: list[dict[str, jax.Array]], kind: str, seed: int) -> dict[str, Any]:
    """Accuracies, number of trained parameters, seconds a step, and bytes of the compiled step of a model."""
    model, base, _ = loaded
    # The trained part of the encoder, and (trained, base) -> all weights.
    encoder: Any = {}
    weights: Any = lambda trained, base: base  # noqa: E731
    if kind == "full":
        encoder = jax.tree.map(jnp.copy, base)  # a step takes its arguments' place
        weights = lambda trained, base: trained  # noqa: E731
    elif kind == "LoRA r=8":
        settings = dataclasses.replace(configuration.default().lora, rank=8, alpha=16.0)
        encoder, fixed = lora.split(lora.init(jax.random.key(seed), base, settings), settings.variant)
        weights = lambda trained, base: lora.attach(base, lora.join(trained, fixed))  # noqa: E731

    def features(encoder: Any, base: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        if "features" in rows:
            return rows["features"]
        return padded.mean_features(model, weights(encoder, base), rows["tokens"], rows["mask"])

    def logits(state: Any, base: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        return features(state["encoder"], base, rows) @ state["head"]["kernel"] + state["head"]["bias"]

    def in_parts(function: Any, argument: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        starts = range(0, len(rows["labels"]), 100)
        slices = [jax.tree.map(lambda a, i=i: a[i : i + 100], rows) for i in starts]
        return jnp.concatenate([function(argument, base, some) for some in slices])

    if kind == "frozen":
        compute = jax.jit(features)
        parts = [rows | {"features": in_parts(compute, encoder, rows)} for rows in parts]
    training, *tests = parts
    count, rounds = len(training["labels"]), flags.FLAGS.rounds if kind == "frozen" else 1
    schedule = optax.linear_schedule(KINDS[kind], 0.0, rounds * (count // BATCH))
    optimizer = optax.adamw(schedule, weight_decay=0.0)

    def loss(state: Any, base: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        return jnp.mean(losses.cross_entropy(logits(state, base, rows), rows["labels"]))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state: Any, moments: Any, base: Any, rows: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        updates, moments = optimizer.update(jax.grad(loss)(state, base, rows), moments, state)
        return optax.apply_updates(state, updates), moments

    state: Any = {"encoder": encoder, "head": {"kernel": jnp.zeros((model.config.width, 2)), "bias": jnp.zeros(2)}}
    moments, times = jax.jit(optimizer.init)(state), []
    compiled = step.lower(state, moments, base, jax.tree.map(lambda a: a[:BATCH], training)).compile()
    random = np.random.RandomState(seed)
    for _ in range(rounds):
        for indices in random.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH):
            began = time.perf_counter()
            rows = jax.tree.map(lambda a, indices=indices: a[indices], training)
            state, moments = jax.block_until_ready(compiled(state, moments, base, rows))
            times.append(time.perf_counter() - began)
    predict = jax.jit(logits)
    films, products = (int(jnp.sum(jnp.argmax(in_parts(predict, state, rows), -1) == rows["labels"])) for rows in tests)
    return {
        "right": films,
        "products right": products,
        "count": len(tests[0]["labels"]),
        "accuracy": films / len(tests[0]["labels"]),
        "bytes of a step": memory.of_executable(compiled, 0).peak,
        "trained": sum(x.size for x in jax.tree.leaves(state)),
        "seconds a step": float(np.median(times)),
        "cut": float(np.mean(np.asarray(training["mask"])[:, -1])),
    }


def judge(figures: Figures, seeds: int) -> Finding:
    """The verdict by the rule of statements.toml."""
    gains = findings.differences(figures, "accuracy", "frozen", 100)
    verdict = verdicts.all_above(list(gains.values())) if seeds >= 3 else "untested here (wants three seeds)"
    measure = "test accuracy minus that of a head on frozen features, points"
    return findings.finding("L14", measure, gains, verdict, n=seeds)


def table(figures: Figures) -> list[str]:
    def share(runs: findings.Runs, name: str) -> Interval:  # of the first seed's test sentences, in percent
        right, count = runs[0][name], runs[0]["count"]
        return Interval(*(100 * x for x in (right / count, *wilson(right, count))))

    columns = {
        "accuracy, % (95 % over seeds)": findings.interval("accuracy", 1, 100),
        "one seed's (Wilson)": lambda runs: "{1:.1f} to {2:.1f}".format(*share(runs, "right")),
        "product reviews, % (one seed's)": lambda runs: findings.interval_text(share(runs, "products right"), 1),
        "trained": findings.first("trained", ","),
        "of these MiB": findings.first("trained", ".2f", 4 / 2**20),
        "seconds a step": lambda runs: f"{np.median([run['seconds a step'] for run in runs]):.3f}",
        "memory of a step, MiB": findings.first("bytes of a step", ",.0f", 2**-20),
    }
    note = f"{100 * figures['full'][0]['cut']:.1f} % of the training sentences have {LENGTH} tokens or more."
    return ["", *findings.condition_table("kind", figures, columns), "", note]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"seeds": 2, "sentences": 64, "rounds": 1}))
