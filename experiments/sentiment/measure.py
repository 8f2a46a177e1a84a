"""What needs no training of the model: zero-shot, few-shot, and a linear probe of its features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.optimize import minimize

from experiments import padded
from llm_jax import checkpoints, configuration
from llm_jax.data import labelled
from llm_jax.data.labelled import LabelledSource
from llm_jax.data.rows import Packed
from llm_jax.evaluation import classification
from llm_jax.intervals import wilson

SHOTS = 4
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def figures(kind: str, data: str, other: str, test: int, train: int) -> dict[str, Any]:
    """Accuracies of "zero-shot", "few-shot" or "probe" on test sentences, with their intervals.

    Args:
      data: the asset of rated sentences.
      other: another one, whose test sentences are asked about besides; "": none.
      test, train: test sentences, and training sentences of the probe; 0: all.
    """
    # As the runs that are trained compute.
    model, params, tokenizer = checkpoints.load("asset:smollm2-135m-instruct", dtype="bfloat16")
    sources = [
        LabelledSource(configuration.load("sentiment_lora", {"data.source": f"asset:{name}"}).data)
        for name in (data, other)
        if name
    ]
    tests = [source.parts["test"][: test or None] for source in sources]
    count = train if kind == "probe" else SHOTS * (kind == "few-shot")
    measure = probed if kind == "probe" else answered
    accuracies = measure(model, params, tokenizer, sources[0], tests, count)
    products = {"products": accuracies[1]} if other else {}
    return accuracies[0] | products | {"data": sources[0].sha256}


def answered(model, params, tokenizer, source, tests, count):
    """The likelier of the two answers, asked after `count` answered examples."""
    shots = balanced(source.parts["train"], count) if count else ()
    prompts = labelled.Prompts(tokenizer, source.config.labelled, source.choices, shots)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def right(chosen):
        split = labelled.encode(chosen, prompts, source.choices)
        rows = Packed(split, max(256, int(np.diff(split.offsets).max())))
        return classification.accuracy(model, params, rows, 8, device)

    return [right(chosen) for chosen in tests]


def balanced(sentences, count):
    """The first sentences of each class in turn."""
    classes = [[s for s in sentences if s.label == label][: count // 2] for label in (0, 1)]
    return [s for pair in zip(*classes, strict=True) for s in pair]


def probed(model, params, tokenizer, source, tests, count):
    """Logistic regression on the features where the answer would begin; the penalty by validation."""
    prompts = labelled.Prompts(tokenizer, source.config.labelled, source.choices)
    parts = {"train": source.parts["train"][: count or None], "validation": source.parts["validation"]}
    x, y = {}, {}
    for part, chosen in (parts | dict(enumerate(tests))).items():
        x[part] = last_features(model, params, [prompts.question(s) for s in chosen])
        y[part] = np.asarray([s.label for s in chosen])
    mean, deviation = x["train"].mean(0), x["train"].std(0) + 1e-6
    x = {part: jnp.asarray((v - mean) / deviation) for part, v in x.items()}

    @jax.jit
    def fit(penalty):
        signs = jnp.asarray(2.0 * y["train"] - 1)

        def loss(w):
            return jnp.mean(jax.nn.softplus(-signs * (x["train"] @ w[:-1] + w[-1]))) + penalty * jnp.sum(w[:-1] ** 2)

        return minimize(loss, jnp.zeros(x["train"].shape[1] + 1), method="BFGS", options={"maxiter": 200}).x

    def right(w, part):
        return int(np.sum((np.asarray(x[part] @ w[:-1] + w[-1]) > 0) == y[part]))

    w = max((fit(penalty) for penalty in PENALTIES), key=lambda w: right(w, "validation"))

    def accuracy(part):
        count = len(y[part])
        low, high = wilson(right(w, part), count)
        return {"accuracy": right(w, part) / count, "low": low, "high": high, "right": right(w, part), "count": count}

    return [accuracy(part) | {"trained_parameters": int(w.size)} for part in range(len(tests))]


def last_features(model, params, questions, size=16):
    """(questions, width): what the model makes of the last token of each."""

    @jax.jit
    def last(params, ids, mask):
        x = padded.features(model, params, ids, mask)
        return jnp.take_along_axis(x, jnp.sum(mask, 1)[:, None, None] - 1, 1)[:, 0].astype(jnp.float32)

    ids, mask = padded.pad(questions)
    return np.concatenate([last(params, ids[i : i + size], mask[i : i + size]) for i in range(0, len(ids), size)])
