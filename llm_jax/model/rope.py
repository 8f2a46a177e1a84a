"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): frequencies, their scalings, and the rotation.

A scaling adapts the frequencies of a model trained on `original_length` positions to longer sequences:

    linear   divides all frequencies by `scaling_factor` (Chen et al. 2023, arXiv:2306.15595)
    ntk      enlarges the base: the highest frequency is kept, and the lowest is divided by `scaling_factor`
             (bloc97 2023)
    dynamic  like ntk, with a factor that grows with the sequence beyond `original_length` (emozilla 2023)
    yarn     keeps high frequencies, divides low ones by `scaling_factor`, interpolates between them, and scales the
             attention scores (Peng et al. 2023, arXiv:2309.00071, section 3)
    llama3   like yarn, with an interpolation that is linear in the frequency, and without a scale of the scores
             (code of Llama 3.1, apply_scaling)
    longrope divides each frequency by a separate factor, from `short_factors` in documents of up to
             `original_length` tokens and from `long_factors` in longer ones, and scales the attention scores
             (Ding et al. 2024, arXiv:2402.13753)
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError
from llm_jax.kernels import target
from llm_jax.schema import PositionConfig, choice

# Letters of shapes: B batch, T time, N heads, H head width, F frequencies (half the rotated width).


def check(c: PositionConfig, head_dim: int) -> None:
    """Checks the options of rotary position embeddings.

    Raises:
      UserError: `partial_rotary_factor` does not give an even rotated width, or the options of a scaling are missing
        or out of range.
    """
    width = c.partial_rotary_factor * head_dim
    if not 0 < c.partial_rotary_factor <= 1 or width != int(width) or int(width) % 2:
        raise UserError(
            f"model.position.partial_rotary_factor={c.partial_rotary_factor:g} of head_dim={head_dim} is {width:g}; "
            "rope rotates pairs: expected an even whole number above 0"
        )
    choice("model.position.scaling", c.scaling, SCALINGS)
    if c.scaling != "none" and c.scaling_factor < 1:
        raise UserError(f"config key 'model.position.scaling_factor' is {c.scaling_factor:g}; expected at least 1")
    if c.scaling in ("dynamic", "yarn", "llama3", "longrope") and not c.original_length:
        raise UserError(f"model.position.scaling={c.scaling} needs model.position.original_length, the trained length")
    if c.scaling == "llama3" and not 0 < c.low_freq_factor < c.high_freq_factor:
        raise UserError(
            f"model.position.low_freq_factor is {c.low_freq_factor:g}; expected a number above 0 and below "
            f"model.position.high_freq_factor={c.high_freq_factor:g}"
        )
    for name, factors in (("short_factors", c.short_factors), ("long_factors", c.long_factors)):
        if c.scaling == "longrope" and (len(factors) != width // 2 or min(factors) <= 0):
            raise UserError(
                f"model.position.{name} has {len(factors)} numbers with the minimum {min(factors, default=0):g}; "
                f"expected {int(width) // 2} positive numbers, one for each rotated pair"
            )


def rotate(c: PositionConfig, x: jax.Array, positions: jax.Array, length: jax.Array | None) -> jax.Array:
    """Rotates pairs of features by angles proportional to the position (arXiv:2104.09864, equation 34).

    The first R = partial_rotary_factor * H features are rotated. Pairs are (i, i + R / 2), or (2i, 2i + 1) if
    `interleaved`. Computed in float32, or in float64 if x is.

    Args:
      x: queries or keys, float (B, T, N, H).
      positions: int32 (B, T).
      length: int32 (B, T), the current length of the document of each token; only the scalings in
        `LENGTH_DEPENDENT` read it.

    Returns:
      (B, T, N, H) in the dtype of x.
    """
    width = int(c.partial_rotary_factor * x.shape[-1])
    wide = jnp.promote_types(jnp.float32, x.dtype)
    angles_BTF = positions[..., None].astype(jnp.float32) * frequencies(c, width, length)
    factor = attention_factor(c)
    sin, cos = (values_BTF[:, :, None].astype(wide) * factor for values_BTF in _sin_cos(angles_BTF))
    rotary, unrotated = x[..., :width].astype(wide), x[..., width:]
    if c.interleaved:
        first, second = rotary[..., ::2], rotary[..., 1::2]
    else:
        first, second = jnp.split(rotary, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rotary = jnp.stack(rotated, -1).reshape(rotary.shape) if c.interleaved else jnp.concatenate(rotated, -1)
    return jnp.concatenate([rotary.astype(x.dtype), unrotated], -1) if unrotated.shape[-1] else rotary.astype(x.dtype)


def _sin_cos(angles_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sines and cosines of angles, float32 (B, T, F) each."""
    functions = (jnp.sin, jnp.cos)
    if target.platform() != "cpu" or angles_BTF.shape[1] == 1:
        return functions[0](angles_BTF), functions[1](angles_BTF)
    # XLA for CPUs would compute them again for every head and use, where they take longer than the rotation. It does
    # not fuse the body of a loop with operations outside it.
    sin, cos = jax.lax.map(lambda i: jax.lax.switch(i, functions, angles_BTF), jnp.arange(2))
    return sin, cos


def frequencies(c: PositionConfig, width: int, length: jax.Array | None) -> jax.Array:
    """Frequency of each pair in radians per position, scaled by `model.position.scaling`.

    Args:
      width: number of rotated features, 2 F.
      length: int32 (B, T), for the scalings in `LENGTH_DEPENDENT`; otherwise unused.

    Returns:
      float32 (F,), or (B, T, F) with a scaling in `LENGTH_DEPENDENT`.
    """
    return jnp.asarray(choice("model.position.scaling", c.scaling, SCALINGS)(c, width, length), jnp.float32)


def frequency_index(c: PositionConfig, length: jax.Array) -> jax.Array:
    """Maps lengths to numbers that are equal if the frequencies are equal: int32 (...) -> int32 (...)."""
    if c.scaling == "longrope":
        return (length > c.original_length).astype(jnp.int32)
    return jnp.maximum(length, c.original_length)


def attention_factor(c: PositionConfig) -> float:
    """Factor of rotated queries and keys: `model.position.attention_factor`; if it is 0, the formula of the paper.

    It is 0.1 ln(scaling_factor) + 1 for YaRN (arXiv:2309.00071, eq. 22), sqrt(1 + ln(scaling_factor) /
    ln(original_length)) for longrope (arXiv:2402.13753, section 3.3), and 1 for the other scalings.
    """
    if c.scaling not in ("yarn", "longrope"):
        return 1.0
    if c.attention_factor:
        return c.attention_factor
    if c.scaling == "yarn":
        return 0.1 * math.log(c.scaling_factor) + 1
    return math.sqrt(1 + math.log(c.scaling_factor) / math.log(c.original_length))


def _base_frequencies(c: PositionConfig, width: int, base: float | None = None) -> np.ndarray:
    return (base or c.base) ** -(np.arange(0, width, 2, dtype=np.float64) / width)


def _unscaled(c: PositionConfig, width: int, length: jax.Array | None) -> np.ndarray:
    return _base_frequencies(c, width)


def _linear(c: PositionConfig, width: int, length: jax.Array | None) -> np.ndarray:
    return _base_frequencies(c, width) / c.scaling_factor


def _ntk(c: PositionConfig, width: int, length: jax.Array | None) -> np.ndarray:
    return _base_frequencies(c, width, c.base * c.scaling_factor ** (width / max(width - 2, 1)))


def _dynamic(c: PositionConfig, width: int, length: jax.Array | None) -> jax.Array:
    assert length is not None
    length = frequency_index(c, length).astype(jnp.float32)
    growth = c.scaling_factor * length / c.original_length - (c.scaling_factor - 1)
    base = c.base * growth ** (width / max(width - 2, 1))
    return base[..., None] ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def _yarn(c: PositionConfig, width: int, length: jax.Array | None) -> np.ndarray:
    def pair_index(rotations: float) -> float:  # index of the pair with this number of rotations over original_length
        return width * math.log(c.original_length / (rotations * 2 * math.pi)) / (2 * math.log(c.base))

    low, high = pair_index(c.beta_fast), pair_index(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
    unscaled = _base_frequencies(c, width)
    return unscaled / c.scaling_factor * ramp + unscaled * (1 - ramp)


def _llama3(c: PositionConfig, width: int, length: jax.Array | None) -> np.ndarray:
    unscaled = _base_frequencies(c, width)
    rotations = c.original_length * unscaled / (2 * math.pi)  # over original_length
    ramp = np.clip((rotations - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor), 0, 1)
    return ramp * unscaled + (1 - ramp) * unscaled / c.scaling_factor


def _longrope(c: PositionConfig, width: int, length: jax.Array | None) -> jax.Array:
    assert length is not None
    unscaled = _base_frequencies(c, width)
    short, long = (jnp.asarray(unscaled / np.array(f), jnp.float32) for f in (c.short_factors, c.long_factors))
    return jnp.where(frequency_index(c, length)[..., None] == 1, long, short)


SCALINGS: dict[str, Callable[[PositionConfig, int, jax.Array | None], np.ndarray | jax.Array]] = {
    "none": _unscaled,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
LENGTH_DEPENDENT = ("dynamic", "longrope")  # scalings whose frequencies depend on the length of the document
