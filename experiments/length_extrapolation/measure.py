"""The held-out loss of a run at several lengths, by two protocols, with or without a scaling of rope.

Every length has the same targets: blocks spread over the held-out text, each as long as the longest window. Protocol
`windows` splits a block into windows that do not overlap, so that the context of a target is between nothing and a
whole window; `sliding` moves the window by half the trained length and counts only its last targets, so that each has
almost a whole window of context.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from experiments import decoders
from llm_jax import checkpoints
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows
from llm_jax.model.transformer import Transformer
from llm_jax.training import losses

FACTORS = (1, 2, 4, 8)
Losses = dict[str, dict[str, float]]  # nats per token by protocol and factor of the length

_loss = jax.jit(losses.language_model, static_argnums=(0, 3))


def losses_by_length(run: pathlib.Path, original: int, blocks: int, scaling: str = "") -> Losses:
    """The held-out losses of a run.

    Args:
      original: the length that the model was first trained at.
      blocks: number of blocks of held-out text.
      scaling: of rope, by the factor of the length; "": the model as it was trained.
    """
    model, params, tokenizer = checkpoints.load(run, scan_layers=True)
    split = Source(checkpoints.read_config(checkpoints.find(run)).data).corpus(tokenizer).validation
    by_protocol: Losses = {"windows": {}, "sliding": {}}
    for factor in FACTORS:
        scaled, length = model, factor * original
        if scaling and factor > 1:
            # Dynamic scaling takes the factor from the length itself.
            settings: dict[str, Any] = {"scaling_factor": 1.0 if scaling == "dynamic" else float(factor)}
            settings |= {"scaling": scaling, "original_length": original}
            position = dataclasses.replace(model.config.position, **settings)
            scaled = Transformer(dataclasses.replace(model.config, position=position))
        for protocol, stride in (("windows", length), ("sliding", original // 2)):
            rows = Rows(split, length, stride)
            by_protocol[protocol][str(factor)] = mean_loss(scaled, params, rows, FACTORS[-1] * original, blocks)
    return by_protocol


def mean_loss(model: Transformer, params: Any, rows: Rows, block: int, blocks: int) -> float:
    """Nats per counted target over the rows that cover `blocks` blocks of `block` tokens."""
    per_block, last = block // rows.step, (len(rows.split.tokens) - 1) // block - 1
    starts = np.linspace(1, last, blocks).astype(int)  # the first has no context before it
    covering = [rows[start * per_block + i] for start in starts for i in range(per_block)]
    size = min(len(covering), max(1, 4096 // rows.seq_len))
    covering += [rows[len(rows) + block]] * (-len(covering) % size)  # padding
    batches = (decoders.stack(covering[i : i + size]) for i in range(0, len(covering), size))
    nats, count = np.array([jax.device_get(_loss(model, params, batch, 0)) for batch in batches], float).sum(0)
    return float(nats / count)
