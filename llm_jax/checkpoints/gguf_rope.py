"""Scalings of rotary positions in GGUF files: keys of the metadata, and the tensor rope_freqs.weight of Llama 3.1.

The tensor has a factor for each rotated pair, by which its frequency is divided. It follows from the `llama3` scaling
(code of Llama 3.1, apply_scaling), whose options are recovered from it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax.checkpoints.families import neutral
from llm_jax.errors import UserError
from llm_jax.model import rope
from llm_jax.schema import PositionConfig

# Letters of shapes: F frequencies (half the rotated width).

TENSOR = "rope_freqs.weight"
_LENGTH = 8192  # the trained length of Llama 3, used if a file has none
_TOLERANCE = 1e-5  # relative; the tensor is float32


def factors(position: PositionConfig, width: int) -> np.ndarray:
    """The content of rope_freqs.weight: float32 (F,), for a rotated width of 2 F."""
    unscaled = rope.SCALINGS["none"](position, width, None)
    return np.asarray(unscaled / rope.SCALINGS[position.scaling](position, width, None), np.float32)


def read_scaling(metadata: Mapping[str, Any], arch: str, pairs: np.ndarray | None, base: float) -> dict[str, Any]:
    """rope_scaling as in config.json; empty if positions are not scaled.

    A factor without a type scales linearly, as in llama.cpp.

    Args:
      metadata: of the file, of the architecture `arch`.
      pairs: the content of rope_freqs.weight, float32 (F,), if the file has it.
      base: of the frequencies.

    Raises:
      UserError: a scaling that is not supported.
    """

    def value(name: str, default: Any) -> Any:
        return metadata.get(f"{arch}.rope.{name}", default)

    factor = float(value("scaling.factor", 0.0) or value("scale_linear", 0.0) or 1.0)
    kind = value("scaling.type", "linear")
    original = value("scaling.original_context_length", None)
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"rope scaling {kind!r} is not read from GGUF files; expected none, linear or yarn")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {} if pairs is None else _from_pairs(np.asarray(pairs, np.float64), base, original)
    if pairs is not None:
        raise UserError(f"{TENSOR} together with rope scaling {kind!r} is not supported")
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}


def _from_pairs(pairs: np.ndarray, base: float, original: int | None) -> dict[str, Any]:
    """The scaling that divides the frequencies by the factors `pairs`, float64 (F,)."""
    if (pairs == 1).all():
        return {}
    if not np.isfinite(pairs).all() or pairs.min() < 1:
        raise UserError(f"{TENSOR} has values from {pairs.min():g} to {pairs.max():g}; expected at least 1")
    factor = float(pairs.max())
    usual = [(original or _LENGTH, 1.0, 4.0), (_LENGTH, 1.0, 4.0)]
    for length, low, high in [*usual, *_fitted(pairs, factor, base, original or _LENGTH)]:
        position = dataclasses.replace(
            neutral().position,
            base=base,
            scaling="llama3",
            scaling_factor=factor,
            original_length=length,
            low_freq_factor=low,
            high_freq_factor=high,
        )
        if np.allclose(factors(position, 2 * len(pairs)), pairs, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "original_max_position_embeddings": length,
                "low_freq_factor": low,
                "high_freq_factor": high,
            }
    raise UserError(f"{TENSOR} is not the llama3 scaling of any length; no other is supported")


def _fitted(pairs: np.ndarray, factor: float, base: float, length: int) -> list[tuple[int, float, float]]:
    """At most one (original length, low, high), from the pairs between the two bounds.

    The interpolation s of apply_scaling is linear in the turns of a pair per position, x: s = p x - q, with
    p = length / (high - low) and q = low / (high - low).
    """
    x = base ** -(np.arange(len(pairs), dtype=np.float64) / len(pairs)) / (2 * math.pi)
    s = (1 / pairs - 1 / factor) / (1 - 1 / factor)
    between = (s > _TOLERANCE) & (s < 1 - _TOLERANCE)
    if between.sum() > 1:
        p, minus_q = np.polyfit(x[between], s[between], 1)
        q = -minus_q
    else:  # any steep ramp between the last pair without a change and the first one with all of it
        above, below = x[s >= 1 - _TOLERANCE].min(initial=x[0] * 8), x[s <= _TOLERANCE].max()
        if above <= below:
            return []
        if between.any():
            center, height = float(x[between][0]), float(s[between][0])
        else:
            center, height = math.sqrt(above * below), 0.5
        p = 1.1 * max(height / (center - below), (1 - height) / (above - center))
        q = p * center - height
    span = length / p
    if not span > 0 or not q > 0:
        return []
    return [(length, _rounded(q * span), _rounded((q + 1) * span))]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
