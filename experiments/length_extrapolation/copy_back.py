"""P8: a small decoder copies the token k positions back; k is given by the first two tokens of the sequence.

A sequence is two digits of k (in base 5) and 40 random symbols; at symbol t the target is symbol t - k.
Accuracy is measured on the last 20 symbols, for three groups of offsets:

    seen        offsets that were trained at all positions
    new_place   offsets that were trained on the first 20 symbols only: both the offset and the positions (with other
                offsets) were trained, their combination was not
    new_offset  offsets that were never trained; their digits were, in other pairs
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import decoders
from llm_jax import configuration
from llm_jax.model.attention import TokenMetadata
from llm_jax.training.setup import setup

SYMBOLS, BASE, LENGTH, HALF = 16, 5, 40, 20
BATCH = 32
SETTING: dict[str, Any] = decoders.UNTIED | {
    "model.vocab_size": BASE + SYMBOLS,
    "model.num_layers": 2,
    "model.width": 64,
    "model.mlp_dim": 128,
    "optim.weight_decay": 0.01,
    "optim.lr": 3e-3,
    "train.batch_size": BATCH,
    "train.loss_chunk": 0,
}
GROUPS = {"seen": np.array([1, 2, 5, 7, 10, 11, 14, 15]), "new_place": np.array([3, 6, 9, 12])}
TRAINED = np.sort(np.concatenate(list(GROUPS.values())))
GROUPS["new_offset"] = np.array([4, 8, 13])


def sequences(key: jax.Array, offsets: jax.Array, size: int) -> dict[str, jax.Array]:
    """Random sequences whose offsets are drawn from `offsets`, as a batch; `mask` is 1 where symbol t - k exists."""
    draw, pick = jax.random.split(key)
    k = jax.random.choice(pick, offsets, (size,))
    symbols = jax.random.randint(draw, (size, LENGTH), BASE, BASE + SYMBOLS)
    inputs = jnp.concatenate([k[:, None] // BASE, k[:, None] % BASE, symbols], 1)
    t = jnp.arange(LENGTH) - k[:, None]
    targets = jnp.take_along_axis(symbols, jnp.maximum(t, 0), 1)
    pad = ((0, 0), (2, 0))
    positions = jnp.broadcast_to(jnp.arange(LENGTH + 2), inputs.shape)
    return {
        "inputs": inputs,
        "targets": jnp.pad(targets, pad),
        "mask": jnp.pad((t >= 0).astype(jnp.int32), pad),
        "positions": positions,
        "segments": jnp.ones_like(positions),
        "k": k,
    }


def training_batch(key: jax.Array) -> dict[str, jax.Array]:
    batch = sequences(key, jnp.asarray(TRAINED), BATCH)
    hidden = jnp.isin(batch.pop("k"), GROUPS["new_place"])[:, None] & (batch["positions"] >= 2 + HALF)
    return batch | {"mask": jnp.where(hidden, 0, batch["mask"])}


def accuracies(kind: str, seed: int, steps: int) -> dict[str, float]:
    """Accuracies on the last symbols of a model that is trained for `steps` steps, by group of offsets."""
    changes = {"model.position.kind": kind, "train.steps": steps, "train.seed": seed}
    parts = setup(configuration.load("default", SETTING | changes))

    @jax.jit
    def accuracy(params, offsets):
        batch = sequences(jax.random.key(7), offsets, 512)
        metadata = TokenMetadata(batch["positions"], batch["segments"])
        logits: Any = parts.model.apply({"params": params}, batch["inputs"], metadata)
        right = jnp.argmax(logits, -1) == batch["targets"]
        counted = batch["mask"] * (batch["positions"] >= 2 + HALF)
        return jnp.sum(right * counted) / jnp.sum(counted)

    params = decoders.train(parts, None, training_batch, jax.random.key(1000 + seed))
    return {name: float(accuracy(params, jnp.asarray(offsets))) for name, offsets in GROUPS.items()}
