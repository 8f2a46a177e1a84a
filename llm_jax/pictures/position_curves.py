"""The effect of a position scheme on attention scores, as a function of the distance."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jax import trees, weights
from llm_jax.errors import UserError
from llm_jax.model import positions as positions_lib
from llm_jax.model import rope
from llm_jax.model.positions import Absolute, Learned, Position, Rope
from llm_jax.model.stages import layer_kinds
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Heatmaps, Lines, Panel, Picture
from llm_jax.schema import ModelConfig

# Letters of shapes: C curves, R distances, N heads, H head width, P positions.

_MOST_COLUMNS = 48  # of the heatmap of biases


@dataclasses.dataclass(frozen=True)
class Curves:
    """A quantity by distance.

    Attributes:
      measure: what the quantity is.
      distances: int64 (R,), query position minus key position.
      labels: C labels, such as "head 3".
      values: float64 (C, R).
    """

    measure: str
    distances: np.ndarray
    labels: tuple[str, ...]
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class PositionCurves(Drawable):
    """The effects of a position scheme.

    Attributes:
      kind: `model.position.kind`.
      curves: one for each effect.
    """

    kind: str
    curves: tuple[Curves, ...]

    def picture(self) -> Picture:
        panels: list[Panel] = []
        for c in self.curves:
            x = c.distances.astype(float)
            panels.append(Lines(c.measure, x, c.values, c.labels, "distance", _short(c.measure)))
            if len(c.labels) > 1:
                columns = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_COLUMNS)).astype(int))
                limit = float(np.abs(c.values).max()) or 1.0
                names = tuple(str(d) for d in c.distances[columns])
                values = c.values[:, columns][None]
                title = f"{c.measure}, by distance"
                panels.append(Heatmaps(title, ("",), values, c.labels, names, "", -limit, limit, diverging=True))
        note = "The distance is the position of the query minus the position of the key."
        return Picture(f"Positions: {self.kind}", tuple(panels), note)


def _short(measure: str) -> str:
    return measure.partition(" (")[0].partition(",")[0]


def positions(config: ModelConfig, params: Any = None, length: int = 256) -> PositionCurves:
    """How the position scheme of a model depends on distance.

    The effects, as far as the scheme has them: the bias of the scores (ALiBi, T5); the score of a query and a key that
    are equal before their rotation, relative to distance 0 (rotary embeddings), with the upper bound of Su et al. 2021
    (arXiv:2104.09864, section 3.4.3); the cosine similarity of position vectors (sinusoidal, learned); the norm of the
    vectors of relative positions (Shaw).

    Args:
      params: parameters of the model; they are needed if the scheme has trained weights.
      length: the largest distance.

    Raises:
      UserError: the scheme has trained weights and `params` is None, or it has no effect that depends on distance.
    """
    if length < 1:
        raise UserError(f"length={length}; expected a distance of at least 1")
    kinds = [kind for kind in dict.fromkeys(layer_kinds(config)) if kind != "nope"]
    schemes = {kind: positions_lib.make(config, kind) for kind in kinds}
    flat = {} if params is None else trees.flatten(trees.unstack(params))
    curves: list[Curves] = []
    for kind, scheme in schemes.items():
        suffix = "" if len(schemes) == 1 else f", {kind} layers"
        if (scheme.declare() or scheme.declare_layer()) and params is None:
            raise UserError(f"model.position.kind={config.position.kind} has trained weights; give --checkpoint")
        if type(scheme).rotate is not Position.rotate:
            curves += _rotation(scheme, length, suffix)
        if kind == kinds[0]:  # the others do not depend on the kind of layer
            curves += _bias(scheme, flat, length)
            curves += _vectors(scheme, flat, length) if isinstance(scheme, Absolute) else []
            curves += _relative(scheme, flat)
    if not curves:
        raise UserError(f"model.position.kind={config.position.kind} has no effect that depends on distance")
    return PositionCurves(config.position.kind, tuple(curves))


def _distances(scheme: Position, length: int) -> np.ndarray:
    """int64 (R,): from 0, or from -length in a model that attends to later tokens, to `length`."""
    return np.arange(0 if scheme.config.causal else -length, length + 1)


def _bias(scheme: Position, flat: dict[str, Any], length: int) -> list[Curves]:
    distances = _distances(scheme, length)
    table = {name: flat[f"embed/position_{name}"] for name in scheme.declare() if f"embed/position_{name}" in flat}
    query = jnp.full((1, 1), length, jnp.int32)
    keys = jnp.asarray(length - distances, jnp.int32)[None]
    bias = scheme.bias(query, keys, table)
    if bias is None:
        return []
    values = np.asarray(bias, np.float64)[0, :, 0] + 0.0  # 0 instead of -0
    values_NR = np.broadcast_to(values, (scheme.config.num_heads, len(distances)))
    return [Curves("bias of the scores", distances, tuple(f"head {n}" for n in range(len(values_NR))), values_NR)]


def _rotation(scheme: Position, length: int, suffix: str) -> list[Curves]:
    h, c = positions_lib.head_dim(scheme.config), scheme.config.position
    distances = np.arange(length + 1)
    places = jnp.asarray(length - distances, jnp.int32)[None]
    lengths = jnp.full_like(places, length + 1) if scheme.depends_on_length else None
    rotated_RH = np.asarray(scheme.rotate(jnp.ones((1, length + 1, 1, h)), places, lengths), np.float64)[0, :, 0]
    scores = rotated_RH @ rotated_RH[0]
    curves = [
        Curves(f"score of equal queries and keys, relative to distance 0{suffix}", distances, ("score",),
               (scores / scores[0])[None])
    ]  # fmt: skip
    if isinstance(scheme, Rope):
        last = None if lengths is None else lengths[:1, :1]
        frequencies = np.asarray(rope.frequencies(c, int(c.partial_rotary_factor * h), last), np.float64).reshape(-1)
        bound = rope_bound(frequencies, distances)
        name = f"upper bound of the scores (Su et al. 2021, section 3.4.3){suffix}"
        curves.append(Curves(name, distances, ("bound",), bound[None]))
    return curves


def rope_bound(frequencies: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """The relative upper bound of the scores, mean over j of |S_j|, S_j = sum over i < j of exp(i m theta_i).

    Su et al. 2021, arXiv:2104.09864, section 3.4.3, where it shows the long-term decay of rotary embeddings.

    Args:
      frequencies: float64 (H / 2,), theta, in radians per position.
      distances: int64 (R,), m.

    Returns:
      float64 (R,).
    """
    sums = np.cumsum(np.exp(1j * distances[:, None] * frequencies), -1)
    return np.abs(sums).mean(-1)


def _vectors(scheme: Absolute, flat: dict[str, Any], length: int) -> list[Curves]:
    table = {"table": weights.dense(flat["embed/position_table"])} if isinstance(scheme, Learned) else {}
    most = scheme.max_length()
    places = jnp.arange(length + 1 if most is None else min(length + 1, most), dtype=jnp.int32)
    vectors_PD = np.asarray(scheme.vectors(places[None], table), np.float64)[0]
    vectors_PD /= np.maximum(np.linalg.norm(vectors_PD, axis=-1, keepdims=True), 1e-12)
    cosines_PP = vectors_PD @ vectors_PD.T
    distances = np.arange(len(places))
    means = np.array([np.diagonal(cosines_PP, -d).mean() for d in distances])
    title = "cosine similarity of position vectors, mean over the positions"
    return [Curves(title, distances, ("cosine",), means[None])]


def _relative(scheme: Position, flat: dict[str, Any]) -> list[Curves]:
    curves = []
    for name in scheme.declare_layer():
        tables = [weights.dense(w) for path, w in flat.items() if path.endswith(f"/attention/position_{name}")]
        norms = np.stack([np.linalg.norm(np.asarray(table, np.float64), axis=-1) for table in tables])
        limit = norms.shape[1] // 2
        # Row i of the table is for the offset i - limit of the key; the distance is its negative.
        values = norms[:, ::-1]
        layers = tuple(f"layer {i}" for i in range(len(values)))
        curves.append(Curves(f"norm of the relative {name}", np.arange(-limit, limit + 1), layers, values))
    return curves
