"""Quantization after training compared with quantization-aware training, for the same number of steps: Q2.

The recovered share is the mean gain over the mean lost loss, relative to the best method after training and, as torchao
reports it, to plain rounding (absmax). Intervals are 95 % t-intervals over the seeds, paired by seed.
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags

from experiments import decoders
from experiments.quantization_quality import measure
from llm_jax import checkpoints, cli
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows
from llm_jax.errors import UserError
from llm_jax.intervals import paired
from llm_jax.quant import calibrate, post_training
from llm_jax.research import experiments, findings, plots, verdicts
from llm_jax.research.findings import Finding

# Name -> (scheme, whether the step sizes are learned, methods after training). Embedding tables have 8 bits.
SCHEMES = {
    "int8": ("int8", False, ("absmax", "mse", "gptq")),
    "w8a8": ("w8a8", False, ("absmax", "mse", "smoothquant", "gptq")),
    "int4": ("int4", False, ("absmax", "mse", "awq", "gptq")),
    "int4:channel": ("int4:channel", True, ("absmax", "mse", "awq", "gptq")),
    "int2": ("int2", True, ("absmax", "mse", "awq", "gptq")),
}

# By size: overrides of all runs, and of the runs that continue from the start.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "quick": (decoders.SMALL | {"train.steps": 4, "optim.warmup_steps": 2}, {"optim.lr": 5e-4}),
    "cpu": (decoders.SMALL, {"train.steps": 200, "optim.lr": 5e-4, "optim.warmup_steps": 20}),
    "full": (decoders.FULL, {"train.steps": 4000, "optim.lr": 1e-4, "optim.warmup_steps": 200}),
}

flags.DEFINE_enum("size", "cpu", list(SIZES), "cpu, full (an accelerator), or quick")
flags.DEFINE_integer("seeds", 3, "number of starts", lower_bound=2)
flags.DEFINE_integer("jobs", 1, "runs at a time, each on its share of the cores; 0: one a core, or one a GPU")

Losses = dict[str, list[dict[str, float]]]  # held-out losses by scheme, seed and method


def main() -> None:
    f = flags.FLAGS
    root = experiments.directory(f.runs, f.size)
    start, after = SIZES[f.size]
    followers = {"plain": start | after}
    for name, (scheme, learned, _) in SCHEMES.items():
        followers[name] = start | after | {"quant.qat.scheme": scheme, "quant.qat.learned_step": learned}
    starts = experiments.trainings(root, "default", {"start": start}, f.seeds)
    rest = experiments.trainings(root, "default", followers, f.seeds, start="start", first_seed=1000)
    trained = [*experiments.train(starts, f.jobs), *experiments.train(rest, f.jobs)]
    figures, origins = experiments.measure(root / "compared", SCHEMES, f.seeds, lambda *point: compare(root, *point))
    result = judge(figures, f.seeds)
    draw(figures, experiments.output(__file__) / "qat.png")
    print(experiments.publish(__file__, [result], table(figures, result), origins=[*trained, *origins]))


def compare(root: pathlib.Path, name: str, seed: int) -> dict[str, float]:
    """Held-out losses, nats per token: in full precision, of each method after training, and of the QAT model."""
    scheme, _, methods = SCHEMES[name]
    plain, in_the_loop = (experiments.run_directory(root, condition, seed) for condition in ("plain", name))
    model, params, tokenizer = checkpoints.load(plain)
    config = checkpoints.read_config(checkpoints.find(plain))
    held = Rows(Source(config.data).corpus(tokenizer).validation, config.train.seq_len)
    calibration, _ = calibrate.calibration_rows(config, "", tokenizer, config.train.seq_len, 128)

    def loss(params: Any) -> float:
        return decoders.evaluate(model, params, held, 32, limit=1024)["loss"]

    figures = {"full": loss(params)}
    for method in methods:
        figures[method] = loss(measure.quantize(model, params, f"{scheme} {method}", calibration, batch_size=32))
    figures["qat"] = loss(post_training.replace_fake_quant(checkpoints.load(in_the_loop).params))
    if not all(np.isfinite(list(figures.values()))):
        raise UserError(f"{in_the_loop}: a loss is not finite ({figures})")
    return figures


def best(runs: list[dict[str, float]]) -> str:
    """The method after training with the least mean loss."""
    return min((m for m in runs[0] if m not in ("full", "qat")), key=lambda m: np.mean([r[m] for r in runs]))


def judge(figures: Losses, seeds: int) -> Finding:
    """The verdict by the rule of statements.toml."""
    value: dict[str, Any] = {}
    holds, fails = [], []
    for name, runs in figures.items():
        method = best(runs)
        gain, lost = (paired([r[method] for r in runs], [r[kind] for r in runs]) for kind in ("qat", "full"))
        value |= {f"{name}: lost by {method}": lost, f"{name}: gain": gain, f"{name}: share": gain[0] / lost[0]}
        rounding, trained, full = (np.mean([r[kind] for r in runs]) for kind in ("absmax", "qat", "full"))
        value[f"{name}: share of rounding"] = float((rounding - trained) / (rounding - full))
        holds += [name] if gain.low > 0 else []
        fails += [name] if gain.high < 0 else []
    none = "fails" if len(fails) == len(figures) else "undecided"
    verdict = verdicts.holds_when(holds, list(figures), "the scheme is", none=none)
    return findings.finding("Q2", "held-out loss, nats per token", value, verdict, n=seeds)


def table(figures: Losses, result: Finding) -> list[str]:
    """Markdown."""
    methods = list(dict.fromkeys(m for runs in figures.values() for m in runs[0]))
    rows = []
    for name, runs in figures.items():
        cells = [findings.deviation(method, 4)(runs) if method in runs[0] else "-" for method in methods]
        shares = [f"{result[f'{name}: {share}'].estimate:.0%}" for share in ("share", "share of rounding")]
        rows.append([name, *cells, *shares])
    head = ["scheme", *methods, "recovered of the best", "recovered of absmax"]
    title = "Held-out loss in nats per token, mean ± standard deviation over the seeds:"
    return ["", title, "", *findings.markdown_table(head, rows)]


def draw(figures: Losses, path: pathlib.Path) -> None:
    """The loss above full precision of each scheme: by the best method after training, and with QAT."""
    with plots.figure(path, figsize=(8, 4)) as axis:
        x = np.arange(len(figures))
        for shift, label in ((-0.2, "best after training"), (0.2, "in the loop")):
            methods = [best(runs) if shift < 0 else "qat" for runs in figures.values()]
            values = [[r[m] - r["full"] for r in runs] for m, runs in zip(methods, figures.values(), strict=True)]
            axis.bar(x + shift, np.mean(values, 1), 0.4, yerr=np.std(values, 1, ddof=1), capsize=3, label=label)
        axis.set_xticks(x, list(figures))
        axis.set(ylabel="loss above full precision, nats per token")
        axis.axhline(0, color="black", linewidth=0.5)


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"size": "quick", "seeds": 2}))
