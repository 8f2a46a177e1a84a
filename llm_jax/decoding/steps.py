"""The state of decoding and the steps on it: padding prompts, applying the model, drawing and recording a token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import trees
from llm_jax.decoding.samplers import History, Sampler
from llm_jax.model.attention import KVCache
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import mesh as mesh_lib

# Letters of shapes: B batch, P padded prompt, N new tokens, A alternatives, D width, V vocabulary.

_SMALLEST_BUCKET = 32


@trees.register
@dataclasses.dataclass(frozen=True)
class DrawSettings:
    """Arguments of the loop that may change without recompilation.

    Attributes:
      sampler: the filters and how a token is chosen.
      keys: (B,), one random key per row.
      eos: int32 (E,), the ids that end a row.
      vocab_size: int32 (); ids at or above it are never drawn.
    """

    sampler: Sampler
    keys: jax.Array
    eos: jax.Array
    vocab_size: jax.Array

    def mask_padded_vocab(self, logits: jax.Array) -> jax.Array:
        """Sets the logits of ids outside the vocabulary to -inf: (B, V) -> (B, V)."""
        return jnp.where(jnp.arange(logits.shape[-1]) < self.vocab_size, logits, -jnp.inf)

    def is_eos(self, ids: jax.Array) -> jax.Array:
        """Whether each id ends a row: int32 (...) -> bool (...)."""
        return jnp.any(ids[..., None] == self.eos, -1)


@trees.register
@dataclasses.dataclass(frozen=True)
class DecodingState:
    """The carry of the loop.

    Attributes:
      cache: keys and values of all tokens except the last of each row.
      history: prompt and generated ids.
      logits: (B, V), from which the last token was drawn.
      time: int32 (), tokens drawn so far.
      ids: int32 (B, N), generated ids; the first `count` of a row are valid.
      log_probabilities: float32 (B, N).
      alternative_ids: int32 (B, N, A), the most likely ids of each step.
      alternative_logs: float32 (B, N, A), their log-probabilities.
      count: int32 (B,), generated tokens of each row.
      done: bool (B,), rows that have ended.
    """

    cache: KVCache
    history: History
    logits: jax.Array
    time: jax.Array
    ids: jax.Array
    log_probabilities: jax.Array
    alternative_ids: jax.Array
    alternative_logs: jax.Array
    count: jax.Array
    done: jax.Array


def padded(prompts: Sequence[Sequence[int]], params: Any) -> tuple[Any, Any]:
    """Pads prompts to a bucket.

    Args:
      params: if they are sharded over a mesh, the rows are divided over it.

    Returns:
      Ids int32 (B, P), and lengths int32 (B,).
    """
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    prompts_BP = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(prompts_BP, prompts, strict=True):
        row[: len(prompt)] = prompt
    return mesh_lib.split_rows(prompts_BP, params), mesh_lib.split_rows(lengths, params)


def bucket(length: int) -> int:
    """The next power of two, at least 32."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def apply(model: Transformer, params: Any, *inputs: Any, method: str = "__call__") -> Any:
    """Applies a method of the model."""
    return model.apply({"params": params}, *inputs, method=method)


def last_logits(model: Transformer, params: Any, x_BPD: jax.Array, lengths: jax.Array) -> jax.Array:
    """Logits of the token after each prompt: features (B, P, D), lengths int32 (B,) -> (B, V)."""
    last_B1D = jnp.take_along_axis(x_BPD, lengths[:, None, None] - 1, axis=1)
    return apply(model, params, last_B1D, method="logits")[:, 0]


def empty_state(cache: KVCache, history: History, logits: jax.Array, capacity: int, alternatives: int) -> DecodingState:
    """The state before the first of at most `capacity` tokens, which is drawn from `logits` (B, V)."""
    b = len(logits)
    return DecodingState(
        cache,
        history,
        logits,
        jnp.int32(0),
        jnp.zeros((b, capacity), jnp.int32),
        jnp.zeros((b, capacity), jnp.float32),
        jnp.zeros((b, capacity, alternatives), jnp.int32),
        jnp.zeros((b, capacity, alternatives), jnp.float32),
        jnp.zeros(b, jnp.int32),
        jnp.zeros(b, bool),
    )


def draw_token(s: DecodingState, settings: DrawSettings) -> DecodingState:
    """The state after drawing a token of each row from `s.logits`. For use under `jax.jit`."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(settings.keys, s.time)
    ids = settings.sampler(settings.mask_padded_vocab(s.logits), keys, s.history)
    return record(s, settings, ids)


def record(s: DecodingState, settings: DrawSettings, ids: jax.Array) -> DecodingState:
    """Returns the state after adding ids, int32 (B,), that were drawn from `s.logits`."""
    logs_BV = jax.nn.log_softmax(s.logits.astype(jnp.float32))
    best, best_ids = jax.lax.top_k(logs_BV, s.alternative_ids.shape[-1])
    return DecodingState(
        s.cache,
        append(s.history, ids, ~s.done),
        s.logits,
        s.time + 1,
        s.ids.at[:, s.time].set(ids),
        s.log_probabilities.at[:, s.time].set(jnp.take_along_axis(logs_BV, ids[:, None], -1)[:, 0]),
        s.alternative_ids.at[:, s.time].set(best_ids),
        s.alternative_logs.at[:, s.time].set(best),
        s.count + ~s.done,
        s.done | settings.is_eos(ids),
    )


def append(history: History, ids: jax.Array, rows: jax.Array) -> History:
    """Appends ids int32 (B,) to the rows for which `rows` bool (B,) is true."""
    indices = jnp.where(rows, history.length, history.ids.shape[1])  # an index past the end is not written
    appended = history.ids.at[jnp.arange(len(ids)), indices].set(ids, mode="drop")
    return History(appended, history.length + rows, history.prompt)
