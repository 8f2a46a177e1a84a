"""Every position scheme trained at one length and asked at 1, 2, 4 and 8 times that length: P2, P4, P5, P7, P8.

    PYTHONPATH=. python experiments/length_extrapolation/sweep.py [--size=full] [--seeds=3] [--jobs=2]

Trains, fine-tunes, measures, draws and judges. What is done is kept under --runs and not done again: the
same command goes on where it was stopped. Writes results.json, lengths.png and the tables in README.md.
"""

import pathlib

from absl import flags

from experiments.length_extrapolation import report
from llm_jax import cli
from llm_jax.research import experiments, jobs, live_table, points
from llm_jax.research.jobs import Job

HERE = pathlib.Path(__file__).parent

flags.DEFINE_enum("size", "cpu", ("cpu", "full"), "cpu, or full (an accelerator)")
flags.DEFINE_integer("seeds", 3, "runs of each kind", lower_bound=2)
flags.DEFINE_integer("jobs", 0, "processes at a time, each on its share of the cores; 0: one a core, or one with a GPU")
flags.DEFINE_string("runs", "runs/length_extrapolation", "where the runs are kept")

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
SIZES = {
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


def main() -> None:
    f = flags.FLAGS
    root = experiments.directory(f.runs, f.size)
    for phase in plan(root, f.size, f.seeds):
        jobs.run_all(phase, jobs.machine_shares(f.jobs, len(phase)), show=live_table.print_changes())
    loss, copied, origins = report.read(root, f.seeds, list(KINDS), SCALINGS, COPYING)
    report.draw(loss, HERE / "lengths.png")
    results = report.judge(loss, copied, f.seeds)
    print(experiments.publish(__file__, results, report.tables(loss, copied), origins=origins))


def plan(root: pathlib.Path, size: str, seeds: int) -> list[list[Job]]:
    """The jobs, in phases of which each needs the one before."""
    length, all_runs, tuning = SIZES[size]
    trains, tunes, measures, copies = [], [], [], []
    for seed in range(seeds):
        for name, position in KINDS.items():
            run = root / f"{name}-{seed}".replace(" ", "_")
            changes = all_runs | {f"model.position.{k}": v for k, v in position.items()} | {"train.seed": seed}
            trains.append(points.training(HERE / "config.py", changes, run))
            measures.append(measure(run, length))
        base = root / f"rope-{seed}"
        measures.append(measure(base, length, "scalings"))
        for scaling in SCALINGS:
            run = root / f"tuned_{scaling}-{seed}"
            changes = all_runs | tuning | {"train.seed": seed, "train.seq_len": 8 * length, "init_from": str(base)}
            if scaling != "none":
                changes |= {
                    "model.position.scaling": scaling,
                    "model.position.scaling_factor": 1.0 if scaling == "dynamic" else 8.0,
                    "model.position.original_length": length,
                }
            tunes.append(points.training(HERE / "config.py", changes, run))
            measures.append(measure(run, length))
        for kind in COPYING:
            output = root / f"copy_{kind}-{seed}.json"
            command = (str(HERE / "copy_back.py"), f"--kind={kind}", f"--seed={seed}", f"--output={output}")
            copies.append(job(f"copy back by {kind}, seed {seed}", command, output))
    return [trains + copies, tunes, measures]


def measure(run: pathlib.Path, length: int, what: str = "lengths") -> Job:
    output = run / f"{what}.json"
    command = (str(HERE / "measure.py"), f"--checkpoint={run}", f"--original_length={length}", f"--output={output}")
    extra = ("--scalings",) if what == "scalings" else ()
    return job(f"measure {what} of {run.name}", command + extra, output)


def job(name: str, command: tuple[str, ...], result: pathlib.Path) -> Job:
    """A job that is done when the file `result` exists."""
    return Job(name, command, result.parent / "logs" / name.replace(" ", "_").replace(",", ""), result.exists)


if __name__ == "__main__":
    cli.run_script(main)
