"""The memory of a training step, and the cost of merging: L4, L6, L7.

Memory is that of compiled steps (`llm_jax.plan --memory`), from shapes alone: the SmolLM2-135M geometry, 4 x 256
tokens, float32, scanned layers. Merging is measured with a small model with random weights.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llm_jax import cli, configuration, lora, schema
from llm_jax.model.transformer import Transformer
from llm_jax.research import experiments, findings, verdicts
from llm_jax.research.findings import Finding
from llm_jax.training import memory, start

DTYPES = ("float32", "bfloat16")
STEPS = (
    "forward, remat none",
    *(f"{name}, remat {remat}" for name in memory.KINDS if name != "forward" for remat in ("none", "full")),
)
SMALL: dict[str, Any] = {"width": 192, "num_layers": 4, "num_heads": 3, "num_kv_heads": 3, "mlp_dim": 512}

flags.DEFINE_integer("seq_len", 256, "tokens of each of the 4 rows of a step")
flags.DEFINE_integer("repeats", 20, "timed forward passes of each form")


def main() -> None:
    f = flags.FLAGS
    config = start.find(configuration.load("sentiment_lora")).config
    train = dataclasses.replace(config.train, loss_chunk=0, batch_size=4, seq_len=f.seq_len)
    config = dataclasses.replace(config, train=train)

    def measure(condition: str, seed: int) -> dict[str, Any]:
        kind, _, option = condition.partition(", ")
        if kind == "merging":
            return merging(config, option, f.repeats)
        return dataclasses.asdict(memory.of_variant(memory.with_remat(config, option.removeprefix("remat ")), kind))

    root = experiments.directory(f.runs, f.seq_len, f.repeats)
    figures, origins = experiments.measure(root, (*STEPS, *(f"merging, {dtype}" for dtype in DTYPES)), 1, measure)
    taken = {name: memory.Memory(**figures[name][0]) for name in STEPS}
    merged = {dtype: figures[f"merging, {dtype}"][0] for dtype in DTYPES}
    print(experiments.publish(__file__, judge(taken, merged), tables(taken, merged), origins=origins))


def merging(config: schema.Config, dtype: str, repeats: int) -> dict[str, float]:
    """Differences of logits, and times of a forward pass over that of the base without adapters."""
    precision = dataclasses.replace(config.model.precision, params=dtype, compute=dtype)
    model = Transformer(dataclasses.replace(config.model, precision=precision, vocab_size=1024, **SMALL))
    ids = jax.random.randint(jax.random.key(0), (4, 128), 0, 1024)
    base = jax.jit(model.init)(jax.random.key(1), ids[:1, :1])["params"]
    trained, fixed = lora.split(lora.init(jax.random.key(2), base, config.lora), "lora")
    trained = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), trained)
    adapters = lora.join(trained, fixed)
    forms = {"plain": base, "attached": lora.attach(base, adapters), "merged": lora.merge(base, adapters)}
    logits = jax.jit(lambda params: model.apply({"params": params}, ids))
    plain, attached, merged = (np.asarray(logits(params), np.float64) for params in forms.values())

    def seconds(params: Any) -> float:
        began = time.perf_counter()
        logits(params).block_until_ready()
        return time.perf_counter() - began

    turns = experiments.in_turns({name: functools.partial(seconds, p) for name, p in forms.items()}, repeats)
    medians = {name: float(np.median(of_form)) for name, of_form in turns.items()}
    return {
        "roundings": root_mean_square(merged - attached) / root_mean_square(attached) / float(jnp.finfo(dtype).eps),
        "moved": root_mean_square(attached - plain) / root_mean_square(plain),
        "attached time": medians["attached"] / medians["plain"],
        "merged time": medians["merged"] / medians["plain"],
    }


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def judge(taken: dict[str, memory.Memory], merged: dict[str, dict[str, float]]) -> list[Finding]:
    """The verdicts by the rules of statements.toml."""
    ratios = {name: step.peak / taken["forward, remat none"].peak for name, step in taken.items()}
    share = taken["fa, remat none"].temporaries / taken["lora, remat none"].temporaries
    l4 = "holds"
    if any(figures["roundings"] >= 8 for figures in merged.values()):
        l4 = "fails"
    elif any(figures["merged time"] > 1.05 for figures in merged.values()):
        l4 = "holds for the outputs; its cost is undecided here"
    l6 = verdicts.within(ratios["full, remat none"], 2.5, 3.5)
    l7 = verdicts.at_most(share, holds=0.8, fails=0.95)
    l4_measure = "merged against attached: roundings of the dtype, times over the plain base"
    return [
        findings.finding("L4", l4_measure, merged, l4),
        findings.finding("L6", "peak memory over that of the forward pass", ratios, l6),
        findings.finding("L7", "temporaries of LoRA-FA over those of LoRA", share, l7),
    ]


def tables(taken: dict[str, memory.Memory], merged: dict[str, dict[str, float]]) -> list[str]:
    """Markdown."""
    forward = taken["forward, remat none"].peak
    head = ["step", "arguments", "of these the optimizer", "temporaries", "outputs", "peak", "over forward"]
    rows = []
    for name, step in taken.items():
        sizes = (step.arguments, step.optimizer, step.temporaries, step.outputs, step.peak)
        rows.append([name, *(f"{size / 2**20:,.0f}" for size in sizes), f"{step.peak / forward:.2f}"])
    lines = ["", "MiB, SmolLM2-135M, 4 x 256 tokens, float32, rank 8 on all linear layers:", ""]
    lines += findings.markdown_table(head, rows)
    rows = [[dtype, *(f"{value:.2f}" for value in figures.values())] for dtype, figures in merged.items()]
    return [*lines, "", *findings.markdown_table(["dtype", *next(iter(merged.values()))], rows)]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={"seq_len": 16, "repeats": 1}))
