"""Position schemes are trained at one length and evaluated at 1, 2, 4 and 8 times that length: P2, P4, P5, P7, P8."""

from typing import Any

from absl import flags

from experiments import decoders
from experiments.length_extrapolation import copy_back, measure, report
from llm_jax import cli
from llm_jax.research import experiments

# Overrides below `model.position`.
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

# Condition -> (the training, the scaling of rope at evaluation).
CONDITIONS = {
    **{kind: (kind, "") for kind in KINDS},
    **{f"rope, {scaling} at test time": ("rope", scaling) for scaling in SCALINGS[1:]},
    **{f"rope, {scaling}, fine-tuned": (f"tuned {scaling}", "") for scaling in SCALINGS},
}

FULL_POSITIONS = {"model.position.max_length": 4096, "model.position.width": 192, "data.source": "stdlib"}
# By size: overrides of all runs, and of the fine-tuning at 8 times the length; blocks of held-out text; copying steps.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "quick": (
        decoders.UNTIED | {"data.validation_fraction": 0.05, "train.steps": 2, "optim.warmup_steps": 1},
        {"train.batch_size": 1},
        2,
        100,
    ),
    "cpu": (
        decoders.UNTIED,
        {"train.steps": 60, "train.batch_size": 4, "optim.lr": 1e-3, "optim.warmup_steps": 10},
        32,
        1600,
    ),
    "full": (
        decoders.UNTIED | decoders.FULL | FULL_POSITIONS,
        {"train.steps": 1000, "train.batch_size": 8, "optim.lr": 1e-4, "optim.warmup_steps": 100},
        32,
        1600,
    ),
}

flags.DEFINE_enum("size", "cpu", list(SIZES), "cpu, full (an accelerator), or quick")
flags.DEFINE_integer("seeds", 3, "models of each kind", lower_bound=2)
flags.DEFINE_integer("jobs", 0, "trainings at a time, each on its share of the cores; 0: one a core, or one a GPU")


def main() -> None:
    f = flags.FLAGS
    root = experiments.directory(f.runs, f.size)
    all_runs, tuning, blocks, steps = SIZES[f.size]
    length = all_runs["train.seq_len"]
    kinds = {name: all_runs | position(**options) for name, options in KINDS.items()}
    tuned = {"tuned none": all_runs | tuning | {"train.seq_len": 8 * length}}
    for scaling in SCALINGS[1:]:
        factor = 1.0 if scaling == "dynamic" else 8.0  # dynamic scaling takes the factor from the length itself
        options = position(scaling=scaling, scaling_factor=factor, original_length=length)
        tuned[f"tuned {scaling}"] = tuned["tuned none"] | options
    origins = experiments.train(experiments.trainings(root, "default", kinds, f.seeds), f.jobs)
    origins += experiments.train(experiments.trainings(root, "default", tuned, f.seeds, start="rope"), f.jobs)

    def losses(condition: str, seed: int) -> measure.Losses:
        name, scaling = CONDITIONS[condition]
        return measure.losses_by_length(experiments.run_directory(root, name, seed), length, blocks, scaling)

    def accuracies(kind: str, seed: int) -> dict[str, float]:
        return copy_back.accuracies(kind, seed, steps)

    loss, measured = experiments.measure(root / "lengths", CONDITIONS, f.seeds, losses)
    copied, copied_at = experiments.measure(root / "copying", COPYING, f.seeds, accuracies)
    report.draw(loss, experiments.output(__file__) / "lengths.png")
    results, tables = report.judge(loss, copied, f.seeds), report.tables(loss, copied)
    print(experiments.publish(__file__, results, tables, origins=[*origins, *measured, *copied_at]))


def position(**options: Any) -> dict[str, Any]:
    return {f"model.position.{name}": value for name, value in options.items()}


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"size": "quick", "seeds": 2}))
