"""Accuracy of a language model that answers labelled examples with one of a few choices."""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import bars
from llm_jax.data.rows import Batch, Packed, batches
from llm_jax.decoding import score
from llm_jax.evaluation.statistics import wilson
from llm_jax.model.attention import Tokens
from llm_jax.model.transformer import Transformer

# Letters of shapes: B batch, T time, N examples in a row, D width, V vocabulary.


def accuracy(model: Transformer, params: Any, rows: Packed, batch_size: int, sharding: Any) -> dict[str, float]:
    """The share of examples for which the right choice is the most likely one.

    Where the choices differ in their first token, one forward pass over the rows decides. Otherwise each choice is
    scored by the log-probability of all of its tokens.

    Args:
      rows: examples whose `split.choices` are the token ids of the possible answers.
      batch_size: rows at a time.
      sharding: of a batch.

    Returns:
      {"accuracy", "low", "high", "right", "count"}; low and high are the limits of the 95 % interval (`wilson`).
    """
    choices = rows.split.choices
    if len({choice[0] for choice in choices}) == len(choices):
        right, count = _by_first_token(model, params, rows, batch_size, sharding)
    else:
        right, count = _by_likelihood(model, params, rows, batch_size)
    low, high = wilson(right, count)
    return {"accuracy": right / count, "low": low, "high": high, "right": right, "count": count}


def _by_first_token(model: Transformer, params: Any, rows: Packed, batch_size: int, sharding: Any) -> tuple[int, int]:
    first = tuple(choice[0] for choice in rows.split.choices)
    count_right = jax.jit(lambda params, batch: correct(model, params, batch, first, rows.most))
    steps = -(-len(rows) // batch_size)
    right = count = 0
    for batch in bars.bar(batches(rows, 0, steps, batch_size, sharding), "answering", steps, leave=False):
        more_right, more = count_right(params, batch)
        right, count = right + int(more_right), count + int(more)
    return right, count


def _by_likelihood(model: Transformer, params: Any, rows: Packed, batch_size: int) -> tuple[int, int]:
    choices, pairs, answers = rows.split.choices, [], []
    for index in rows.fitting.tolist():
        tokens, mask = rows.example(index)
        begin = int(mask.argmax())
        pairs += [(tokens[:begin].tolist(), choice) for choice in choices]
        answers.append(choices.index(tuple(tokens[begin:].tolist())))
    with bars.bar(total=len(pairs), desc="answering", leave=False) as bar:
        scores = score.score(model, params, pairs, batch_size, bar.update)
    likelihoods = [sum(scored.log_probabilities) for scored in scores]
    right = 0
    for example, answer in enumerate(answers):
        own = likelihoods[example * len(choices) : (example + 1) * len(choices)]
        right += own.index(max(own)) == answer
    return right, len(answers)


def correct(
    model: Transformer, params: Any, batch: Batch, first: tuple[int, ...], most: int
) -> tuple[jax.Array, jax.Array]:
    """(right answers, answers), int32 () each: the most likely of the ids `first` where an answer begins.

    Args:
      batch: int32 (B, T) each; the targets that count are the answers.
      first: the first token of each choice.
      most: examples in the fullest row.
    """
    where = Tokens(batch["positions"], batch["segments"])
    x_BTD, _ = model.apply({"params": params}, batch["inputs"], where, method="features")
    mask_BT = batch["mask"]
    begins_BT = mask_BT * (1 - jnp.pad(mask_BT, ((0, 0), (1, 0)))[:, :-1])
    present_BN, places_BN = jax.lax.top_k(begins_BT, most)
    x_BND = jnp.take_along_axis(x_BTD, places_BN[..., None], 1)
    logits_BNV: Any = model.apply({"params": params}, x_BND, method="logits")
    allowed = jnp.asarray(first)
    answers_BN = allowed[jnp.argmax(logits_BNV[..., allowed], -1)]
    right_BN = answers_BN == jnp.take_along_axis(batch["targets"], places_BN, 1)
    return jnp.sum(right_BN * present_BN), jnp.sum(present_BN)


def describe(figures: dict[str, float]) -> str:
    """The figures of `accuracy` in words."""
    interval = f"95 % interval {figures['low']:.1%} to {figures['high']:.1%}"
    return f"{figures['accuracy']:.1%} of {figures['count']:,} right, {interval}"
