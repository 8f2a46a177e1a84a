"""Adapters that are not at their start, and the dense reference they are compared with."""

import dataclasses

import jax
import numpy as np

from llm_jax import lora, trees

IDS = np.random.RandomState(0).randint(3, 259, (4, 12))
_init = jax.jit(lora.init, static_argnums=2)


def config(tiny, **changes):
    return dataclasses.replace(tiny.lora, **({"rank": 3, "alpha": 6.0} | changes))


def made(base, settings, seed=0):
    """An adapter tree with every trained entry moved away from its start."""
    adapters = _init(jax.random.key(seed), base, settings)
    trained, fixed = lora.split(adapters, settings.variant)
    draw = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size + seed), x.shape, x.dtype)  # noqa: E731
    return lora.join(jax.tree.map(draw, trained), fixed)


def dense(base, adapters):
    """numpy, in float64: W + scale a b, for DoRA with its columns brought to the lengths `magnitude`."""
    flat = {path: np.asarray(w, np.float64) for path, w in trees.flatten(base).items()}
    parts = {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(adapters).items()}
    for path in {name.rsplit("/", 1)[0] for name in parts}:
        a, b, scale = (parts[f"{path}/{n}"] for n in ("a", "b", "scale"))
        scale = scale[..., None, None]
        w = flat[path]
        if f"{path}/start_a" in parts:
            w = w - scale * (parts[f"{path}/start_a"] @ parts[f"{path}/start_b"])
        w = w + scale * (a @ b)
        if f"{path}/magnitude" in parts:
            w = w * (parts[f"{path}/magnitude"] / np.linalg.norm(w, axis=-2))[..., None, :]
        flat[path] = w
    return trees.unflatten(flat)
