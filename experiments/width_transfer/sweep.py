"""Does the best learning rate of a narrow model stay the best when it grows wider, with and without μP?

    PYTHONPATH=. python experiments/width_transfer/sweep.py [--widths=32,128,256] [--seeds=5]

Trains every width at every rate from every seed, twice: with model.base_width (μP) and without. What is
done is kept in --runs and not done again: the same command goes on where it was stopped. Writes
results.json and the tables in README.md.
"""

import dataclasses
import json
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.width_transfer import report
from llm_jax import cli, files, runtime
from llm_jax import configuration as config_lib
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows, Shuffled
from llm_jax.training.setup import Setup, setup

HERE = pathlib.Path(__file__).parent

flags.DEFINE_list("widths", ["32", "128", "256"], "the first is the base width")
flags.DEFINE_list("powers", ["-9", "-8", "-7", "-6", "-5", "-4", "-3", "-2"], "the rates, as powers of two")
flags.DEFINE_integer("seeds", 5, "runs of each kind")
flags.DEFINE_integer("held_rows", 256, "rows of held-out text that a run is judged by")
flags.DEFINE_string("runs", "runs/width_transfer.json", "where finished runs are kept")


def main() -> None:
    runtime.retain_freed_memory()
    f = flags.FLAGS
    widths, powers = [int(w) for w in f.widths], [int(p) for p in f.powers]
    recipe = runpy.run_path(str(HERE / "config.py"))
    base = config_lib.build(recipe["get_config"]())
    source = Source(base.data)
    tokenizer = source.tokenizer(base.tokenizer)
    corpus = source.corpus(tokenizer)
    c, kept = base.train, pathlib.Path(f.runs)
    held = stacked(Rows(corpus.validation, c.seq_len), f.held_rows)
    kept.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(kept.read_text()) if kept.exists() else {}
    batches = [
        jax.tree.map(
            lambda a: a.reshape(c.steps, c.batch_size, -1),
            stacked(Shuffled(Rows(corpus.train, c.seq_len), seed), c.steps * c.batch_size),
        )
        for seed in range(f.seeds)
    ]
    bar = tqdm(total=2 * len(widths) * len(powers) * f.seeds, desc="runs", disable=None)
    for width in widths:
        for transfer in report.KINDS:
            heads = width // recipe["HEAD_WIDTH"]
            model = dataclasses.replace(
                base.model, vocab_size=tokenizer.vocab_size, width=width, mlp_dim=2 * width, num_heads=heads,
                num_kv_heads=heads, base_width=widths[0] if transfer == "μP" else 0,
            )  # fmt: skip
            for power in powers:
                rate = dataclasses.replace(base.optim, lr=2.0**power)
                parts = setup(dataclasses.replace(base, model=model, optim=rate))
                for seed in range(f.seeds):
                    key = f"{transfer} {width} {power} {seed}"
                    if width == widths[0]:  # nothing is scaled there: both are one run
                        twin = f"{report.KINDS[0]} {width} {power} {seed}"
                        found |= {key: found[twin]} if twin in found else {}
                    if key not in found:
                        loss = held_out_loss(parts, seed, batches[seed], held)
                        found[key] = loss if math.isfinite(loss) else None  # diverged
                        files.write_json(kept, found)
                    bar.update()
    bar.close()
    print(report.write(HERE, found, widths, powers, f.seeds))


def stacked(rows, count: int):
    """The first rows, as arrays (count, T)."""
    made = [rows[i] for i in range(count)]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def held_out_loss(parts: Setup, seed: int, batches, held) -> float:
    """The held-out loss after training from the initial weights of `seed`, nats a token.

    Args:
      batches: int32 (steps, B, T) each. held: int32 (rows, T) each.
    """
    init = jax.jit(parts.model.init)
    params = init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    state, _ = parts.scan(parts.init(params), batches)
    total, count = parts.loss(state.params, {}, held)
    return float(total / count)


if __name__ == "__main__":
    cli.run_script(main)
