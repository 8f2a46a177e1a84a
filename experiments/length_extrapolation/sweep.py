"""Every position scheme trained at one length and asked at 1, 2, 4 and 8 times that length: P2, P4, P5, P7, P8.

    PYTHONPATH=. python experiments/length_extrapolation/sweep.py [--size=full] [--seeds=3] [--jobs=2]

Trains, fine-tunes, measures, draws and judges. What is done is kept under --runs and not done again: the
same command goes on where it was stopped. Writes results.json, lengths.png and the tables in README.md.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments.length_extrapolation import copy_back, measure, report
from llm_jax import cli
from llm_jax.research import experiments, points
from llm_jax.research.jobs import Job
from llm_jax.research.provenance import Provenance

HERE = pathlib.Path(__file__).parent

# What a run changes: overrides of config.py below `model.position`.
KINDS = {
    "none": {"kind": "none"},
    "sinusoidal": {"kind": "sinusoidal"},
    "sinusoidal concatenated": {"kind": "sinusoidal", "combine": "concatenate"},
    "learned": {"kind": "learned"},
    "shaw": {"kind": "shaw"},
    "shaw keys": {"kind": "shaw", "relative_embeddings": "keys"},
    "shaw values": {"kind": "shaw", "relative_embeddings": "values"},
    "t5": {"kind": "t5"},
    "alibi": {"kind": "alibi"},
    "rope": {"kind": "rope"},
}
SCALINGS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3")
COPYING = ("none", "sinusoidal", "learned", "shaw", "t5", "alibi", "rope")

# Overrides of all runs by size, and of the fine-tuning at 8 times the length.
SIZES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "quick": (
        64,
        {"data.validation_fraction": 0.05, "train.steps": 2, "optim.warmup_steps": 1},
        {"train.batch_size": 1},
    ),
    "cpu": (64, {}, {"train.steps": 60, "train.batch_size": 4, "optim.lr": 1e-3, "optim.warmup_steps": 10}),
    "full": (
        512,
        {
            "data.source": "stdlib",
            "tokenizer.vocab_size": 8192,
            "model.width": 768,
            "model.num_layers": 12,
            "model.num_heads": 12,
            "model.num_kv_heads": 12,
            "model.mlp_dim": 2048,
            "model.precision.compute": "bfloat16",
            "model.position.max_length": 4096,
            "model.position.width": 192,
            "train.steps": 20000,
            "train.batch_size": 64,
            "train.seq_len": 512,
            "optim.lr": 6e-4,
            "optim.warmup_steps": 1000,
        },
        {"train.steps": 1000, "train.batch_size": 8, "optim.lr": 1e-4, "optim.warmup_steps": 100},
    ),
}


flags.DEFINE_enum("size", "cpu", list(SIZES), "cpu, full (an accelerator), or quick")
flags.DEFINE_integer("seeds", 3, "runs of each kind", lower_bound=2)
flags.DEFINE_integer("jobs", 0, "trainings at a time, each on its share of the cores; 0: one a core, or one a GPU")
flags.DEFINE_string("runs", "runs/length_extrapolation", "where the runs are kept")


def main() -> None:
    f = flags.FLAGS
    root = experiments.directory(f.runs, f.size)
    trains, tunes = trainings(root, f.size, f.seeds)
    origins = [*experiments.train(trains, f.jobs), *experiments.train(tunes, f.jobs)]
    loss, copied = measured(root, f.size, f.seeds, origins)
    report.draw(loss, experiments.output(__file__) / "lengths.png")
    results = report.judge(loss, copied, f.seeds)
    print(experiments.publish(__file__, results, report.tables(loss, copied), origins=origins))


def trainings(root: pathlib.Path, size: str, seeds: int) -> tuple[list[Job], list[Job]]:
    """The runs of every kind, and the fine-tunings of those of rope."""
    length, all_runs, tuning = SIZES[size]
    trains, tunes = [], []
    for seed in range(seeds):
        for name, position in KINDS.items():
            changes = all_runs | {f"model.position.{k}": v for k, v in position.items()} | {"train.seed": seed}
            trains.append(points.training(HERE / "config.py", changes, run_directory(root, name, seed)))
        for scaling in SCALINGS:
            changes = all_runs | tuning | {"train.seed": seed, "train.seq_len": 8 * length}
            changes["init_from"] = str(run_directory(root, "rope", seed))
            if scaling != "none":
                changes |= {
                    "model.position.scaling": scaling,
                    "model.position.scaling_factor": 1.0 if scaling == "dynamic" else 8.0,
                    "model.position.original_length": length,
                }
            tunes.append(points.training(HERE / "config.py", changes, run_directory(root, f"tuned {scaling}", seed)))
    return trains, tunes


def run_directory(root: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    return root / experiments.file_name(f"{name}-{seed}")


def measured(
    root: pathlib.Path, size: str, seeds: int, origins: list[Provenance]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Losses of the runs by kind, and accuracies of copying by kind, of each seed; see `report`."""
    length, blocks, steps = SIZES[size][0], *((2, 100) if size == "quick" else (32, 1600))
    tuned = {f"rope, {scaling}, fine-tuned": f"tuned {scaling}" for scaling in SCALINGS}
    runs = {kind: kind for kind in KINDS} | tuned
    of_run = functools.partial(functools.partial, measure.losses_by_length, original=length, blocks=blocks)
    computations: dict[str, Callable[[], Any]] = {}
    for seed in range(seeds):
        for name in runs.values():
            computations[f"{name}-{seed}/lengths"] = of_run(run_directory(root, name, seed))
        computations[f"rope-{seed}/scalings"] = of_run(run_directory(root, "rope", seed), scalings=SCALINGS[1:])
        for kind in COPYING:
            computations[f"copy_{kind}-{seed}"] = functools.partial(copy_back.accuracies, kind, seed, steps)
    figures = experiments.measure_all(root, computations, origins)

    def of_seeds(name: str) -> list[Any]:
        return [figures[name.format(seed)] for seed in range(seeds)]

    loss = {name: [f["as trained"] for f in of_seeds(f"{runs[name]}-{{}}/lengths")] for name in KINDS}
    for scaling in SCALINGS[1:]:
        loss[f"rope, {scaling} at test time"] = [f[scaling] for f in of_seeds("rope-{}/scalings")]
        for scaled, plain in zip(loss[f"rope, {scaling} at test time"], loss["rope"], strict=True):
            for protocol in scaled:  # at the trained length, a factor of 1: no scaling
                scaled[protocol]["1"] = plain[protocol]["1"]
    loss |= {name: [f["as trained"] for f in of_seeds(f"{runs[name]}-{{}}/lengths")] for name in tuned}
    return loss, {kind: of_seeds(f"copy_{kind}-{{}}") for kind in COPYING}


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"size": "quick", "seeds": 2}))
