"""Detects bad steps (a loss or gradient that is not finite, or a loss spike) and counts rollbacks."""

import dataclasses
import json
import math
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.schema import TrainConfig, choice

ACTIONS = ("stop", "skip", "rollback")
_HISTORY = 50  # number of previous losses whose median is the reference for a spike
_MIN_LOSSES = 20  # minimum number of losses for the detection of spikes
_MAX_ATTEMPTS = 3  # consecutive bad steps, or rollbacks to one checkpoint, after which the run ends
CURES = {  # of a run that a bad step has ended, by `train.on_bad_step`
    "stop": "lower optim.lr, or set train.on_bad_step to skip or rollback",
    "skip": f"{_MAX_ATTEMPTS} consecutive steps were bad; lower optim.lr, or set train.on_bad_step=rollback",
}


@dataclasses.dataclass
class BadStep(Exception):
    """A step whose update must be discarded.

    Attributes:
      step: number of the step, from 1.
      reason: the reason, as a phrase.
    """

    step: int
    reason: str


def norms(tree: Any) -> jax.Array:
    """The norm of every weight, layer by layer, in the order of `names`: float32 (number of weights,)."""
    parts = []
    for path, weight in trees.flatten(tree).items():
        stacked = trees.layers_of(path) is not None
        squares = [
            jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(int(stacked), leaf.ndim)))
            for leaf in jax.tree.leaves(weight)
        ]
        parts.append(jnp.atleast_1d(jnp.sqrt(jnp.sum(jnp.stack(squares), 0))))
    return jnp.concatenate(parts)


def names(tree: Any) -> list[str]:
    """The per-layer names of the weights of a tree, in the order of `norms`."""
    return [name for path in trees.flatten(tree) for name in trees.expand(path)]


def read_metrics(metrics: pathlib.Path, step: float = math.inf) -> list[dict[str, Any]]:
    """Reads the complete lines of metrics.jsonl up to the line of `step`."""
    lines: list[dict[str, Any]] = []
    for text in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            line = json.loads(text)
            if line["step"] <= step:
                lines.append(line)
        except (ValueError, KeyError, TypeError):  # an incomplete line of a killed process
            break
    return lines


def check(config: TrainConfig) -> None:
    """Raises UserError if `train.on_bad_step` is unknown."""
    choice("train.on_bad_step", config.on_bad_step, ACTIONS)


class BadStepDetector:
    """Detects bad steps by comparing losses with the losses of earlier steps.

    The limit for step n depends on the losses of the steps up to n - 2, because these are known when step n is
    dispatched. A resumed run reads them from metrics.jsonl.

    Args:
      weights: the per-layer names of the trainable weights, in the order of the gradient norms.
      metrics: the path of metrics.jsonl.
      start: the step that the run resumes from; later lines are ignored.
    """

    def __init__(self, config: TrainConfig, weights: list[str], metrics: pathlib.Path, start: int):
        check(config)
        self._config, self._weights = config, weights
        self._losses: dict[int, float] = {}
        self._consecutive = 0  # number of bad steps since the last good one
        for line in read_metrics(metrics, start)[-2 * _HISTORY :]:
            self._consecutive = self._consecutive + 1 if line.get("bad") else 0
            if not line.get("bad"):
                self._losses[line["step"]] = line["loss"]

    def limit(self, step: int) -> float:
        """The largest loss of step `step` that is not a spike; infinity if spikes are not detected."""
        losses = [loss for s, loss in sorted(self._losses.items()) if s <= step - 2][-_HISTORY:]
        if not self._config.spike_factor or len(losses) < _MIN_LOSSES:
            return math.inf
        return self._config.spike_factor * statistics.median(losses)

    def record(self, step: int, loss: float, bad: bool, gradient_norms: np.ndarray) -> str:
        """Records a step, and returns a message about a bad step, or "".

        Args:
          gradient_norms: float32 (number of weights,).

        Raises:
          BadStep: the step is bad, and `train.on_bad_step` is not "skip" or too many consecutive steps were bad.
        """
        if not bad:
            self._losses[step] = loss
            self._losses.pop(step - 2 * _HISTORY, None)
            self._consecutive = 0
            return ""
        self._consecutive += 1
        reason = self._reason(step, loss, gradient_norms)
        if self._config.on_bad_step != "skip" or self._consecutive >= _MAX_ATTEMPTS:
            raise BadStep(step, reason)
        return f"step {step}: {reason}; its update is skipped"

    def rewind(self, step: int) -> None:
        """Drops the losses after `step`."""
        self._losses = {s: loss for s, loss in self._losses.items() if s <= step}
        self._consecutive = 0

    def _reason(self, step: int, loss: float, gradient_norms: np.ndarray) -> str:
        broken = [name for name, norm in zip(self._weights, gradient_norms, strict=True) if not math.isfinite(norm)]
        if math.isfinite(loss) and not broken:
            largest = self._weights[int(np.argmax(gradient_norms))]
            return (
                f"the loss is {loss:.3f}, a spike above {self.limit(step):.3f} "
                f"(train.spike_factor={self._config.spike_factor:g}); the largest gradient is that of {largest}"
            )
        weights = "all weights" if len(broken) == len(self._weights) else ", ".join(broken[:3])
        more = f" and {len(broken) - 3} more" if 3 < len(broken) < len(self._weights) else ""
        return f"the loss is {loss:g} and the gradient of {weights or 'no weight'}{more} is not finite"


class Rollbacks:
    """Counts the rollbacks to each checkpoint, and stops a run after too many rollbacks to the same checkpoint."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # {step of the checkpoint: number of rollbacks}

    def count(self, to: int, bad: BadStep) -> None:
        """Counts a rollback to step `to`. Raises UserError after too many rollbacks to the same step."""
        self._counts[to] = self._counts.get(to, 0) + 1
        if self._counts[to] > _MAX_ATTEMPTS:
            raise UserError(
                f"step {bad.step}: {bad.reason}; {_MAX_ATTEMPTS} rollbacks to step {to} have not helped; lower "
                "optim.lr or optim.clip_norm"
            )
