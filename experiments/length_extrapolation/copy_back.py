"""P8: copy the token k places back, where k is told in two digits, by one position scheme and one seed.

A sequence is two digits of k (in base 5) and 40 random symbols; at symbol t the target is symbol t - k.
Three groups of targets tell learning from knowing how places relate:

    seen        offsets that were trained at all places
    new_place   offsets that were trained at the first 20 symbols only, asked at the last 20: both the
                offset and the places (by other offsets) were trained, the pair was not
    new_offset  offsets that were never trained; their digits were, in other pairs
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import configuration
from llm_jax.model.attention import Tokens
from llm_jax.training.setup import setup

SYMBOLS, BASE, LENGTH, HALF = 16, 5, 40, 20
OFFSETS = np.arange(1, 16)
NEW_PLACE, NEW_OFFSET = np.array([3, 6, 9, 12]), np.array([4, 8, 13])
BATCH = 32


def sequences(key: jax.Array, offsets: jax.Array, size: int) -> dict[str, jax.Array]:
    """Random sequences whose offsets are drawn from `offsets`, as a batch; `mask` counts what can be asked."""
    draw, pick = jax.random.split(key)
    k = jax.random.choice(pick, offsets, (size,))
    symbols = jax.random.randint(draw, (size, LENGTH), BASE, BASE + SYMBOLS)
    inputs = jnp.concatenate([k[:, None] // BASE, k[:, None] % BASE, symbols], 1)
    t = jnp.arange(LENGTH) - k[:, None]
    targets = jnp.take_along_axis(symbols, jnp.maximum(t, 0), 1)
    pad = ((0, 0), (2, 0))
    count = jnp.broadcast_to(jnp.arange(LENGTH + 2), inputs.shape)
    return {
        "inputs": inputs,
        "targets": jnp.pad(targets, pad),
        "mask": jnp.pad((t >= 0).astype(jnp.int32), pad),
        "positions": count,
        "segments": jnp.ones_like(count),
        "k": k,
    }


def training_batch(key: jax.Array) -> dict[str, jax.Array]:
    batch = sequences(key, jnp.asarray(np.setdiff1d(OFFSETS, NEW_OFFSET)), BATCH)
    hidden = jnp.isin(batch.pop("k"), NEW_PLACE)[:, None] & (batch["positions"] >= 2 + HALF)
    return batch | {"mask": jnp.where(hidden, 0, batch["mask"])}


def accuracies(kind: str, seed: int, steps: int) -> dict[str, float]:
    """Accuracies of a model that was trained for `steps`, by group of targets."""
    default = configuration.load(pathlib.Path(__file__).with_name("config.py"))
    position = dataclasses.replace(default.model.position, kind=kind)
    shape = {"vocab_size": BASE + SYMBOLS, "num_layers": 2, "width": 64, "mlp_dim": 128}
    config = dataclasses.replace(
        default,
        model=dataclasses.replace(default.model, **shape, position=position),
        optim=dataclasses.replace(default.optim, weight_decay=0.01, lr=3e-3),
        train=dataclasses.replace(default.train, steps=steps, seed=seed, batch_size=BATCH, loss_chunk=0),
    )
    parts = setup(config)
    model = parts.model

    @jax.jit
    def batches(steps):
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(1000 + seed)))(steps)
        return jax.lax.map(training_batch, keys)

    @jax.jit
    def accuracy(params, offsets):
        batch = sequences(jax.random.key(7), offsets, 512)
        where = Tokens(batch["positions"], batch["segments"])
        logits: Any = model.apply({"params": params}, batch["inputs"], where)
        right = jnp.argmax(logits, -1) == batch["targets"]
        counted = batch["mask"] * (batch["positions"] >= 2 + HALF)
        return jnp.sum(right * counted) / jnp.sum(counted)

    state = parts.init()
    for start in range(0, steps, 100):
        state, _ = parts.scan(state, batches(jnp.arange(start, min(start + 100, steps))))
    seen = np.setdiff1d(OFFSETS, np.concatenate([NEW_PLACE, NEW_OFFSET]))
    groups = {"seen": seen, "new_place": NEW_PLACE, "new_offset": NEW_OFFSET}
    # The last symbols in all groups, so that they differ in what was trained alone.
    return {name: float(accuracy(state.params, jnp.asarray(offsets))) for name, offsets in groups.items()}
