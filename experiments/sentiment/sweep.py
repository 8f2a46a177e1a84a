"""Sentiment by SmolLM2-135M: prompted, probed, adapted, fully fine-tuned. L1, L5, L8, L9, L10, L12.

    PYTHONPATH=. python experiments/sentiment/sweep.py [--size=cpu|smoke] [--seeds=3] [--part=1/2]

One job after the other. What a finished job found is a line of runs.jsonl beside this file, which is committed: the
same command goes on where it was stopped, on this machine or another, and a job is done again if an option that its
figures follow from has changed. recipes.jsonl has the configurations of the jobs that train, by the digests in
runs.jsonl. What the verdicts are of comes first; then results.json and the table in README.md are written, of what
there is.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
from absl import flags

from experiments.sentiment import measure, report
from llm_jax import bars, cli, configuration, files
from llm_jax.errors import UserError
from llm_jax.research import experiments, provenance
from llm_jax.research import runs as runs_lib
from llm_jax.research.provenance import Provenance
from llm_jax.schema import Config

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]

flags.DEFINE_enum(
    "size",
    "cpu",
    ("cpu", "smoke", "quick"),
    "cpu: 2,000 training and 1,000 test sentences; smoke: a few steps",
)
flags.DEFINE_integer("seeds", 3, "runs of each kind that is trained", lower_bound=1)
flags.DEFINE_string("runs", "runs/sentiment", "where the runs themselves are kept")
flags.DEFINE_string("part", "1/1", "2/3: the second of every three jobs, beside processes that do the others")

PROMPTED = ("zero-shot", "few-shot", "probe")
# What a run changes below the recipe configs/sentiment_lora.py (LoRA of rank 8 on all linear layers).
TRAINED: dict[str, dict[str, object]] = {
    "LoRA r=1": {"lora.rank": 1, "lora.alpha": 2.0},
    "LoRA r=8": {},
    "LoRA r=64": {"lora.rank": 64, "lora.alpha": 128.0},
    "LoRA+ r=8": {"lora.b_lr_ratio": 16.0, "optim.lr": 2e-4},
    "DoRA r=8": {"lora.variant": "dora"},
    "PiSSA r=8": {"lora.variant": "pissa", "lora.alpha": 8.0, "optim.lr": 2e-4},
    "LoRA-FA r=8": {"lora.variant": "fa", "optim.lr": 2e-3},
    "QLoRA r=8, NF4 base": {"quant.scheme": "nf4"},
    "LoftQ r=8, NF4 base": {"quant.scheme": "nf4", "lora.variant": "loftq"},
    "LoRA r=8, factors in int8": {"lora.factors": "int8"},
    "QLoRA r=8, both": {"quant.scheme": "nf4", "lora.factors": "int8"},
    "full": {"lora.rank": 0, "optim.lr": 2e-5},
}
# Layers one after the other: XLA's CPU backend stacks what a scan keeps of bfloat16 layers at the cost of all layers.
FAST = {"model.precision.compute": "bfloat16", "model.scan_layers": False}
SIZES: dict[str, tuple[dict[str, object], tuple[int, ...]]] = {
    "cpu": (FAST, ()),
    "quick": (
        FAST
        | {"train.steps": 1, "train.batch_size": 2, "optim.warmup_steps": 0}
        | {"data.labelled.test_size": 4.0, "data.labelled.validation_size": 4.0, "data.labelled.train_size": 8},
        (4, 8),
    ),
    "smoke": (FAST | {"train.steps": 12, "optim.warmup_steps": 2}, (64, 64)),
}
RECIPE = ROOT / "configs" / "sentiment_lora.py"
# Options that a run takes from the checkpoint `init_from`, whatever the configuration has: training refuses others.
GEOMETRY = (
    *(
        f"model.{key}"
        for key in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "mlp_dim", "qk_norm")
    ),
    *("model.position.base", "model.position.max_length", "tokenizer.kind", "tokenizer.vocab_size"),
)
OTHER = "amazon-reviews"


def main() -> None:
    f = flags.FLAGS
    part = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", f.part)
    if not part or int(part[1]) > int(part[2]):
        raise UserError(f"--part={f.part}; expected 1/2 or 2/2, say")
    root = experiments.directory(f.runs, f.size)
    jobs = [(name, seed) for seed in range(f.seeds) for name in TRAINED]
    jobs = [(kind, 0) for kind in PROMPTED] + sorted(jobs, key=lambda job: job[0] not in report.JUDGED)
    file = HERE / "runs.jsonl" if f.size == "cpu" else root / "runs.jsonl"
    mine = jobs[int(part[1]) - 1 :: int(part[2])]
    with bars.bar(mine) as bar:
        for name, seed in bar:
            if (name, seed) in finished(file, f.size):  # perhaps by another process, since this one began
                continue
            bar.set_description(f"{name}, seed {seed}")
            origin = dataclasses.asdict(provenance.here(""))
            figures = asked(name, f.size) if name in PROMPTED else trained(root, name, seed, f.size)
            record_recipe(file, name, f.size)
            line = {"job": name, "seed": seed, "recipe": recipe(name, f.size), "origin": origin, **figures}
            with file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
    done = finished(file, f.size)
    missing = [name for name, seed in jobs if (name, seed) not in done]
    if missing:
        print(f"{len(missing)} of {len(jobs)} jobs are not done yet; started again without --part it goes on")
    if {*PROMPTED, *report.JUDGED}.intersection(missing):
        return
    prompted = {kind: done[kind, 0] for kind in PROMPTED}
    runs = {name: [done[name, seed] for seed in range(f.seeds) if (name, seed) in done] for name in TRAINED}
    results = report.judge(prompted, runs, runs["LoRA r=8"][0]["factors"], f.seeds, f.size)
    table = report.table(prompted, runs, f.size, f.seeds)
    # Lines of earlier versions have no origin.
    origins = [Provenance(**done[job].get("origin", {})) for job in jobs if job in done]
    print(experiments.publish(__file__, results, table, origins=origins))


def config_of(name: str, size: str) -> Config:
    """The configuration of a job that trains, without its seed."""
    return configuration.load(RECIPE, SIZES[size][0] | TRAINED[name])


def recipe(name: str, size: str) -> str:
    """A digest of what a job's figures follow from, beside its seed."""
    parts = configuration.as_dict(config_of(name, size)) if name in TRAINED else [SIZES[size], OTHER, ""]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def figure_options(config: Config) -> dict[str, Any]:
    """{dotted key: value} of the options that figures follow from, beside the seed."""
    ignored = {*runs_lib.NEUTRAL, *GEOMETRY, "train.seed"}
    return {key: value for key, value in configuration.flat(config).items() if key not in ignored}


def recorded_recipes(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """{digest: options that figures follow from} of the recipes beside a file of runs, under today's names."""
    return {
        line["recipe"]: figure_options(configuration.build(configuration.upgrade(line["config"])))
        for line in runs_lib.read_lines(file.with_name("recipes.jsonl"))
    }


def record_recipe(file: pathlib.Path, name: str, size: str) -> None:
    """Adds the configuration of a job that trains to the recipes beside a file of runs."""
    digest = recipe(name, size)
    if name in TRAINED and digest not in recorded_recipes(file):
        with file.with_name("recipes.jsonl").open("a") as lines:
            config = configuration.as_dict(config_of(name, size))
            lines.write(json.dumps({"recipe": digest, "config": config}) + "\n")


def finished(file: pathlib.Path, size: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The lines of the jobs as they are now: their options are the recorded ones, however they are written."""
    recorded = recorded_recipes(file)
    options = {name: figure_options(config_of(name, size)) for name in TRAINED}

    def is_current(job: str, digest: str) -> bool:
        return recorded.get(digest) == options[job] if job in TRAINED else digest == recipe(job, size)

    lines = runs_lib.read_lines(file)
    return {(line["job"], line["seed"]): line for line in lines if is_current(line["job"], line["recipe"])}


def asked(kind: str, size: str) -> dict[str, Any]:
    """The figures of what needs no training of the model."""
    test, train = SIZES[size][1] or (0, 0)
    return measure.figures(kind, "movie-reviews", OTHER if size == "cpu" else "", test, train)


def trained(root: pathlib.Path, name: str, seed: int, size: str) -> dict[str, Any]:
    """Trains (on, where it was stopped), asks one seed's run about product reviews too, and gives the figures."""
    workdir = root / f"{report.slug(name)}-{seed}-{recipe(name, size)}"
    changes = SIZES[size][0] | TRAINED[name] | {"train.seed": seed}
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    train = ["-m", "llm_jax.train", f"--config={RECIPE}", f"--workdir={workdir}", *overrides]
    run(train, root / f"{workdir.name}.log")
    summary = files.read_json(workdir / "summary.json")
    keys = ("test_accuracy", "test_right", "test_count", "trained_parameters", "parameters", "validation_loss")
    figures = {key: summary[key] for key in (*keys, "tokens_per_second", "seconds", "peak_host_bytes", "jax")}
    figures["step_seconds"] = step_seconds(workdir)
    if name != "full":
        figures["factors"] = report.factor_shapes(workdir)
    if size == "cpu" and seed == 0:
        ask = ["-m", "llm_jax.evaluate", f"--checkpoint={workdir}", f"--data=sentiment:{OTHER}", "--json"]
        figures["products"] = json.loads(run(ask, root / f"{workdir.name}-products.log"))
    return figures


def step_seconds(workdir: pathlib.Path) -> float:
    """The median of a training step."""
    return float(np.median([step["seconds"] for step in runs_lib.read_lines(workdir / "metrics.jsonl")]))


def run(command: list[str], log: pathlib.Path) -> str:
    """Runs a command; what it prints goes to `log`, the last line is given. Raises UserError where it fails.

    What runs of one kind compile is compiled once.
    """
    environment = {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(log.parent / "compiled")}
    with log.open("w") as out:
        process = subprocess.run(
            [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment
        )
    lines = log.read_text().strip().splitlines() or ["no output"]
    if process.returncode:
        raise UserError(f"{' '.join(command[:3])} failed with exit code {process.returncode}: {lines[-1]} ({log})")
    return lines[-1]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={"size": "quick", "seeds": 1}))
