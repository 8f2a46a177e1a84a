"""Rotary positions: which frequencies, and how pairs are turned.

The scalings stretch the frequencies of a model trained on `original_length` positions:

    linear   all by `scaling_factor` (Chen et al. 2023, arXiv:2306.15595)
    ntk      a larger base, so that the fastest stay and the slowest are divided by `scaling_factor` (bloc97 2023)
    dynamic  the same, growing with the sequence once it is longer than `original_length` (emozilla 2023)
    yarn     by wavelength: fast ones stay, slow ones are divided, a ramp between, and scores a little
             sharper (Peng et al. 2023, arXiv:2309.00071, section 3)
    llama3   by wavelength, with a ramp in the frequency (Llama 3.1's code, apply_scaling)
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError
from llm_jax.schema import PositionConfig, choice

# Letters of shapes: B batch, T time, N heads, H head width, F frequencies (half the rotated width).


def check(c: PositionConfig, head_dim: int) -> None:
    """Raises UserError for a fraction that the head width does not admit, or a scaling without its settings."""
    width = c.partial_rotary_factor * head_dim
    if not 0 < c.partial_rotary_factor <= 1 or width != int(width) or int(width) % 2:
        raise UserError(
            f"model.position.partial_rotary_factor={c.partial_rotary_factor:g} of head_dim={head_dim} is {width:g}; "
            "rope rotates pairs: expected an even whole number above 0"
        )
    choice("model.position.scaling", c.scaling, SCALINGS)
    if c.scaling != "none" and c.scaling_factor < 1:
        raise UserError(f"config key 'model.position.scaling_factor' is {c.scaling_factor:g}; expected at least 1")
    if c.scaling in ("dynamic", "yarn", "llama3") and not c.original_length:
        raise UserError(f"model.position.scaling={c.scaling} needs model.position.original_length, the trained length")
    if c.scaling == "llama3" and not 0 < c.low_freq_factor < c.high_freq_factor:
        raise UserError(
            f"model.position.low_freq_factor is {c.low_freq_factor:g}; expected a number above 0 and below "
            f"model.position.high_freq_factor={c.high_freq_factor:g}"
        )


def rotate(c: PositionConfig, x: jax.Array, positions: jax.Array, length: jax.Array | None) -> jax.Array:
    """Turns the pairs of x (B, T, N, H) by their angles at `positions` (B, T), in float32 or wider.

    The first `partial_rotary_factor` of H is turned; pairs are (i, i + half of that), or neighbours (2i, 2i + 1)
    if `interleaved`. `length` int32 (B, T) is for the dynamic scaling alone.
    """
    width = int(c.partial_rotary_factor * x.shape[-1])
    wide = jnp.promote_types(jnp.float32, x.dtype)
    angles_BTF = positions[..., None].astype(jnp.float32) * frequencies(c, width, length)
    stretch = attention_factor(c)
    sin, cos = (f(angles_BTF)[:, :, None].astype(wide) * stretch for f in (jnp.sin, jnp.cos))
    turned, rest = x[..., :width].astype(wide), x[..., width:]
    if c.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    pair = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.stack(pair, -1).reshape(turned.shape) if c.interleaved else jnp.concatenate(pair, -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1) if rest.shape[-1] else turned.astype(x.dtype)


def frequencies(c: PositionConfig, width: int, length: jax.Array | None) -> jax.Array:
    """Radians per position of each pair, float32 (F,) or (B, T, F), by `model.position.scaling`."""
    return jnp.asarray(choice("model.position.scaling", c.scaling, SCALINGS)(c, width, length), jnp.float32)


def attention_factor(c: PositionConfig) -> float:
    """What YaRN multiplies queries and keys by: 0.1 ln(factor) + 1 (arXiv:2309.00071, equation 22)."""
    return 0.1 * math.log(c.scaling_factor) + 1 if c.scaling == "yarn" else 1.0


def _plain(c: PositionConfig, width: int, base: float | None = None) -> np.ndarray:
    return (base or c.base) ** -(np.arange(0, width, 2, dtype=np.float64) / width)


def _unscaled(c: PositionConfig, width: int, length: jax.Array | None) -> np.ndarray:
    return _plain(c, width)


def _linear(c: PositionConfig, width: int, length: jax.Array | None) -> np.ndarray:
    return _plain(c, width) / c.scaling_factor


def _ntk(c: PositionConfig, width: int, length: jax.Array | None) -> np.ndarray:
    return _plain(c, width, c.base * c.scaling_factor ** (width / max(width - 2, 1)))


def _dynamic(c: PositionConfig, width: int, length: jax.Array | None) -> jax.Array:
    assert length is not None
    length = jnp.maximum(length, c.original_length).astype(jnp.float32)
    growth = c.scaling_factor * length / c.original_length - (c.scaling_factor - 1)
    base = c.base * growth ** (width / max(width - 2, 1))
    return base[..., None] ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def _yarn(c: PositionConfig, width: int, length: jax.Array | None) -> np.ndarray:
    def dimension(turns: float) -> float:  # the pair that makes this many turns over the trained length
        return width * math.log(c.original_length / (turns * 2 * math.pi)) / (2 * math.log(c.base))

    low = max(math.floor(dimension(c.beta_fast)), 0)
    high = min(math.ceil(dimension(c.beta_slow)), width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
    plain = _plain(c, width)
    return plain / c.scaling_factor * ramp + plain * (1 - ramp)


def _llama3(c: PositionConfig, width: int, length: jax.Array | None) -> np.ndarray:
    plain = _plain(c, width)
    turns = c.original_length * plain / (2 * math.pi)  # over the trained length
    keep = np.clip((turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor), 0, 1)
    return keep * plain + (1 - keep) * plain / c.scaling_factor


SCALINGS: dict[str, Callable[[PositionConfig, int, jax.Array | None], np.ndarray | jax.Array]] = {
    "none": _unscaled,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
