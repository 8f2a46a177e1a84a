"""Generation: one compiled prefill and one compiled loop, for prompts of any lengths.

Prompts are padded on the right to a bucket and the cache has a bucket of slots, so that other
lengths run the same compiled code. Padding is segment 0: nobody sees it, and the slots after it take
positions that go on from each row's own prompt.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.decoding.samplers import History, Sampler
from llm_jax.errors import UserError
from llm_jax.model.attention import Cache, Tokens
from llm_jax.model.transformer import Transformer, check_length, init_cache

# Letters of shapes: B batch, P padded prompt, S slots, V vocabulary.

_SMALLEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Generated:
    """The continuation of one prompt.

    Attributes:
      ids: without the prompt and without EOS.
      log_probabilities: of each id, and of EOS where that came, under the model itself (before any
        filter), natural logarithm: they sum to the log-probability of the sequence.
      stop: "eos", or "length" where max_new_tokens ended it.
    """

    ids: list[int]
    log_probabilities: list[float]
    stop: str


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    eos: int | None = None,
    vocab_size: int | None = None,
) -> list[Generated]:
    """Continues every prompt.

    Args:
      params: in the layout of `model.config`; one entry per layer (`scan_layers=False`) decodes fastest.
      prompts: ids, at least one each; lengths may differ.
      seeds: one per row, below 2^32, so that a row's text does not depend on the others; by default 0, 1, ...
      eos: the id that ends a row; None: only the length does.
      vocab_size: ids from here on are never drawn, for a model whose vocabulary is padded; by default the model's.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, max_new_tokens below 1, or a length that
        goes past the model's positions.
    """
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    _check(model, prompts, lengths, max_new_tokens, seeds)
    padded = _bucket(int(lengths.max()))
    slots = padded + _bucket(max_new_tokens)
    prompts_BP = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(prompts_BP, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    eos, vocab_size = -1 if eos is None else eos, vocab_size or model.config.vocab_size
    first = _prefill(model, slots, params, prompts_BP, lengths)
    ids, log_probabilities, count = jax.device_get(
        _continue(model, params, sampler, first, keys, max_new_tokens, eos, vocab_size)
    )
    results = []
    for row_ids, row_logs, n in zip(ids, log_probabilities, count, strict=True):
        ended = n > 0 and row_ids[n - 1] == eos
        results.append(Generated(row_ids[: n - ended].tolist(), row_logs[:n].tolist(), "eos" if ended else "length"))
    return results


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Decoding:
    """The loop's state. `count` (B,) tokens are written in `ids` (B, N); `done` rows write no more."""

    cache: Cache
    history: History
    logits: jax.Array
    time: jax.Array
    ids: jax.Array
    log_probabilities: jax.Array
    count: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(model: Transformer, slots: int, params: Any, prompts_BP: jax.Array, lengths: jax.Array) -> _Decoding:
    b, p = prompts_BP.shape
    count = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32), (b, p))
    real = count < lengths[:, None]
    where = Tokens(jnp.minimum(count, lengths[:, None] - 1), real.astype(jnp.int32))
    x_BPD, cache = _apply(model, params, prompts_BP, where, init_cache(model.config, b, slots), method="features")
    last_B1D = jnp.take_along_axis(x_BPD, lengths[:, None, None] - 1, axis=1)
    logits = _apply(model, params, last_B1D, method="logits")[:, 0]
    history = History(jnp.pad(prompts_BP, ((0, 0), (0, slots - p))), lengths, lengths)
    room = slots - p
    return _Decoding(
        cache,
        history,
        logits,
        jnp.int32(0),
        jnp.zeros((b, room), jnp.int32),
        jnp.zeros((b, room), jnp.float32),
        jnp.zeros(b, jnp.int32),
        jnp.zeros(b, bool),
    )


@functools.partial(jax.jit, static_argnums=0)
def _continue(
    model: Transformer,
    params: Any,
    sampler: Sampler,
    start: _Decoding,
    keys: jax.Array,
    limit: jax.Array,
    eos: jax.Array,
    vocab_size: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def going(state: _Decoding) -> jax.Array:
        return (state.time < limit) & ~jnp.all(state.done)

    def step(s: _Decoding) -> _Decoding:
        allowed = jnp.where(jnp.arange(s.logits.shape[-1]) < vocab_size, s.logits, -jnp.inf)
        ids = sampler(allowed, jax.vmap(jax.random.fold_in, (0, None))(keys, s.time), s.history)
        logs = jnp.take_along_axis(jax.nn.log_softmax(s.logits.astype(jnp.float32)), ids[:, None], -1)[:, 0]
        where = Tokens((s.history.prompt + s.time)[:, None], (~s.done).astype(jnp.int32)[:, None])
        logits, cache = _apply(model, params, ids[:, None], where, s.cache)
        places = jnp.where(s.done, s.history.ids.shape[1], s.history.length)  # past the end: not written
        written = s.history.ids.at[jnp.arange(len(ids)), places].set(ids, mode="drop")
        history = History(written, s.history.length + ~s.done, s.history.prompt)
        return _Decoding(
            cache,
            history,
            logits[:, 0],
            s.time + 1,
            s.ids.at[:, s.time].set(ids),
            s.log_probabilities.at[:, s.time].set(logs),
            s.count + ~s.done,
            s.done | (ids == eos),
        )

    end = jax.lax.while_loop(going, step, start)
    return end.ids, end.log_probabilities, end.count


def _apply(model: Transformer, params: Any, *inputs: Any, method: str = "__call__") -> Any:
    return model.apply({"params": params}, *inputs, method=method)


def _bucket(length: int) -> int:
    """The next power of two."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _check(
    model: Transformer, prompts: Sequence[Sequence[int]], lengths: np.ndarray, max_new_tokens: int, seeds: Sequence[int]
) -> None:
    if not len(lengths) or not lengths.min():
        raise UserError("the prompt is empty; expected at least one token (BOS will do)")
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={max_new_tokens}; expected at least 1")
    if len(seeds) != len(prompts) or any(not 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"the seeds {list(seeds)[:4]} are not one from 0 to 2^32 - 1 for each of {len(prompts)} rows")
    vocab = model.config.vocab_size
    if any(not 0 <= i < vocab for prompt in prompts for i in prompt):
        raise UserError(f"a prompt has an id outside the model's vocabulary of {vocab}")
    check_length(model.config, int(lengths.max()) + max_new_tokens)
