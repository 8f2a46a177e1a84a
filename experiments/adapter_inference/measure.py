"""Decoding speed of adapters that are merged, attached, or attached to quantized bases; energy if it can be read. L13.

SmolLM2-135M in float32 with an adapter of rank 8 on all linear layers, whose factors are random; greedy decoding of one
row with a prompt of 16 tokens. The rate does not include the first token. Each round measures all forms once. If other
processes share the cores, CPU time is more reliable than elapsed time.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from llm_jax import checkpoints, cli, configuration, lora, weights
from llm_jax.decoding import loop
from llm_jax.decoding.options import DecodingOptions
from llm_jax.intervals import Interval
from llm_jax.quant import post_training
from llm_jax.research import experiments, findings, verdicts
from llm_jax.research.findings import Finding

MODEL, PROMPT = "asset:smollm2-135m-instruct", list(range(100, 116))
MERGED, QLORA = "dense, merged", "NF4 base, attached (QLoRA)"

flags.DEFINE_integer("rounds", 3, "measurements of each form, after one that compiles")
flags.DEFINE_integer("tokens", 8, "timed tokens, after the first new token")


def main() -> None:
    model, base, _ = checkpoints.load(MODEL)
    models, tokens = forms(base), flags.FLAGS.tokens
    del base
    sampler = DecodingOptions(temperature=0).sampler()

    def cost(params: Any, new: int) -> np.ndarray:
        """Elapsed seconds, CPU seconds, and joules (0 without a counter), float64 (3,)."""
        before = np.asarray([time.perf_counter(), time.process_time(), joules() or 0])
        loop.generate(model, params, [PROMPT], sampler, max_new_tokens=new)
        return np.asarray([time.perf_counter(), time.process_time(), joules() or 0]) - before

    def of_a_token(params: Any) -> np.ndarray:
        first = cost(params, 1)
        return (cost(params, tokens + 1) - first) / tokens

    computations = {name: functools.partial(of_a_token, params) for name, params in models.items()}
    costs = experiments.in_turns(computations, flags.FLAGS.rounds)
    sizes = {name: weights.num_bytes(params) for name, params in models.items()}
    print(experiments.publish(__file__, judge(costs, joules() is not None), table(costs, sizes)))


def forms(base: Any) -> dict[str, Any]:
    """The parameters of every form, by name."""
    default = configuration.default()
    trained, fixed = lora.split(lora.init(jax.random.key(0), base, dataclasses.replace(default.lora, rank=8)), "lora")
    moved = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape), trained)
    adapters = lora.join(moved, fixed)
    nf4, int8 = (
        post_training.quantize_base(base, dataclasses.replace(default.quant, scheme=s)) for s in ("nf4", "int8")
    )
    return {
        MERGED: lora.merge(base, adapters),
        "dense, attached": lora.attach(base, adapters),
        QLORA: lora.attach(nf4, adapters),
        "NF4 base, merged into its codes": lora.requantize(nf4, adapters)[0],
        "int8 base, attached": lora.attach(int8, adapters),
    }


def joules() -> float | None:
    """The energy that the processors have used since they were started, or None if it cannot be read."""
    try:
        counters = [int(p.read_text()) for p in pathlib.Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj")]
    except OSError:
        return None
    return sum(counters) / 1e6 if counters else None


def over_merged(costs: dict[str, list[np.ndarray]], name: str, column: int) -> Interval:
    """The median ratio of a cost of the dense merged model to that of a form over the rounds, with its range."""
    ratios = [float(a[column] / b[column]) for a, b in zip(costs[MERGED], costs[name], strict=True)]
    return Interval(float(np.median(ratios)), min(ratios), max(ratios))


def judge(costs: dict[str, list[np.ndarray]], has_counter: bool) -> list[Finding]:
    """The verdicts by the rules of statements.toml; `has_counter`: whether energy was measured."""
    speed, power = over_merged(costs, QLORA, 1), over_merged(costs, QLORA, 2) if has_counter else None
    of_speed = "tokens per second of CPU time, NF4 base with adapter over dense merged"
    results = [findings.finding("L13", of_speed, speed, verdicts.above(speed, 1), part="speed")]
    if power is None:
        verdict = "untested here (no energy counter can be read)"
        return [*results, findings.finding("L13", "joules per token", None, verdict, n=0, part="power")]
    of_power = "joules per token, dense merged over NF4 base with adapter"
    return [*results, findings.finding("L13", of_power, power, verdicts.above(power, 1), part="power")]


def table(costs: dict[str, list[np.ndarray]], sizes: dict[str, int]) -> list[str]:
    """Markdown."""
    rows = []
    for name, turns in costs.items():
        clock, cpu = np.median([1 / cost[:2] for cost in turns], 0)
        ratio = findings.interval_text(over_merged(costs, name, 1), 2)
        rows.append([name, f"{sizes[name] / 2**20:,.0f}", f"{cpu:.1f}", f"{clock:.1f}", ratio])
    head = ["form", "weights, MiB", "tokens/s of CPU time", "on the clock", "CPU rate over dense merged"]
    return ["", *findings.markdown_table(head, rows)]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={"rounds": 1, "tokens": 1}, runs="runs/adapter_inference"))
