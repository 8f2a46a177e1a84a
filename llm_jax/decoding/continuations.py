"""Runs a decoding loop from the host: calls the stop functions, and converts the state of the loop to results."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 16  # tokens between two checks for stop strings

# (row, its generated ids, number of ids checked before) -> number of ids to keep if the row ends, else None.
StopFn = Callable[[int, list[int], int], int | None]


@dataclasses.dataclass(frozen=True)
class Generated:
    """The continuation of one prompt.

    Attributes:
      ids: generated token ids, without the prompt and without EOS.
      log_probabilities: natural log-probability of each id, and of EOS if the row ended with it, under the model itself
        (before any filter). They sum to the log-probability of the sequence.
      stop: why the row ended: "eos", "stop" (a stop string) or "length" (max_new_tokens).
      alternatives: for each generated token, the most likely ids and their log-probabilities.
    """

    ids: list[int]
    log_probabilities: list[float]
    stop: str
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)


def run(
    step: Callable[[Any, int], Any],
    state: Any,
    eos: jax.Array,
    max_new_tokens: int,
    stop: StopFn | None,
    watch: Callable[[list[Generated]], Any] | None,
) -> list[Generated]:
    """Runs the loop until all rows have ended, and pauses it to call `stop` and `watch` (see `loop.generate`).

    Args:
      step: (state, until) -> the state with `until` tokens, or with all rows done. A state has the last six
        fields of `steps.DecodingState`.
      eos: int32 (E,), the ids that end a row.
    """
    pause = 1 if watch else _CHUNK if stop else max_new_tokens
    stopped_at: dict[int, int] = {}  # row -> number of ids to keep
    checked = np.zeros(len(state.done), np.int64)
    for until in (*range(pause, max_new_tokens, pause), max_new_tokens):
        state = step(state, until)
        done = np.array(state.done)
        if stop:
            for row, (ids, count) in enumerate(zip(*jax.device_get((state.ids, state.count)), strict=True)):
                if row not in stopped_at and (keep := stop(row, ids[:count].tolist(), int(checked[row]))) is not None:
                    stopped_at[row] = keep
                checked[row] = count
            done[list(stopped_at)] = True
            state = dataclasses.replace(state, done=jnp.asarray(done))
        if done.all() | bool(watch and watch(results(state, eos, stopped_at))):
            break
    return results(state, eos, stopped_at)


def results(state: Any, eos: jax.Array, stopped_at: dict[int, int]) -> list[Generated]:
    """Returns the rows generated so far, on the host.

    Args:
      state: a state of `run`.
      eos: int32 (E,), the ids that end a row.
      stopped_at: {row that a stop string ended: number of ids to keep}.
    """
    eos_ids = set(np.asarray(eos).tolist())
    rows = []
    arrays = (state.ids, state.log_probabilities, state.count, state.alternative_ids, state.alternative_logs)
    for row, (ids, logs, count, other_ids, other_logs) in enumerate(zip(*jax.device_get(arrays), strict=True)):
        n = stopped_at.get(row, int(count))
        ended = row not in stopped_at and n > 0 and int(ids[n - 1]) in eos_ids
        pairs = zip(other_ids[:n], other_logs[:n], strict=True)
        alternatives = [dict(zip(i.tolist(), x.tolist(), strict=True)) for i, x in pairs if len(i)]
        stop = "stop" if row in stopped_at else "eos" if ended else "length"
        rows.append(Generated(ids[: n - ended].tolist(), logs[:n].tolist(), stop, alternatives))
    return rows
