"""Decoding a real model (SmolLM2-135M) with quantized weights beside its float32 weights, in one run on the same cores.

    PYTHONPATH=. python experiments/benchmarks/kernels.py [--rounds=5] [--schemes=int8,int4,nf4] [--batches=1]
    LLM_JAX_KERNELS=xla PYTHONPATH=. python experiments/benchmarks/kernels.py ...     the same without the kernels

All take turns, round by round, so that a machine whose speed drifts slows all of them alike; a ratio is that of two
neighbours in one round. Embedding table and head are int8 (`--head`), as `python -m llm_jax.quantize` makes them.
Decoding is greedy, from a prompt of 16 tokens; its time is that of 32 new tokens minus that of one. "products" are the
products of one token with the weights and nothing else: a step minus its products is what all else costs. "load" is the
average number of runnable processes over a minute: above the number of cores, times on the clock say little, and the
figures by the processor's own time are those to read. Writes kernels.json.
"""

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from llm_jax import checkpoints, cli, runtime, trees, weights
from llm_jax.decoding import loop
from llm_jax.decoding.options import DecodingOptions
from llm_jax.kernels import native
from llm_jax.quant import post_training

RESULTS = pathlib.Path(__file__).with_suffix(".json")
MODEL = "asset:smollm2-135m-instruct"
PROMPT, NEW, LONG = 16, 31, 512

flags.DEFINE_integer("rounds", 5, "rounds that are counted")
flags.DEFINE_list("schemes", ["int8", "int4", "nf4"], "schemes of the weights of layers")
flags.DEFINE_string("head", "int8", "scheme of the embedding table and the head")
flags.DEFINE_multi_integer("batches", [1], "rows decoded at a time")
flags.DEFINE_bool("prefill", False, f"time the prefill of {LONG} tokens too")

Times = tuple[float, float]  # seconds on the clock, and of the processor


def main() -> None:
    f = flags.FLAGS
    runtime.retain_freed_memory()
    model, dense, _ = checkpoints.load(MODEL)
    model, dense = loop.unrolled(model, dense)
    forms = {"float32": dense}
    for scheme in f.schemes:
        forms[scheme] = post_training.quantize_params(dense, post_training.rules(scheme, f.head), "--schemes")
    tasks: dict[str, tuple[float, Callable[[], Times]]] = {}
    for name, params in forms.items():
        for batch in f.batches:
            tasks[f"{name} decode {batch}"] = batch * NEW, decoding(model, params, batch)
        tasks[f"{name} products"] = NEW, products(params)
        if f.prefill:
            tasks[f"{name} prefill {LONG}"] = LONG, prefill(model, params)
    rates: dict[str, list[Times]] = {name: [] for name in tasks}
    busy: list[float] = []
    for turn in range(f.rounds + 1):
        for name, (tokens, task) in tasks.items():
            times = task()
            if turn:  # the first compiles
                rates[name].append((tokens / times[0], tokens / times[1]))
        busy.append(os.getloadavg()[0])
        print(f"round {turn} of {f.rounds}, load {busy[-1]:.1f}", flush=True)
    report(rates, {name: weights.num_bytes(params) for name, params in forms.items()}, busy[1:])


def report(rates: dict[str, list[Times]], sizes: dict[str, int], busy: list[float]) -> None:
    """Prints the table and writes it to kernels.json, under the setting of the kernels."""
    table = {}
    columns = ("tokens/s", "x float32", "(rounds)", "by CPU time", "x float32", "(rounds)")
    print(" " * 24 + "".join(f"{name:>{width}}" for name, width in zip(columns, (10, 11, 16, 13, 11, 16), strict=True)))
    for name, values in rates.items():
        base = rates["float32 " + name.split(" ", 1)[1]]
        row: dict[str, Any] = {}
        for column, kind in enumerate(("clock", "cpu")):
            ratios = [value[column] / other[column] for value, other in zip(values, base, strict=True)]
            row[kind] = {
                "tokens_per_second": statistics.median(value[column] for value in values),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        table[name] = row
        line = f"{name:<24}"
        for width, figures in zip((10, 13), row.values(), strict=True):
            spread = f"{min(figures['ratios']):.2f} to {max(figures['ratios']):.2f}"
            line += f"{figures['tokens_per_second']:>{width}.1f}{figures['ratio']:>11.2f}{spread:>16}"
        print(line)
    library, reason = (None, "LLM_JAX_KERNELS=xla") if native.setting() == "xla" else native.loaded()
    path = native.PATHS[library.llm_jax_fastest_path()] if library else f"xla ({reason})"
    cores = len(os.sched_getaffinity(0))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["kernels" if library else "xla"] = {
        "path": path,
        "cores": cores,
        "load": busy,
        "jax": jax.__version__,
        "bytes": sizes,
        "table": table,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def timed(work: Callable[[], Any]) -> Times:
    start, worked = time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    return time.perf_counter() - start, time.process_time() - worked


def decoding(model: Any, params: Any, batch: int) -> Callable[[], Times]:
    """A function that measures `NEW` tokens of each of `batch` rows."""
    sampler = DecodingOptions(temperature=0).sampler()
    rows = [list(range(100, 100 + PROMPT))] * batch

    def generate(new: int) -> Times:
        return timed(lambda: loop.generate(model, params, rows, sampler, max_new_tokens=new))

    def run() -> Times:
        one, many = generate(1), generate(NEW + 1)
        return many[0] - one[0], many[1] - one[1]

    return run


def prefill(model: Any, params: Any) -> Callable[[], Times]:
    """A function that measures the prefill of `LONG` tokens."""
    sampler = DecodingOptions(temperature=0).sampler()
    prompt = list(range(100, 100 + LONG))
    return lambda: timed(lambda: loop.generate(model, params, [prompt], sampler, max_new_tokens=1))


def products(params: Any) -> Callable[[], Times]:
    """A function that measures the matrix products alone of `NEW` tokens, one after the other."""
    flat = {path: w for path, w in trees.flatten(params).items() if len(w.shape) == 2}

    @jax.jit
    def run(flat: Any, start: jax.Array) -> jax.Array:
        def token(_: int, total: jax.Array) -> jax.Array:
            for path, w in flat.items():
                transposed = path == "embed/table"
                row = jnp.full((1, w.shape[int(transposed)]), total, jnp.float32)
                total = total + weights.dot(row, w, transposed)[0, 0] * 1e-9
            return total

        return jax.lax.fori_loop(0, NEW, token, start)

    return lambda: timed(lambda: run(flat, jnp.float32(1)))


if __name__ == "__main__":
    cli.run_script(main)
