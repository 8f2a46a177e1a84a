"""Tokens a second of adapters merged, attached, and over quantized bases; energy where a counter is readable. L13.

    PYTHONPATH=. python experiments/adapter_inference/measure.py [--rounds=3] [--tokens=8]

SmolLM2-135M in float32 and an adapter of rank 8 on all linear layers, moved away from its start; greedy, one row, a
prompt of 16 tokens. A rate is that of the tokens after the first. All forms take turns, round by round; where other
work shares the cores, the processor's own seconds say more than the clock's. Writes results.json and the table in
README.md beside this file.

The rule, fixed before the run: the speed half of L13 ("QLoRA gives faster inference") holds if in every round the NF4
base with its adapter gives more tokens per second of CPU time than the dense merged model; fails if in every round it
gives fewer; else undecided. The power half wants a counter of energy (Linux: /sys/class/powercap/*/energy_uj): it holds
if joules a token are lower in every round, fails if higher in every round; without one it is untested here.
"""

import dataclasses
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
from llm_jax.research import experiments, findings
from llm_jax.research.findings import Finding

MODEL, PROMPT = "asset:smollm2-135m-instruct", list(range(100, 116))
MERGED, QLORA = "dense, merged", "NF4 base, attached (QLoRA)"

flags.DEFINE_integer("rounds", 3, "turns that are counted")
flags.DEFINE_integer("tokens", 8, "new tokens that are timed")


def main() -> None:
    model, base, _ = checkpoints.load(MODEL)
    models = forms(base)
    del base
    sampler = DecodingOptions(temperature=0).sampler()

    def once(params: Any, new: int) -> np.ndarray:
        """Seconds on the clock, of the processor, and joules (0 without a counter)."""
        start, worked, spent = time.perf_counter(), time.process_time(), joules()
        loop.generate(model, params, [PROMPT], sampler, max_new_tokens=new)
        return np.asarray([time.perf_counter() - start, time.process_time() - worked, (joules() or 0) - (spent or 0)])

    costs: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for turn in range(flags.FLAGS.rounds + 1):
        for name, params in models.items():
            first = once(params, 1)
            rest = once(params, flags.FLAGS.tokens + 1) - first
            if turn:  # the first compiles
                costs[name].append(rest / flags.FLAGS.tokens)
        print(f"turn {turn} of {flags.FLAGS.rounds}", flush=True)
    sizes = {name: weights.num_bytes(params) for name, params in models.items()}
    print(experiments.publish(__file__, judge(costs, joules() is not None), table(costs, sizes)))


def forms(base: Any) -> dict[str, Any]:
    """{name: parameters}"""
    default = configuration.default()
    adapters = lora.init(jax.random.key(0), base, dataclasses.replace(default.lora, rank=8))
    trained, fixed = lora.split(adapters, "lora")
    move = lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    adapters = lora.join(jax.tree.map(move, trained), fixed)
    coded = {s: post_training.base(base, dataclasses.replace(default.quant, scheme=s)) for s in ("nf4", "int8")}
    return {
        MERGED: lora.merge(base, adapters),
        "dense, attached": lora.attach(base, adapters),
        QLORA: lora.attach(coded["nf4"], adapters),
        "NF4 base, merged into its codes": lora.requantize(coded["nf4"], adapters)[0],
        "int8 base, attached": lora.attach(coded["int8"], adapters),
    }


def joules() -> float | None:
    """What the processor's packages have used so far, or None where no counter can be read."""
    try:
        counters = [int(p.read_text()) for p in pathlib.Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj")]
    except OSError:
        return None
    return sum(counters) / 1e6 if counters else None


def judge(costs: dict[str, list[np.ndarray]], has_counter: bool) -> list[Finding]:
    """The verdicts by the rules above; `has_counter` says whether energy was measured."""

    def finding(part: str, measure: str, column: int) -> Finding:
        ratios = [float(a[column] / b[column]) for a, b in zip(costs[MERGED], costs[QLORA], strict=True)]
        verdict = "holds" if min(ratios) > 1 else "fails" if max(ratios) < 1 else "undecided"
        value = Interval(float(np.median(ratios)), min(ratios), max(ratios))
        return findings.finding("L13", measure, value, verdict, part=part)

    speed = finding("speed", "tokens per second of CPU time, NF4 base with adapter over dense merged", 1)
    if has_counter:
        return [speed, finding("power", "joules a token, dense merged over NF4 base with adapter", 2)]
    verdict = "untested here (no energy counter can be read)"
    return [speed, findings.finding("L13", "joules a token", None, verdict, n=0, part="power")]


def table(costs: dict[str, list[np.ndarray]], sizes: dict[str, int]) -> list[str]:
    """Markdown."""
    head = ["form", "weights, MiB", "tokens/s of CPU time", "on the clock", "CPU rate over dense merged"]
    rows = []
    for name, rounds in costs.items():
        clock, cpu = np.median([1 / cost[:2] for cost in rounds], 0)
        ratios = [a[1] / b[1] for a, b in zip(costs[MERGED], rounds, strict=True)]
        ratio = findings.interval_text((np.median(ratios), min(ratios), max(ratios)), 2)
        rows.append([name, f"{sizes[name] / 2**20:,.0f}", f"{cpu:.1f}", f"{clock:.1f}", ratio])
    return ["", *findings.markdown_table(head, rows)]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={"rounds": 1, "tokens": 1}, runs="runs/adapter_inference"))
