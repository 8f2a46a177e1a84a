"""Decoding a real model (SmolLM2-135M) beside transformers and llama.cpp, in one run on the same cores.

    PYTHONPATH=. python experiments/benchmarks/decode.py --peer_python=.venv-peers/bin/python [--rounds=5]
        [--llama_python=PYTHON]      an interpreter with llama_cpp

All take turns, round by round, so that a machine whose speed drifts slows all of them alike. Decoding is
greedy, from a prompt of 16 tokens; its time is that of 33 new tokens minus that of one. The bandwidth is that
of adding up half a gigabyte. "products" are the matrix products of one token and nothing else, so the step
minus the products is what everything beside them costs. Writes decode.json.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from llm_jax import cli, pretrained, trees, weights
from llm_jax.data import assets
from llm_jax.decoding import loop
from llm_jax.decoding.options import Options
from llm_jax.errors import UserError

HERE = pathlib.Path(__file__).parent
MODEL = "asset:smollm2-135m-instruct"
PROMPT, NEW, LONG = 16, 32, 512

flags.DEFINE_string("peer_python", "", "an interpreter with torch and transformers; empty: without them")
flags.DEFINE_string("llama_python", "", "an interpreter with llama_cpp; empty: without it")
flags.DEFINE_integer("rounds", 5, "turns that are counted")
flags.DEFINE_multi_string("dtypes", ["float32", "bfloat16"], "of the model")
flags.DEFINE_multi_integer("batches", [1, 8], "rows decoded at a time")

Run = Callable[[int, int, int], float]


def main() -> None:
    f = flags.FLAGS
    cli.keep_memory()
    runners: dict[str, Run] = {}
    names: dict[str, str] = {"llm_jax": f"jax {jax.__version__}"}
    products: dict[str, Callable[[], float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for dtype in f.dtypes:
            loaded = pretrained.load(MODEL, dtype=dtype)
            runners[f"llm_jax {dtype}"], products[dtype] = ours(loaded), bare(loaded)
            if f.peer_python:
                where = pathlib.Path(directory) / "hf"
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


def measure(runners: dict[str, Run], products: dict[str, Callable[[], float]], names: dict[str, str]) -> None:
    """Takes turns, and writes what was found after each, so that an interrupted run has its figures."""
    seconds: dict[str, list[float]] = {}
    rounds = flags.FLAGS.rounds
    for turn in range(rounds + 1):

        def keep(name: str, value: float, counted: bool = turn > 0) -> None:
            if counted:  # the first turn warms up
                seconds.setdefault(name, []).append(value)

        keep("bandwidth", bandwidth())
        for name, run in runners.items():
            for batch in flags.FLAGS.batches:
                if "llama" in name and batch > 1:
                    continue
                one = run(batch, PROMPT, 1)
                keep(f"{name} decode {batch}", batch * NEW / max(run(batch, PROMPT, NEW + 1) - one, 1e-9))
            keep(f"{name} prefill", LONG / run(1, LONG, 1))
        for dtype, alone in products.items():
            keep(f"products {dtype}", alone())
        print(f"turn {turn} of {rounds}", flush=True)
        if turn:
            report(seconds, names)


def report(seconds: dict[str, list[float]], names: dict[str, str]) -> None:
    bound = statistics.median(seconds["bandwidth"])
    print(f"{'':<34} {'median':>10} {'x transformers':>15}")
    table = {}
    for name, values in seconds.items():
        peers = seconds.get(name.replace("llm_jax", "transformers"), []) if name.startswith("llm_jax") else []
        ratios = [a / b for a, b in zip(values, peers, strict=False)]
        row = {"median": statistics.median(values), "values": values}
        if ratios:
            row |= {"ratio": statistics.median(ratios), "ratios": ratios}
        table[name] = row
        unit = "GB/s" if name == "bandwidth" else "ms a token" if name.startswith("products") else "tokens/s"
        shown = row["median"] * (1e3 if name.startswith("products") else 1)
        print(f"{name:<34} {shown:>10.2f} {unit:<10} {row.get('ratio', float('nan')):>6.2f}")
    for dtype in ("float32", "bfloat16"):
        steps, bare = seconds.get(f"llm_jax {dtype} decode 1"), seconds.get(f"products {dtype}")
        if steps and bare:
            over = [1e3 / a - 1e3 * b for a, b in zip(steps, bare, strict=True)]
            table[f"overhead {dtype}"] = {"median": statistics.median(over), "values": over}
            print(f"beside the products, {dtype}: {statistics.median(over):.2f} ms a token")
    (HERE / "decode.json").write_text(json.dumps({"names": names, "bandwidth": bound, "table": table}, indent=1) + "\n")


def ours(loaded) -> Run:
    model, params, _ = loaded
    sampler = Options(temperature=0).sampler()

    def run(batch: int, prompt: int, new: int) -> float:
        rows = [list(range(100, 100 + prompt))] * batch
        start = time.perf_counter()
        loop.generate(model, params, rows, sampler, max_new_tokens=new)
        return time.perf_counter() - start

    return run


def bare(loaded) -> Callable[[], float]:
    """A function that gives the seconds a token that its matrix products alone take."""
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

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(products(flat, jnp.ones((), model.config.precision.compute)))
        return (time.perf_counter() - start) / NEW

    return run


def bandwidth() -> float:
    """Gigabytes a second that the cores read from memory."""
    data = jnp.ones((1 << 10, 1 << 17), jnp.float32)
    add = jax.jit(lambda x: jnp.sum(x, 0))
    jax.block_until_ready(add(data))
    start = time.perf_counter()
    jax.block_until_ready(add(data))
    return data.nbytes / (time.perf_counter() - start) / 1e9


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
    assert process.stdin and process.stdout
    said = process.stdout.readline().strip()
    if not said.startswith("ready"):
        raise UserError(f"{python} cannot run {kind}; expected an interpreter that has it")

    def run(batch: int, prompt: int, new: int) -> float:
        print(batch, prompt, new, file=process.stdin, flush=True)
        return float(process.stdout.readline())

    return run, said.removeprefix("ready ")


if __name__ == "__main__":
    cli.run(main)
