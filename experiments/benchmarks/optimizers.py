"""What each optimizer costs: its training step and the size of its state beside those of AdamW, in one run.

    PYTHONPATH=. python experiments/benchmarks/optimizers.py [--rounds=7]

The kinds take turns round by round, so that a machine whose speed drifts slows all of them alike; the
table shows medians of the ratio to the AdamW step of the same round. It is written to optimizers.json.
"""

import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags

from llm_jax import cli, configuration, runtime, schema
from llm_jax.training import optim
from llm_jax.training.setup import setup

HERE = pathlib.Path(__file__).parent
ROWS, LENGTH = 8, 256  # those of configs/default.py, whose model this is

flags.DEFINE_integer("rounds", 7, "turns that are counted")


def main() -> None:
    runtime.retain_freed_memory()
    default = configuration.load("default")
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
    changes = {"optim.kind": name, "optim.ema_decay": 0.999 if ema else 0.0, "train.steps": 1000}
    parts = setup(configuration.replace(default, changes), default.tokenizer.vocab_size)
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, default.tokenizer.vocab_size)
    ones = jnp.ones_like(tokens)
    batch = {"inputs": tokens, "targets": tokens, "segments": ones, "mask": ones}
    batch["positions"] = jnp.cumsum(ones, 1) - 1
    state = parts.init()

    def run() -> None:
        nonlocal state
        state, metrics = parts.step(state, batch)
        jax.block_until_ready(metrics)

    return run, sum(leaf.nbytes for leaf in jax.tree.leaves((state.optimizer, state.ema))) / 2**20


if __name__ == "__main__":
    cli.run_script(main)
