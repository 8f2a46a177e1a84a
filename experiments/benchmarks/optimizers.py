"""What each optimizer costs: its training step and the size of its state beside those of AdamW, in one run.

    PYTHONPATH=. python experiments/benchmarks/optimizers.py [--rounds=7]

The kinds take turns round by round, so that a machine whose speed drifts slows all of them alike; the
table shows medians of the ratio to the AdamW step of the same round. It is written to optimizers.json.
"""

import dataclasses
import json
import pathlib
import runpy
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags

from llm_jax import cli, schema
from llm_jax import configuration as config_lib
from llm_jax.model.transformer import Transformer
from llm_jax.training import losses, optim, step

HERE = pathlib.Path(__file__).parent
ROWS, LENGTH = 8, 256  # those of configs/default.py, whose model this is

flags.DEFINE_integer("rounds", 7, "turns that are counted")


def main() -> None:
    cli.keep_memory()
    default = config_lib.build(runpy.run_path(str(HERE.parents[1] / "configs" / "default.py"))["get_config"]())
    runs, sizes = {}, {}
    for kind in ("adamw", *sorted(set(optim.OPTIMIZERS) - {"adamw"}), "adamw, ema"):
        runs[kind], sizes[kind] = training(default, kind)
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for turn in range(flags.FLAGS.rounds + 1):
        for kind, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first turn compiles
                seconds[kind].append(time.perf_counter() - start)
        print(f"turn {turn} of {flags.FLAGS.rounds}", flush=True)
    table = {
        kind: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(times, seconds["adamw"], strict=True)),
            "state_mib": sizes[kind],
        }
        for kind, times in seconds.items()
    }
    print("| kind | training step, s | x adamw | state, MiB |\n|---|---|---|---|")
    for kind, row in table.items():
        print(f"| {kind} | {row['seconds']:.3f} | {row['ratio']:.2f} | {row['state_mib']:.1f} |")
    found = {"rows": ROWS, "length": LENGTH, "jax": jax.__version__, "table": table}
    (HERE / "optimizers.json").write_text(json.dumps(found, indent=1) + "\n")


def training(default: schema.Config, kind: str):
    """(a function that takes one step on one batch and waits for it, MiB of what is kept beside the weights)."""
    name, _, ema = kind.partition(", ")
    rule = dataclasses.replace(default.optim, kind=name, ema_decay=0.999 if ema else 0.0)
    model = Transformer(dataclasses.replace(default.model, vocab_size=default.tokenizer.vocab_size))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    optimizer = optim.make(rule, 1000, params)
    made = step.make(
        losses.make(default.loss, model, 0), optimizer, optim.schedule(rule, 1000), 0, 1, ema_decay=rule.ema_decay
    )
    one = jax.jit(made, donate_argnums=0)
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, default.tokenizer.vocab_size)
    ones = jnp.ones_like(tokens)
    batch = {"inputs": tokens, "targets": tokens, "segments": ones, "mask": ones}
    batch["positions"] = jnp.cumsum(ones, 1) - 1
    state = jax.jit(lambda p: step.init(optimizer, p, bool(ema)))(params)

    def run() -> None:
        nonlocal state
        state, metrics = one(state, None, batch)
        jax.block_until_ready(metrics)

    return run, sum(leaf.nbytes for leaf in jax.tree.leaves((state.optimizer, state.ema))) / 2**20


if __name__ == "__main__":
    cli.run(main)
