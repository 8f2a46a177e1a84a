"""The quantization error of each number format for each weight of a model."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import bars, trees, weights
from llm_jax.errors import UserError
from llm_jax.kernels import number_formats
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Heatmaps, Lines, Panel, Picture, Table
from llm_jax.quant import post_training
from llm_jax.weights import quantized

_LAYER = re.compile(r"layers/(\d+)/(.+)")
SCHEMES = ("int8", "int4", "nf4")


@dataclasses.dataclass(frozen=True)
class QuantizationErrors(Drawable):
    """Relative errors of the weights, |W - Q| / |W| in the Frobenius norm.

    Attributes:
      schemes: the number formats.
      paths: names of the weights that are quantized.
      sizes: int64 (weights,), numbers of each.
      errors: float64 (schemes, weights).
      bits: float64 (schemes,), bits a number over all these weights, scales included.
    """

    schemes: tuple[str, ...]
    paths: tuple[str, ...]
    sizes: np.ndarray
    errors: np.ndarray
    bits: np.ndarray

    def by_layer(self) -> tuple[tuple[str, ...], np.ndarray]:
        """(names of the weights of a layer, errors float64 (schemes, layers, names)); NaN where a layer lacks one."""
        matches = [_LAYER.fullmatch(path) for path in self.paths]
        names = tuple(dict.fromkeys(m[2] for m in matches if m))
        count = 1 + max((int(m[1]) for m in matches if m), default=-1)
        errors = np.full((len(self.schemes), count, len(names)), np.nan)
        for i, m in enumerate(matches):
            if m:
                errors[:, int(m[1]), names.index(m[2])] = self.errors[:, i]
        return names, errors

    def picture(self) -> Picture:
        names, errors = self.by_layer()
        layers = np.arange(errors.shape[1])
        rows = []
        for scheme, values, bits in zip(self.schemes, self.errors, self.bits, strict=True):
            worst = int(values.argmax())
            rows.append((scheme, float(bits), float(values.mean()), float(values[worst]), self.paths[worst]))
        columns = ("scheme", "bits a number", "mean error", "largest error", "weight")
        panels: list[Panel] = [Table("number formats", columns, tuple(rows))]
        if len(layers) > 1:
            title = "relative error by layer, mean over its weights"
            panels.append(Lines(title, layers.astype(float), np.nanmean(errors, -1), self.schemes, "layer", "error"))
        if len(layers):
            labels = tuple(f"layer {i}" for i in layers)
            ends = tuple(name.rsplit("/", 1)[-1] for name in names)  # a text shows six letters of a column
            names = ends if len(set(ends)) == len(names) else names
            for scheme, values in zip(self.schemes, errors, strict=True):
                high = float(np.nanmax(values))
                panels.append(Heatmaps(f"relative error, {scheme}", ("",), values[None], labels, names, "", 0.0, high))
        note = "The relative error is |W - Q| / |W|, W the weight and Q the quantized weight, with absmax scales."
        return Picture("Quantization errors", tuple(panels), note)


def quantization(params: Any, schemes: Sequence[str] = SCHEMES, head: bool = False) -> QuantizationErrors:
    """Quantizes every weight by each scheme, with absmax scales, and measures the errors.

    Args:
      params: weights of any kind; quantized and adapted weights are expanded first.
      schemes: names of number formats, see `python -m llm_jax.quantize --help`.
      head: whether the embeddings and the output head are quantized too.

    Raises:
      UserError: an unknown scheme, or one whose groups do not divide a weight.
    """
    if not schemes:
        raise UserError("no scheme to compare; expected names such as int8, int4, nf4")
    flat = {path: weights.dense(w) for path, w in trees.flatten(trees.unstack(params)).items()}
    tree = trees.unflatten(flat)
    plans = [
        post_training.plan(tree, post_training.rules(name, name if head else ""), f"scheme {name}") for name in schemes
    ]
    paths = tuple(path for path in flat if plans[0][path])
    if not paths:
        raise UserError("the model has no weight that can be quantized")
    errors, sizes = np.zeros((len(schemes), len(paths))), np.array([flat[path].size for path in paths])
    num_bytes = np.zeros(len(schemes))
    for i, path in enumerate(bars.bar(paths, "quantizing", leave=False, delay=2)):
        for s in range(len(schemes)):
            error, q = _error(flat[path], plans[s][path], post_training.axis(path))
            errors[s, i] = float(error)
            num_bytes[s] += weights.num_bytes(q)
    return QuantizationErrors(tuple(schemes), paths, sizes, errors, 8 * num_bytes / sizes.sum())


@functools.partial(jax.jit, static_argnums=(1, 2))
def _error(weight: jax.Array, scheme: str, axis: int) -> tuple[jax.Array, Any]:
    """The relative error, float32 (), and the quantized weight."""
    w = weight.astype(jnp.float32)
    is_static = number_formats.scheme(scheme).activations == "static"
    q = quantized.quantize(w, scheme, axis, **({"input_scale": jnp.float32(1)} if is_static else {}))
    return jnp.linalg.norm(w - weights.dense(q)) / jnp.maximum(jnp.linalg.norm(w), 1e-30), q
