"""The rotary settings of config.json: `read` and its inverse `write`."""

import math
from collections.abc import Mapping
from typing import Any

from llm_jax.errors import UserError
from llm_jax.schema import ModelConfig

_FORMER_NAMES = {"su": "longrope"}  # rope types under the names that earlier versions of transformers wrote


def read(c: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Changes of `model.position`: from rope_theta and rope_scaling, or from rope_parameters.

    Args:
      c: config.json.
      parameters: the rope_parameters, where config.json has several of them.

    Raises:
      KeyError: a number that the scaling needs is missing.
      UserError: the scaling is not supported.
    """
    rope = dict(parameters or c.get("rope_parameters") or c.get("rope_scaling") or {})
    if by_layer_type := [value for value in rope.values() if isinstance(value, dict)]:
        rope = dict(by_layer_type[0])
        if any(value != rope for value in by_layer_type):
            raise UserError("config.json: rope_parameters that differ by layer type are supported for gemma3_text only")
    kind: Any = rope.get("rope_type", rope.get("type", "default"))
    kind = _FORMER_NAMES.get(kind, kind)
    base = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    changes = {"position.kind": "rope", "position.base": float(base)}
    fraction = rope.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    if fraction is not None:
        changes["position.partial_rotary_factor"] = float(fraction)
    length = c.get("max_position_embeddings")
    original = (
        c.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or length or 2048
    )
    if kind == "default":
        return changes
    if kind == "dynamic":
        if rope.get("original_max_position_embeddings") not in (None, length):
            raise UserError("config.json: dynamic rope with original_max_position_embeddings is not supported")
        settings: dict[str, Any] = {"original_length": length}
    elif kind == "yarn":
        settings = {
            "original_length": original,
            "beta_fast": float(rope.get("beta_fast") or 32.0),
            "beta_slow": float(rope.get("beta_slow") or 1.0),
            "truncate": bool(rope.get("truncate", True)),
        }
    elif kind == "llama3":
        settings = {
            "original_length": original,
            "low_freq_factor": float(rope.get("low_freq_factor", 1.0)),
            "high_freq_factor": float(rope.get("high_freq_factor", 4.0)),
        }
    elif kind == "longrope":
        settings = {
            "original_length": original,
            "short_factors": rope["short_factor"],
            "long_factors": rope["long_factor"],
        }
    elif kind == "linear":
        settings = {}
    else:
        kinds = "default, linear, dynamic, yarn, llama3, longrope"
        raise UserError(f"config.json: rope_type is {kind!r}; expected one of {kinds}")
    factor = rope.get("factor")
    if factor is None and kind in ("yarn", "longrope") and length:
        factor = max(1.0, length / original)
    settings["scaling_factor"] = float(rope["factor"] if factor is None else factor)
    if kind in ("yarn", "longrope"):
        settings["attention_factor"] = _attention_factor(rope, settings["scaling_factor"])
    return changes | {"position.scaling": kind} | {f"position.{key}": value for key, value in settings.items()}


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """`model.position.attention_factor`; 0 where config.json does not deviate from the scaling's paper."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    scales: list[Any] = [rope.get(key) for key in ("mscale", "mscale_all_dim")]  # DeepSeek's; ignored unless both exist
    if not all(scales):
        return 0.0
    numerator, denominator = (0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0 for scale in scales)
    return numerator / denominator


def write(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`, as rope_theta and rope_scaling, which every version of transformers reads."""
    p = m.position
    changes: dict[str, Any] = {"rope_theta": p.base}
    if p.scaling == "none":
        return changes
    if p.scaling == "ntk":
        raise UserError("model.position.scaling=ntk has no name in Hugging Face's config.json; it cannot be written")
    scaling: dict[str, Any] = {"rope_type": p.scaling, "factor": p.scaling_factor}
    if p.scaling == "dynamic":
        changes["max_position_embeddings"] = p.original_length
    if p.scaling in ("yarn", "llama3", "longrope"):
        scaling["original_max_position_embeddings"] = p.original_length
    if p.scaling in ("yarn", "longrope") and p.attention_factor:
        scaling["attention_factor"] = p.attention_factor
    if p.scaling == "yarn":
        scaling |= {"beta_fast": p.beta_fast, "beta_slow": p.beta_slow}
        scaling |= {} if p.truncate else {"truncate": False}
    if p.scaling == "llama3":
        scaling |= {"low_freq_factor": p.low_freq_factor, "high_freq_factor": p.high_freq_factor}
    if p.scaling == "longrope":
        scaling |= {"short_factor": list(p.short_factors), "long_factor": list(p.long_factors)}
    return changes | {"rope_scaling": scaling}
