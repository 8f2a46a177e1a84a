"""MiniLM with a classification head on film reviews: frozen, LoRA, full. L14.

The features of a sentence are the mean over its tokens; the head is linear and starts at zero. Sentences are padded or
truncated to 48 tokens. One epoch of 2,000 training sentences in batches of 32, 50 epochs for the head on frozen
features; 1,000 test sentences. The learning rates are usual values that were not tuned.
"""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from llm_jax import checkpoints, cli, configuration
from llm_jax.data.labelled import LabelledSource
from llm_jax.embeddings import contextual
from llm_jax.intervals import Interval, wilson
from llm_jax.model.attention import TokenMetadata
from llm_jax.research import experiments, findings, verdicts
from llm_jax.research.findings import Figures, Finding
from llm_jax.training import losses, memory, step, trainable

MODEL, LENGTH, BATCH = "asset:minilm-l6-v2", 48, 32
# Learning rates, and overrides of the configuration.
KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "frozen": (1e-2, {}),
    "LoRA r=8": (1e-3, {"lora.rank": 8, "lora.alpha": 16.0, "init_from": MODEL}),
    "full": (1e-4, {}),
}

flags.DEFINE_integer("seeds", 3, "models of each kind")
flags.DEFINE_integer(
    "sentences", 2000, "maximum number of training sentences; half as many are test sentences", lower_bound=BATCH
)
flags.DEFINE_integer("rounds", 50, "epochs with frozen features", lower_bound=1)


def main() -> None:
    f = flags.FLAGS
    loaded = checkpoints.load(MODEL, scan_layers=True)

    def encoded(asset: str, part: str, count: int) -> dict[str, jax.Array]:
        """Token ids, mask and segments, int32 (N, LENGTH), and labels, int32 (N,)."""
        data = configuration.load("sentiment_lora", {"data.source": f"asset:{asset}"}).data
        sentences = LabelledSource(data).parts[part][:count]
        ids = [contextual.ids(loaded, s.text)[:LENGTH] for s in sentences]
        mask = [[1] * len(row) + [0] * (LENGTH - len(row)) for row in ids]
        arrays = {
            "tokens": [row + [0] * (LENGTH - len(row)) for row in ids],
            "mask": mask,
            "segments": mask,
            "labels": [s.label for s in sentences],
        }
        return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}

    parts = [encoded("movie-reviews", "train", f.sentences)]
    parts += [encoded(asset, "test", f.sentences // 2) for asset in ("movie-reviews", "amazon-reviews")]
    root = experiments.directory(f.runs, f.sentences, f.rounds)
    figures, origins = experiments.measure(root, KINDS, f.seeds, functools.partial(train, loaded, parts))
    print(experiments.publish(__file__, [judge(figures, f.seeds)], table(figures), origins=origins))


def train(loaded: checkpoints.Loaded, parts: list[dict[str, jax.Array]], kind: str, seed: int) -> dict[str, Any]:
    """Accuracies, number of trained parameters, seconds per step, and bytes of the compiled step of a model."""
    model, base, _ = loaded
    rate, changes = KINDS[kind]
    method = trainable.training_method(configuration.load("default", changes))
    encoder: Any = {}
    frozen = base
    if kind != "frozen":  # a step takes the place of its arguments, so the weights are copied
        encoder, constants = method.init(jax.tree.map(jnp.copy, base), jax.random.key(seed))
        frozen = method.freeze(base, constants)

    def features(encoder: Any, frozen: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        """The mean of the features over the tokens, (B, D)."""
        params = method.model_params(encoder, frozen) if encoder else frozen
        metadata = TokenMetadata(jnp.arange(LENGTH) * rows["mask"], rows["mask"])
        x_BTD, _ = model.apply({"params": params}, rows["tokens"], metadata, method="features")
        return jnp.sum(x_BTD * rows["mask"][..., None], 1) / jnp.sum(rows["mask"], 1, keepdims=True)

    def logits(params: Any, frozen: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        x_BD = rows["features"] if "features" in rows else features(params["encoder"], frozen, rows)
        return x_BD @ params["head"]["kernel"] + params["head"]["bias"]

    def in_parts(function: Any, argument: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        starts = range(0, len(rows["labels"]), 100)
        slices = [jax.tree.map(lambda a, i=i: a[i : i + 100], rows) for i in starts]
        return jnp.concatenate([function(argument, frozen, some) for some in slices])

    if kind == "frozen":
        compute = jax.jit(features)
        parts = [rows | {"features": in_parts(compute, encoder, rows)} for rows in parts]
    training, *tests = parts
    count, rounds = len(training["labels"]), flags.FLAGS.rounds if kind == "frozen" else 1
    schedule = optax.linear_schedule(rate, 0.0, rounds * (count // BATCH))
    optimizer = optax.adamw(schedule, weight_decay=0.0)

    def loss(params: Any, frozen: Any, rows: Mapping[str, jax.Array], *_: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(losses.cross_entropy(logits(params, frozen, rows), rows["labels"])), jnp.float32(BATCH)

    head = {"kernel": jnp.zeros((model.config.width, 2)), "bias": jnp.zeros(2)}
    state = jax.jit(functools.partial(step.init, optimizer))({"encoder": encoder, "head": head})
    update = jax.jit(step.make(loss, optimizer, schedule, seed, grad_accumulation=1), donate_argnums=0)
    compiled = update.lower(state, frozen, jax.tree.map(lambda a: a[:BATCH], training)).compile()
    times = []
    random = np.random.RandomState(seed)
    for _ in range(rounds):
        for indices in random.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH):
            began = time.perf_counter()
            rows = jax.tree.map(lambda a, indices=indices: a[indices], training)
            state, _ = jax.block_until_ready(compiled(state, frozen, rows))
            times.append(time.perf_counter() - began)
    predict = jax.jit(logits)
    correct = [jnp.sum(jnp.argmax(in_parts(predict, state.params, rows), -1) == rows["labels"]) for rows in tests]
    films, products = map(int, correct)
    return {
        "right": films,
        "products right": products,
        "count": len(tests[0]["labels"]),
        "accuracy": films / len(tests[0]["labels"]),
        "bytes of a step": memory.of_executable(compiled, 0).peak,
        "trained": sum(x.size for x in jax.tree.leaves(state.params)),
        "seconds a step": float(np.median(times)),
        "cut": float(np.mean(np.asarray(training["mask"])[:, -1])),
    }


def judge(figures: Figures, seeds: int) -> Finding:
    """The verdict by the rule of statements.toml."""
    gains = findings.differences(figures, "accuracy", "frozen", 100)
    verdict = verdicts.all_above(list(gains.values())) if seeds >= 3 else "untested here (needs three seeds)"
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
        "seconds per step": lambda runs: f"{np.median([run['seconds a step'] for run in runs]):.3f}",
        "memory of a step, MiB": findings.first("bytes of a step", ",.0f", 2**-20),
    }
    note = f"{100 * figures['full'][0]['cut']:.1f} % of the training sentences have {LENGTH} tokens or more."
    return ["", *findings.condition_table("kind", figures, columns), "", note]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"seeds": 2, "sentences": 64, "rounds": 1}))
