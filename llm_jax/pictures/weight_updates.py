"""Singular values of the update of each weight: of adapters, or of the difference of two checkpoints."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jax import bars, lora, trees, weights
from llm_jax.errors import UserError
from llm_jax.lora import adapt
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Lines, Panel, Picture, Table

_MOST_LINES = 12


@dataclasses.dataclass(frozen=True)
class WeightUpdates(Drawable):
    """Singular values of the updates, largest first.

    Attributes:
      paths: names of the updated weights.
      values: float64 (weights, values); NaN past the rank of a weight that has fewer.
      ratios: float64 (weights,), norm of the update over the norm of the weight before it.
    """

    paths: tuple[str, ...]
    values: np.ndarray
    ratios: np.ndarray

    def effective_ranks(self) -> np.ndarray:
        """exp(entropy of the normalized singular values), float64 (weights,); 0 where there is no update.

        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
        """
        values = np.nan_to_num(self.values)
        totals = values.sum(-1, keepdims=True)
        shares = values / np.where(totals > 0, totals, 1)
        entropies = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), -1)
        return np.where(totals[:, 0] > 0, np.exp(entropies), 0.0)

    def picture(self) -> Picture:
        order = np.argsort(-self.ratios, kind="stable")
        drawn = order[:_MOST_LINES]
        title = "singular values"
        title += f" of the {_MOST_LINES} largest of {len(order)} updates" if len(order) > _MOST_LINES else ""
        index = np.arange(1, self.values.shape[1] + 1).astype(float)
        names = tuple(self.paths[i] for i in drawn)
        columns = ("weight", "largest", "effective rank", "norm over that of the weight")
        ranks = self.effective_ranks()
        rows = tuple((self.paths[i], float(self.values[i, 0]), float(ranks[i]), float(self.ratios[i])) for i in order)
        panels: tuple[Panel, ...] = (
            Lines(title, index, self.values[drawn], names, "index", "singular value"),
            Table("updates, the largest relative to its weight first", columns, rows),
        )
        return Picture("Updates of the weights", panels)


def adapters(base: Any, adapter_tree: Any) -> WeightUpdates:
    """The updates of low-rank adapters.

    Args:
      base: the weights without the adapters, of any kind, in any layout.
      adapter_tree: entries a (I, R), b (R, O) and scale () of each adapted weight, as `lora.init` returns them; with
        those of DoRA, whose update is not of low rank, the dense weights are compared.

    Raises:
      UserError: the adapters are for another base.
    """
    base, adapter_tree = trees.unstack(base), trees.unstack(adapter_tree)
    adapt.check(base, adapter_tree, "adapters")
    flat = trees.flatten(base)
    updates = {}
    for path, parts in adapt.by_path(adapter_tree).items():
        before = _matrix(weights.dense(flat[path]))
        if "magnitude" in parts:
            after = lora.materialize({"w": before}, {"w": parts})["w"]
            spectrum = _spectrum(np.asarray(after, np.float64) - np.asarray(before, np.float64))
        else:
            parts = adapt.by_path(lora.to_lora({"w": parts}))["w"]
            spectrum = low_rank_spectrum(*(np.asarray(parts[name], np.float64) for name in ("a", "b", "scale")))
        updates[path] = (spectrum, float(np.linalg.norm(before)))
    return _collected(updates)


def low_rank_spectrum(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Singular values of a diag(scale) b without forming the product: (I, R), (R, O), () or (R,) -> (min(I, R, O),).

    With a = Q1 R1 and b^T = Q2 R2 they are those of R1 diag(scale) R2^T, a matrix of at most R x R.
    """
    r1, r2 = np.linalg.qr(a)[1], np.linalg.qr(b.T)[1]
    return np.linalg.svd((r1 * scale) @ r2.T, compute_uv=False)


def difference(before: Any, after: Any, count: int = 32) -> WeightUpdates:
    """The updates between two parameter trees of one model; weights that are equal or not matrices are left out.

    Args:
      before, after: weights of any kind, in any layout.
      count: how many singular values of each weight to keep.

    Raises:
      UserError: the trees differ in names or shapes, or in no weight.
    """
    flats = [trees.flatten(trees.unstack(tree)) for tree in (before, after)]
    shapes = [{path: {"shape": tuple(w.shape)} for path, w in flat.items()} for flat in flats]
    trees.check(shapes[1], shapes[0], "the second checkpoint")
    updates = {}
    for path in bars.bar(flats[0], "decomposing", leave=False, delay=2):
        first, second = (np.asarray(weights.dense(flat[path]), np.float64) for flat in flats)
        if first.ndim == 2 and (first != second).any():
            updates[path] = (_spectrum(second - first)[:count], float(np.linalg.norm(first)))
    if not updates:
        raise UserError("no matrix differs between the two checkpoints")
    return _collected(updates)


def _matrix(weight: Any) -> Any:
    return jnp.reshape(weight, (-1, weight.shape[-1]))


def _spectrum(update: np.ndarray) -> np.ndarray:
    """Singular values of a matrix (I, O), largest first, float64 (min(I, O),)."""
    return np.linalg.svd(update, compute_uv=False)


def _collected(updates: dict[str, tuple[np.ndarray, float]]) -> WeightUpdates:
    longest = max(len(values) for values, _ in updates.values())
    values = np.full((len(updates), longest), np.nan)
    for row, (spectrum, _) in zip(values, updates.values(), strict=True):
        row[: len(spectrum)] = spectrum
    norms = np.array([norm for _, norm in updates.values()])
    return WeightUpdates(tuple(updates), values, np.sqrt(np.nansum(values**2, -1)) / np.maximum(norms, 1e-30))
