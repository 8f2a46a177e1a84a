"""Accuracy of a language model that answers labelled examples with one of a few choices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import bars
from llm_jax.data.rows import Batch, Packed, batches
from llm_jax.decoding import score
from llm_jax.intervals import wilson
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import mesh as mesh_lib

# Letters of shapes: B batch, T time, N examples in a row, D width, V vocabulary.


def accuracy(model: Transformer, params: Any, rows: Packed, batch_size: int, sharding: Any) -> dict[str, float]:
    """The share of examples for which the right choice is the most likely one.

    If all choices differ in their first token, only the first tokens are compared, in one forward pass over the rows.
    Otherwise, each choice is scored by the log-probability of all of its tokens.

    Args:
      rows: examples whose `split.choices` are the token ids of the possible answers.
      batch_size: rows at a time.
      sharding: the sharding of a batch.

    Returns:
      {"accuracy", "low", "high", "right", "count"}; low and high are the limits of the 95 % interval (`wilson`).
    """
    _, right = correct_answers(model, params, rows, batch_size, sharding)
    return summary(right)


def summary(right: np.ndarray) -> dict[str, float]:
    """Computes the metrics of `accuracy` from `right`, bool (examples,)."""
    count_right, count = int(np.sum(right)), len(right)
    low, high = wilson(count_right, count)
    return {"accuracy": count_right / count, "low": low, "high": high, "right": count_right, "count": count}


def correct_answers(
    model: Transformer, params: Any, rows: Packed, batch_size: int, sharding: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (indices of the examples that fit into rows, int64 (n,); whether each answer is correct, bool (n,)).

    For the arguments, and how answers are chosen, see `accuracy`.
    """
    choices = rows.split.choices
    if len({choice[0] for choice in choices}) == len(choices):
        return _by_first_token(model, params, rows, batch_size, sharding)
    return rows.fitting, _by_likelihood(model, params, rows, batch_size)


def _by_first_token(
    model: Transformer, params: Any, rows: Packed, batch_size: int, sharding: Any
) -> tuple[np.ndarray, np.ndarray]:
    first = tuple(choice[0] for choice in rows.split.choices)
    answer = jax.jit(lambda params, batch: correct(model, params, batch, first, rows.max_examples))
    steps = -(-len(rows) // batch_size)
    examples, right = [], []
    stream = batches(rows, 0, steps, batch_size, sharding)
    for step, batch in enumerate(bars.bar(stream, "answering", steps, leave=False)):
        with mesh_lib.using_mesh_of(params):
            right_BN, present_BN = jax.device_get(answer(params, batch))
        for row in range(batch_size):
            examples.append(rows.documents(step * batch_size + row))
            right.append(right_BN[row][present_BN[row]])
    return np.concatenate(examples), np.concatenate(right)


def _by_likelihood(model: Transformer, params: Any, rows: Packed, batch_size: int) -> np.ndarray:
    choices, pairs, answers = rows.split.choices, [], []
    for index in rows.fitting.tolist():
        tokens, mask = rows.example(index)
        begin = int(mask.argmax())
        pairs += [(tokens[:begin].tolist(), choice) for choice in choices]
        answers.append(choices.index(tuple(tokens[begin:].tolist())))
    with bars.bar(total=len(pairs), desc="answering", leave=False) as bar:
        scores = score.score(model, params, pairs, batch_size, bar.update)
    likelihoods = np.array([sum(scored.log_probabilities) for scored in scores]).reshape(len(answers), len(choices))
    return np.argmax(likelihoods, 1) == np.array(answers)


def correct(
    model: Transformer, params: Any, batch: Batch, first: tuple[int, ...], most: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (whether each answer is correct, whether the example exists), bool (B, most) each, in row order.

    The answer of the model is the most likely of the ids `first` at the beginning of the answer.

    Args:
      batch: int32 (B, T) each; the targets that count are the answers.
      first: the first token of each choice.
      most: number of examples in the fullest row.
    """
    metadata = TokenMetadata(batch["positions"], batch["segments"])
    x_BTD, _ = model.apply({"params": params}, batch["inputs"], metadata, method="features")
    mask_BT = batch["mask"]
    begins_BT = mask_BT * (1 - jnp.pad(mask_BT, ((0, 0), (1, 0)))[:, :-1])
    present_BN, places_BN = jax.lax.top_k(begins_BT, most)
    x_BND = jnp.take_along_axis(x_BTD, places_BN[..., None], 1)
    logits_BNV: Any = model.apply({"params": params}, x_BND, method="logits")
    allowed = jnp.asarray(first)
    answers_BN = allowed[jnp.argmax(logits_BNV[..., allowed], -1)]
    right_BN = answers_BN == jnp.take_along_axis(batch["targets"], places_BN, 1)
    return right_BN, present_BN > 0


def describe(metrics: dict[str, float]) -> str:
    """Formats the metrics of `accuracy`."""
    interval = f"95 % interval {metrics['low']:.1%} to {metrics['high']:.1%}"
    return f"{metrics['accuracy']:.1%} of {metrics['count']:,} correct, {interval}"
