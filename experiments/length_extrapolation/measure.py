"""The held-out loss of one run at several lengths, by both protocols, as it is or with rope's scalings.

    PYTHONPATH=. python experiments/length_extrapolation/measure.py --checkpoint=RUN --original_length=64 \\
        --output=FILE [--scalings]

The same targets are asked at every length: 32 blocks spread over the held-out text, each as long as the
longest window. Protocols: `windows` cuts a block into windows that do not overlap (a target has none to
all of the window before it); `sliding` moves the window by half the trained length and counts its last
targets only (a target has almost a whole window before it).
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from llm_jax import checkpoints, cli, runtime
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows
from llm_jax.model import rope
from llm_jax.model.transformer import Transformer
from llm_jax.research import experiments, provenance
from llm_jax.training import losses

FACTORS = (1, 2, 4, 8)
BLOCKS = 32

flags.DEFINE_string("checkpoint", None, "a run", required=True)
flags.DEFINE_string("output", None, "the JSON file", required=True)
flags.DEFINE_integer("original_length", None, "the length the model was first trained at", required=True)
flags.DEFINE_boolean("scalings", False, "also every scaling of rope, applied now, by the factor of the length")


def main() -> None:
    runtime.retain_freed_memory()
    f = flags.FLAGS
    origin = provenance.here("")
    model, params, tokenizer = checkpoints.load(f.checkpoint, scan_layers=True)
    config = checkpoints.read_config(checkpoints.find(f.checkpoint))
    split = Source(config.data).corpus(tokenizer).validation
    table: dict[str, Any] = {}
    for scaling in (s for s in rope.SCALINGS if s != "none") if f.scalings else [""]:
        for factor in FACTORS[1:] if scaling else FACTORS:
            scaled = model
            if scaling:
                # Dynamic scaling takes the factor from the length itself.
                settings: dict[str, Any] = {"scaling_factor": 1.0 if scaling == "dynamic" else float(factor)}
                position = dataclasses.replace(
                    model.config.position, scaling=scaling, original_length=f.original_length, **settings
                )
                scaled = Transformer(dataclasses.replace(model.config, position=position))
            found = table.setdefault(scaling or "as trained", {"windows": {}, "sliding": {}})
            length = factor * f.original_length
            for protocol, stride in (("windows", length), ("sliding", f.original_length // 2)):
                found[protocol][str(factor)] = mean_loss(scaled, params, Rows(split, length, stride), f.original_length)
            print(scaling or "as trained", {p: round(found[p][str(factor)], 4) for p in found}, flush=True)
    experiments.write_figures(pathlib.Path(f.output), table, origin)


def mean_loss(model: Transformer, params, rows: Rows, original: int) -> float:
    """Nats per counted target over the rows that cover the blocks."""
    block = FACTORS[-1] * original
    per_block, last = block // rows.step, (len(rows.split.tokens) - 1) // block - 1
    starts = np.linspace(1, last, BLOCKS).astype(int)  # the first has no context before it
    indexes = [b * per_block + i for b in starts for i in range(per_block)]
    size = max(1, 4096 // rows.seq_len)
    loss = jax.jit(lambda params, batch: losses.language_model(model, params, batch, 0))
    nats = count = 0.0
    for start in tqdm(range(0, len(indexes), size), leave=False, disable=None):
        part = [rows[i] for i in indexes[start : start + size]]
        part += [rows[len(rows) + block] for _ in range(size - len(part))]  # padding
        batch = {name: jnp.asarray(np.stack([row[name] for row in part])) for name in part[0]}
        total, number = loss(params, batch)
        nats, count = nats + float(total), count + float(number)
    return nats / count


if __name__ == "__main__":
    cli.run_script(main)
