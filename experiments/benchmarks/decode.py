"""Decoding a real model (SmolLM2-135M) beside transformers and llama.cpp, in one run on the same cores.

    PYTHONPATH=. python experiments/benchmarks/decode.py --peer_python=.venv-peers/bin/python [--rounds=5]
        [--llama_python=PYTHON]      an interpreter with llama_cpp

All take turns, round by round, so that a machine whose speed drifts slows all of them alike. Decoding is
greedy, from a prompt of 16 tokens; its time is that of 33 new tokens minus that of one. The bandwidth is that
of a vector times a matrix of half a gigabyte. "products" are the products of one token with the weights and nothing
else, so the step minus the products is what everything beside them costs. Where other work shares the cores, times
on the clock say little: figures "by CPU time" count the processor's own seconds, and --cores=1 keeps them free of
threads that wait for each other. Writes decode.json.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from llm_jax import checkpoints, cli, runtime, trees, weights
from llm_jax.data import assets
from llm_jax.decoding import loop
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError

HERE = pathlib.Path(__file__).parent
MODEL = "asset:smollm2-135m-instruct"
PROMPT, NEW, LONG = 16, 32, 512
_SIZE = 1 << 29

flags.DEFINE_string("peer_python", "", "an interpreter with torch and transformers; empty: without them")
flags.DEFINE_string("llama_python", "", "an interpreter with llama_cpp; empty: without it")
flags.DEFINE_string("peer_model", "", "where the model for transformers is kept; empty: converted for this run only")
flags.DEFINE_integer("cores", 0, "cores that all run on; 0: as many as there are")
flags.DEFINE_integer("rounds", 5, "turns that are counted")
flags.DEFINE_multi_string("dtypes", ["float32", "bfloat16"], "of the model")
flags.DEFINE_multi_integer("batches", [1, 8], "rows decoded at a time")

Times = tuple[float, float]  # seconds on the clock, and of the processor
Run = Callable[[int, int, int], Times]


def main() -> None:
    f = flags.FLAGS
    runtime.retain_freed_memory()
    if f.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: f.cores])  # before JAX counts them
    runners: dict[str, Run] = {}
    names: dict[str, str] = {"llm_jax": f"jax {jax.__version__}"}
    products: dict[str, Callable[[], Times]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for dtype in f.dtypes:
            loaded = checkpoints.load(MODEL, dtype=dtype)
            runners[f"llm_jax {dtype}"], products[dtype] = ours(loaded), bare(loaded)
            if f.peer_python:
                where = pathlib.Path(f.peer_model or directory) / "hf"
                if not where.exists():
                    convert(where)
                runners[f"transformers {dtype}"], names["transformers"] = peer(
                    f.peer_python, "transformers", where, dtype
                )
        if f.llama_python:
            runners["llama.cpp Q4_1"], names["llama.cpp"] = peer(
                f.llama_python, "llama.cpp", assets.path("smollm2-135m-instruct"), "Q4_1"
            )
        measure(runners, products, names)


def measure(runners: dict[str, Run], products: dict[str, Callable[[], Times]], names: dict[str, str]) -> None:
    """Takes turns, and writes what was found after each, so that an interrupted run has its figures."""
    seconds: dict[str, list[float]] = {}
    rounds = flags.FLAGS.rounds
    for turn in range(rounds + 1):

        def keep(name: str, work: float, times: Times, counted: bool = turn > 0) -> None:
            for kind, time_ in zip(("", ", by CPU time"), times, strict=True):
                if counted:  # the first turn warms up
                    seconds.setdefault(name + kind, []).append(work / max(time_, 1e-9))

        keep("bandwidth", _SIZE / 1e9, bandwidth())
        for name, run in runners.items():
            for batch in flags.FLAGS.batches:
                if "llama" in name and batch > 1:
                    continue
                one = run(batch, PROMPT, 1)
                many = run(batch, PROMPT, NEW + 1)
                keep(f"{name} decode {batch}", batch * NEW, (many[0] - one[0], many[1] - one[1]))
            keep(f"{name} prefill", LONG, run(1, LONG, 1))
        for dtype, alone in products.items():
            keep(f"products {dtype}", NEW, alone())
        print(f"turn {turn} of {rounds}", flush=True)
        if turn:
            report(seconds, names)


def report(seconds: dict[str, list[float]], names: dict[str, str]) -> None:
    print(f"{'':<46} {'median':>10} {'x transformers':>15}")
    table = {}
    for name, values in seconds.items():
        row: dict[str, Any] = {"median": statistics.median(values), "values": values}
        if name.startswith("llm_jax") and (peers := seconds.get(name.replace("llm_jax", "transformers"))):
            row["ratios"] = [a / b for a, b in zip(values, peers, strict=False)]
            row["ratio"] = statistics.median(row["ratios"])
        table[name] = row
        unit = "GB/s" if name.startswith("bandwidth") else "tokens/s"
        print(f"{name:<46} {row['median']:>10.2f} {unit:<8} {row.get('ratio', float('nan')):>6.2f}")
    for dtype in flags.FLAGS.dtypes if 1 in flags.FLAGS.batches else ():
        for kind in ("", ", by CPU time"):
            whole, alone = (seconds[f"{name}{kind}"] for name in (f"llm_jax {dtype} decode 1", f"products {dtype}"))
            over = [1e3 / a - 1e3 / b for a, b in zip(whole, alone, strict=True)]
            table[f"milliseconds beside the products, {dtype}{kind}"] = {
                "median": statistics.median(over),
                "values": over,
            }
            print(f"beside the products, {dtype}{kind}: {statistics.median(over):.2f} ms a token")
    cores = len(os.sched_getaffinity(0))
    (HERE / "decode.json").write_text(json.dumps({"names": names, "cores": cores, "table": table}, indent=1) + "\n")


def ours(loaded) -> Run:
    model, params, _ = loaded
    sampler = DecodingOptions(temperature=0).sampler()

    def run(batch: int, prompt: int, new: int) -> Times:
        rows = [list(range(100, 100 + prompt))] * batch
        return timed(lambda: loop.generate(model, params, rows, sampler, max_new_tokens=new))

    return run


def timed(work: Callable[[], Any]) -> Times:
    start, worked = time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    return time.perf_counter() - start, time.process_time() - worked


def bare(loaded) -> Callable[[], Times]:
    """A function that gives the seconds that the matrix products alone of `NEW` tokens take."""
    model, params, _ = loaded
    flat = {path: w for path, w in trees.flatten(params).items() if w.ndim == 2}

    @jax.jit
    def products(flat, x):
        def token(_, total):
            for path, w in flat.items():
                turned = path == "embed/table"
                row = jnp.full((1, w.shape[1 if turned else 0]), total, w.dtype)
                total = total + weights.dot(row, w, turned)[0, 0] * 1e-9
            return total

        return jax.lax.fori_loop(0, NEW, token, x)

    return lambda: timed(lambda: products(flat, jnp.ones((), model.config.precision.compute)))


def bandwidth() -> Times:
    """The times of reading `_SIZE` bytes from memory."""
    data, row = jnp.ones((1 << 10, _SIZE >> 12), jnp.float32), jnp.ones((1, 1 << 10), jnp.float32)
    jax.block_until_ready(_product(row, data))
    return timed(lambda: _product(row, data))


_product = jax.jit(weights.dot)


def convert(directory: pathlib.Path) -> None:
    """Writes the model as a Hugging Face directory, which transformers reads without gguf."""
    command = [sys.executable, "-m", "llm_jax.convert", f"--input={MODEL}", f"--output={directory}", "--to=hf"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def peer(python: str, kind: str, path: pathlib.Path, dtype: str) -> tuple[Run, str]:
    process = subprocess.Popen(
        [python, str(HERE / "decode_peer.py"), kind, str(path), dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    output = process.stdout
    assert process.stdin and output
    said = output.readline().strip()
    if not said.startswith("ready"):
        raise UserError(f"{python} cannot run {kind}; expected an interpreter that has it")

    def run(batch: int, prompt: int, new: int) -> Times:
        print(batch, prompt, new, file=process.stdin, flush=True)
        on_the_clock, of_the_processor = map(float, output.readline().split())
        return on_the_clock, of_the_processor

    return run, said.removeprefix("ready ")


if __name__ == "__main__":
    cli.run_script(main)
