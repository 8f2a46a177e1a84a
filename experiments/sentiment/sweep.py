"""SmolLM2-135M classifies sentiment: prompted, probed, adapted, fully fine-tuned. L1, L5, L8, L9, L10, L12.

The figures of a finished job are a file in figures/, which is committed. Its name contains a digest of the options that
affect the figures, so that a job with other options is measured again.
"""

import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments.sentiment import measure, report
from llm_jax import cli, configuration
from llm_jax.errors import UserError
from llm_jax.research import experiments, jobs, points, runs
from llm_jax.research.provenance import Provenance

HERE = pathlib.Path(__file__).parent
RECIPE = HERE.parents[1] / "configs" / "sentiment_lora.py"
# Overrides of the recipe (LoRA of rank 8 on all linear layers).
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
SMOKE: dict[str, object] = {"train.steps": 1, "train.batch_size": 2, "optim.warmup_steps": 0}
SMOKE |= {"lora.targets": (r"layers/\d+/mlp/up",)}  # PiSSA decomposes every weight
SMOKE |= {"data.labelled.test_size": 4.0, "data.labelled.validation_size": 4.0, "data.labelled.train_size": 8}
# Overrides, and the test and training sentences of jobs that train no model; (): all.
SIZES: dict[str, tuple[dict[str, object], tuple[int, ...]]] = {"cpu": (FAST, ()), "smoke": (SMOKE, (4, 8))}

flags.DEFINE_enum("size", "cpu", list(SIZES), "cpu: 2,000 training and 1,000 test sentences; smoke: one step")
flags.DEFINE_integer("seeds", 3, "runs of each kind that is trained", lower_bound=1)
flags.DEFINE_string("runs", "runs/sentiment", "directory of the runs")
flags.DEFINE_string("part", "1/1", "2/3: the second of every three jobs, beside processes that do the others")


def main() -> None:
    f = flags.FLAGS
    number, count = map(int, f.part.split("/")) if re.fullmatch(r"\d+/\d+", f.part) else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--part={f.part}; expected a part such as 1/2 or 2/2")
    root = experiments.directory(f.runs, f.size)
    directory = HERE / "figures" if f.size == "cpu" else root / "figures"
    computations = all_jobs(root, f.size, f.seeds)
    names = {f"{kind}-{seed}-{digest}": job for (kind, seed, digest), job in computations.items()}
    origins: list[Provenance] = []
    measured = experiments.measure_all(directory, dict(list(names.items())[number - 1 :: count]), origins)
    if count > 1:
        print("started again without --part, it publishes the results")
        return
    figures: dict[str, list[dict[str, Any]]] = {}
    for (kind, *_), of_job in zip(computations, measured.values(), strict=True):
        figures.setdefault(kind, []).append(of_job)
    prompted = {kind: figures[kind][0] for kind in measure.PROMPTED}
    trained = {kind: figures[kind] for kind in TRAINED if kind in figures}
    results = report.judge(prompted, trained, f.seeds, f.size)
    print(experiments.publish(__file__, results, report.table(prompted, trained, f.size, f.seeds), origins=origins))


def all_jobs(root: pathlib.Path, size: str, seeds: int) -> dict[tuple[str, int, str], Callable[[], Any]]:
    """{(kind, seed, digest of the options that the figures follow from): job}; those that verdicts need come first."""
    overrides, counts = SIZES[size]
    computations: dict[tuple[str, int, str], Callable[[], Any]] = {}
    for kind in measure.PROMPTED:
        digest = experiments.digest(json.dumps([overrides, counts]))
        computations[kind, 0, digest] = functools.partial(measure.untrained, kind, size == "cpu", *counts)
    others = [kind for kind in TRAINED if kind not in report.JUDGED] if size == "cpu" else []
    for kind, seed in [(kind, seed) for kinds in (report.JUDGED, others) for seed in range(seeds) for kind in kinds]:
        config = configuration.load(RECIPE, overrides | TRAINED[kind])
        options = {key: value for key, value in configuration.flat(config).items() if key in config.explicit}
        digest = experiments.digest(
            json.dumps(
                {key: options[key] for key in sorted(options.keys() - {*runs.OPTIONS_WITHOUT_EFFECT_ON_RESULTS})}
            )
        )
        changes = overrides | TRAINED[kind] | {"train.seed": seed}
        workdir = root / experiments.file_name(f"{kind}-{seed}-{digest}")
        computations[kind, seed, digest] = functools.partial(train, changes, workdir, size == "cpu" and seed == 0)
    return computations


def train(changes: dict[str, object], workdir: pathlib.Path, products: bool) -> dict[str, Any]:
    """The figures of a training, which is resumed after an interruption."""
    training = points.training(RECIPE, changes, workdir)
    jobs.run_all([training], jobs.machine_shares(1), environment=points.environment(workdir.parent))
    return measure.trained(workdir, products)


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={"size": "smoke", "seeds": 1}))
