"""Log-probabilities of given continuations, token by token, by one forward pass."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.decoding import compiled, steps
from llm_jax.errors import UserError
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.transformer import Transformer, check_length

# Letters of shapes: B batch, T time, C chunk of time, D width, V vocabulary.

_CHUNK = 32  # positions whose logits are in memory at a time; it divides every bucket


@dataclasses.dataclass(frozen=True)
class Scored:
    """The score of one continuation.

    Attributes:
      log_probabilities: natural log-probability of each of its tokens.
      greedy: whether every token is the most likely one at its position.
    """

    log_probabilities: list[float]
    greedy: bool


def score(
    model: Transformer,
    params: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Scores every (prompt, continuation) pair of token ids, at least one id each.

    Args:
      params: in the layout of `model.config`.
      batch_size: rows per forward pass; the last batch is padded, so that another number of pairs does not recompile.
      progress: called with the number of pairs of each batch.

    Raises:
      UserError: a prompt or continuation is empty or exceeds the model's positions, or the model is bidirectional and
        attends to the tokens that it would predict.
    """
    if not model.config.causal:
        raise UserError(
            "a bidirectional model (model.causal=False) assigns no probability to a text; it attends to all of it"
        )
    if any(not len(prompt) or not len(answer) for prompt, answer in pairs):
        raise UserError("a prompt or a continuation to score is empty; expected at least one token each")
    check_length(model.config, max((len(p) + len(a) for p, a in pairs), default=0))
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    scored: dict[int, Scored] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        rows = [[*pairs[i][0], *pairs[i][1]] for i in batch]
        ids_BT, lengths = steps.padded(rows + [[0]] * (batch_size - len(batch)), params)
        logs, best = jax.device_get(_score(model, params, ids_BT, lengths))
        for row, i in enumerate(batch):
            answer = slice(len(pairs[i][0]) - 1, len(rows[row]) - 1)  # the logits before a token predict it
            scored[i] = Scored(logs[row, answer].tolist(), bool(np.all(best[row, answer])))
        if progress:
            progress(len(batch))
    return [scored[i] for i in range(len(pairs))]


@compiled.jit()
def _score(model: Transformer, params: Any, ids_BT: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of the next token at every position, float32, and whether it is the most likely: both (B, T)."""
    b, t = ids_BT.shape
    index_BT = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    tokens = TokenMetadata(jnp.minimum(index_BT, lengths[:, None] - 1), (index_BT < lengths[:, None]).astype(jnp.int32))
    x_BTD, _ = steps.apply(model, params, ids_BT, tokens, method="features")
    next_BT = jnp.roll(ids_BT, -1, axis=1)

    def chunk(parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BCD, ids_BC = parts
        logs = jax.nn.log_softmax(steps.apply(model, params, x_BCD, method="logits").astype(jnp.float32))
        picked = jnp.take_along_axis(logs, ids_BC[..., None], -1)[..., 0]
        return picked, picked >= jnp.max(logs, -1)

    def split(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(b, t // _CHUNK, _CHUNK, *array.shape[2:]), 1, 0)

    parts = jax.lax.map(chunk, (split(x_BTD), split(next_BT)))
    logs_BT, best_BT = (jnp.moveaxis(part, 0, 1).reshape(b, t) for part in parts)
    return logs_BT, best_BT
