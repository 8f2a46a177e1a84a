"""What a job of the sentiment experiment measures: accuracies of a prompted, a probed or a trained model."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.optimize import minimize

from llm_jax import checkpoints, configuration, files, trees
from llm_jax.checkpoints import Loaded
from llm_jax.data import labelled
from llm_jax.data.labelled import LabelledSource, LabelledText
from llm_jax.data.rows import Packed
from llm_jax.embeddings import contextual
from llm_jax.evaluation import classification
from llm_jax.research import runs

MODEL, DATA, OTHER = "asset:smollm2-135m-instruct", "movie-reviews", "amazon-reviews"
PROMPTED = ("zero-shot", "few-shot", "probe")
SHOTS = 4
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SUMMARY = (
    *("test_accuracy", "test_right", "test_count", "trained_parameters", "parameters", "validation_loss"),
    *("tokens_per_second", "seconds", "peak_host_bytes", "jax"),
)


def source(name: str) -> LabelledSource:
    """The rated sentences of an asset."""
    return LabelledSource(configuration.load("sentiment_lora", {"data.source": f"asset:{name}"}).data)


def untrained(kind: str, products: bool, test: int = 0, train: int = 0) -> dict[str, Any]:
    """Accuracies of "zero-shot", "few-shot" or "probe" on test sentences, with their intervals.

    Args:
      products: whether product reviews are measured too.
      test, train: test and validation sentences, and training sentences of the probe; 0: all.
    """
    loaded = checkpoints.load(MODEL, dtype="bfloat16")  # as the runs that are trained compute
    films = source(DATA)
    tests = [s.parts["test"][: test or None] for s in (films, *([source(OTHER)] if products else []))]
    if kind == "probe":
        parts = [films.parts["train"][: train or None], films.parts["validation"][: test or None], *tests]
        accuracies = probed(loaded, films, parts)
    else:
        shots = balanced(films.parts["train"]) if kind == "few-shot" else ()
        accuracies = [answered(loaded, films, sentences, shots) for sentences in tests]
    return accuracies[0] | ({"products": accuracies[1]} if products else {}) | {"data": films.sha256}


def trained(run: pathlib.Path, products: bool) -> dict[str, Any]:
    """The figures of a finished run; with `products`, also the accuracy on product reviews."""
    summary = files.read_json(run / "summary.json")
    seconds = [step["seconds"] for step in runs.read_lines(run / "metrics.jsonl")]
    figures = {key: summary[key] for key in SUMMARY} | {"step_seconds": float(np.median(seconds))}
    record = checkpoints.verify(checkpoints.find(run))["params"]
    for path in [path for path in record if path.endswith("/mlp/up/a")][:1]:  # shapes of one weight's factors
        lead = trees.layers_of(path) is not None
        figures["factors"] = {name: record[path[:-1] + name]["shape"][lead:] for name in ("a", "b")}
    if products:
        other = source(OTHER)
        figures["products"] = answered(checkpoints.load(run, scan_layers=True), other, other.parts["test"])
    return figures


def answered(
    loaded: Loaded, source: LabelledSource, sentences: Sequence[LabelledText], shots: Sequence[LabelledText] = ()
) -> dict[str, float]:
    """The accuracy of the likelier of the two answers; `shots` are solved examples in the prompt."""
    prompts = labelled.Prompts(loaded.tokenizer, source.config.labelled, source.choices, shots)
    split = labelled.encode(sentences, prompts, source.choices)
    rows = Packed(split, max(256, int(np.diff(split.offsets).max())))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return classification.accuracy(loaded.model, loaded.params, rows, 8, device)


def balanced(sentences: Sequence[LabelledText]) -> list[LabelledText]:
    """The first sentences of each class in turn, `SHOTS` in all."""
    classes = [[s for s in sentences if s.label == label][: SHOTS // 2] for label in (0, 1)]
    return [s for pair in zip(*classes, strict=True) for s in pair]


def probed(loaded: Loaded, source: LabelledSource, parts: list[list[LabelledText]]) -> list[dict[str, float]]:
    """Logistic regression on the features of the last token of the prompt: its accuracies on all parts but two.

    The first part is for training, the second for the choice of the penalty.
    """
    prompts = labelled.Prompts(loaded.tokenizer, source.config.labelled, source.choices)
    questions = ([prompts.question(s) for s in sentences] for sentences in parts)
    features = [contextual.sentence_vectors(loaded, of_part, pool="last", normalize=False) for of_part in questions]
    y = [np.asarray([s.label for s in sentences]) for sentences in parts]
    mean, deviation = features[0].mean(0), features[0].std(0) + 1e-6
    x = [jnp.asarray((of_part - mean) / deviation) for of_part in features]
    signs = jnp.asarray(2.0 * y[0] - 1)

    @jax.jit
    def fit(penalty):
        def loss(w):
            return jnp.mean(jax.nn.softplus(-signs * (x[0] @ w[:-1] + w[-1]))) + penalty * jnp.sum(w[:-1] ** 2)

        return minimize(loss, jnp.zeros(x[0].shape[1] + 1), method="BFGS", options={"maxiter": 200}).x

    def right(w, part: int) -> np.ndarray:
        return (np.asarray(x[part] @ w[:-1] + w[-1]) > 0) == y[part]

    w = max((fit(penalty) for penalty in PENALTIES), key=lambda w: int(np.sum(right(w, 1))))
    size = {"trained_parameters": int(w.size)}
    return [classification.summary(right(w, part)) | size for part in range(2, len(parts))]
