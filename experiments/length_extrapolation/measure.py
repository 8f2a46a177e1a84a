"""The held-out loss of one run at several lengths, by both protocols, as it is or with rope's scalings.

The same targets are asked at every length: blocks spread over the held-out text, each as long as the
longest window. Protocols: `windows` cuts a block into windows that do not overlap (a target has none to
all of the window before it); `sliding` moves the window by half the trained length and counts its last
targets only (a target has almost a whole window before it).
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import checkpoints
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows
from llm_jax.model.transformer import Transformer
from llm_jax.training import losses

FACTORS = (1, 2, 4, 8)
_loss = jax.jit(losses.language_model, static_argnums=(0, 3))


def losses_by_length(run: pathlib.Path, original: int, blocks: int, scalings: Sequence[str] = ("",)) -> dict[str, Any]:
    """{scaling, or "as trained": {protocol: {factor of the length: nats a token}}} of a run.

    Args:
      original: the length that the model was first trained at.
      blocks: how many blocks of held-out text are asked.
      scalings: those of rope to apply now, by the factor of the length; "": the model as it was trained.
    """
    model, params, tokenizer = checkpoints.load(run, scan_layers=True)
    config = checkpoints.read_config(checkpoints.find(run))
    split = Source(config.data).corpus(tokenizer).validation
    table: dict[str, Any] = {}
    for scaling in scalings:
        for factor in FACTORS[1:] if scaling else FACTORS:
            scaled = model
            if scaling:
                # Dynamic scaling takes the factor from the length itself.
                settings: dict[str, Any] = {"scaling_factor": 1.0 if scaling == "dynamic" else float(factor)}
                position = dataclasses.replace(
                    model.config.position, scaling=scaling, original_length=original, **settings
                )
                scaled = Transformer(dataclasses.replace(model.config, position=position))
            by_protocol = table.setdefault(scaling or "as trained", {"windows": {}, "sliding": {}})
            length = factor * original
            for protocol, stride in (("windows", length), ("sliding", original // 2)):
                by_protocol[protocol][str(factor)] = mean_loss(
                    scaled, params, Rows(split, length, stride), original, blocks
                )
    return table


def mean_loss(model: Transformer, params, rows: Rows, original: int, blocks: int) -> float:
    """Nats per counted target over the rows that cover the blocks."""
    block = FACTORS[-1] * original
    per_block, last = block // rows.step, (len(rows.split.tokens) - 1) // block - 1
    starts = np.linspace(1, last, blocks).astype(int)  # the first has no context before it
    indexes = [b * per_block + i for b in starts for i in range(per_block)]
    size = min(len(indexes), max(1, 4096 // rows.seq_len))
    nats = count = 0.0
    for start in range(0, len(indexes), size):
        part = [rows[i] for i in indexes[start : start + size]]
        part += [rows[len(rows) + block] for _ in range(size - len(part))]  # padding
        batch = {name: jnp.asarray(np.stack([row[name] for row in part])) for name in part[0]}
        total, number = _loss(model, params, batch, 0)
        nats, count = nats + float(total), count + float(number)
    return nats / count
