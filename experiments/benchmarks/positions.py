"""What each position scheme costs: its training step and its decode step beside those of rope, in one run.

    python experiments/benchmarks/positions.py [--length=2048] [--rounds=5]

The kinds take turns round by round, so that a machine whose speed drifts slows all of them alike; the
table shows medians of the ratio to the rope step of the same round. It is written to positions.json.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from llm_jax import cli, configuration, runtime, schema
from llm_jax.model import positions
from llm_jax.model.attention import Tokens
from llm_jax.model.transformer import Transformer, init_cache
from llm_jax.training.setup import setup

HERE = pathlib.Path(__file__).parent
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "width": 512,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 8,
    "mlp_dim": 1408,
}

flags.DEFINE_integer("length", 2048, "tokens in a sequence, and slots of the cache")
flags.DEFINE_integer("rounds", 5, "turns that are counted")


def main() -> None:
    runtime.retain_freed_memory()
    length = flags.FLAGS.length
    default = configuration.load("default")
    runs = {
        kind: {"train": training(default, kind, length), "decode": decoding(default, kind, length)}
        for kind in positions.SCHEMES
    }
    seconds: dict[str, dict[str, list[float]]] = {k: {"train": [], "decode": []} for k in runs}
    for turn in range(flags.FLAGS.rounds + 1):
        for job in ("train", "decode"):
            for kind, jobs in runs.items():
                took = jobs[job]()
                if turn:  # the first turn warms up
                    seconds[kind][job].append(took)
        print(f"turn {turn} of {flags.FLAGS.rounds}", flush=True)
    table = {}
    print(f"{'kind':<12} {'train step':>12} {'x rope':>8} {'decode step':>14} {'x rope':>8}")
    for kind, found in seconds.items():
        row = {}
        for job, times in found.items():
            row[job] = {
                "seconds": statistics.median(times),
                "ratio": statistics.median(a / b for a, b in zip(times, seconds["rope"][job], strict=True)),
            }
        table[kind] = row
        print(
            f"{kind:<12} {row['train']['seconds']:>10.3f} s {row['train']['ratio']:>8.2f} "
            f"{row['decode']['seconds'] * 1e3 / STEPS:>11.2f} ms {row['decode']['ratio']:>8.2f}"
        )
    (HERE / "positions.json").write_text(
        json.dumps({"length": length, "jax": jax.__version__, "table": table}, indent=1) + "\n"
    )


def model_config(default: schema.Config, kind: str, **changes) -> schema.ModelConfig:
    position = dataclasses.replace(default.model.position, kind=kind, max_length=flags.FLAGS.length)
    return dataclasses.replace(default.model, **SHAPE, position=position, **changes)


def training(default: schema.Config, kind: str, length: int):
    """A function that takes one optimizer step on one sequence: its seconds."""
    train = dataclasses.replace(default.train, steps=1000, batch_size=1, seq_len=length, loss_chunk=0)
    parts = setup(dataclasses.replace(default, model=model_config(default, kind), train=train))
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, SHAPE["vocab_size"])
    batch = {
        "inputs": tokens,
        "targets": tokens,
        "positions": jnp.arange(length)[None],
        "segments": jnp.ones_like(tokens),
        "mask": jnp.ones_like(tokens),
    }
    state = parts.init()

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = parts.step(state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    return run


STEPS = 64


def decoding(default: schema.Config, kind: str, length: int):
    """A function that decodes the last `STEPS` tokens of a full cache: its seconds."""
    model = Transformer(model_config(default, kind, scan_layers=False))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    empty = init_cache(model.config, 1, length)
    slots = jnp.arange(length)[None]
    full = dataclasses.replace(
        empty, tokens=Tokens(slots, (slots < length - STEPS).astype(jnp.int32)), index=jnp.int32(length - STEPS)
    )

    @jax.jit
    def many(params, cache):
        def body(i, carry):
            cache, ids = carry
            where = Tokens(cache.index[None, None], jnp.ones((1, 1), jnp.int32))
            logits, cache = model.apply({"params": params}, ids, where, cache)
            return cache, jnp.argmax(logits, -1).astype(jnp.int32)

        return jax.lax.fori_loop(0, STEPS, body, (cache, jnp.zeros((1, 1), jnp.int32)))[1]

    def run() -> float:
        # Where weights happen to lie in memory is worth a factor of up to two: another place every turn.
        placed = jax.block_until_ready(jax.tree.map(jnp.copy, params))
        start = time.perf_counter()
        jax.block_until_ready(many(placed, full))
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    cli.run_script(main)
