"""Sentiment by SmolLM2-135M: prompted, probed, adapted, fully fine-tuned. L1, L5, L8, L9, L10, L12.

    PYTHONPATH=. python experiments/sentiment/sweep.py [--size=cpu|smoke] [--seeds=3]

One job after the other; what is done is kept under --runs and not done again: the same command goes on
where it was stopped. Writes results.json and the table in README.md beside this file.
"""

import os
import pathlib
import subprocess
import sys

from absl import flags
from tqdm import tqdm

from experiments.sentiment import report
from llm_jax import checkpoint, cli
from llm_jax.errors import UserError

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]

flags.DEFINE_string("size", "cpu", "cpu: 2,000 training and 1,000 test sentences; smoke: a few steps, to try it")
flags.DEFINE_integer("seeds", 3, "runs of each kind that is trained")
flags.DEFINE_string("runs", "runs/sentiment", "where the runs are kept")

PROMPTED = ("zero-shot", "few-shot", "probe")
# What a run changes below the recipe configs/sentiment_lora.py (LoRA of rank 8 on all linear layers).
TRAINED = {
    "LoRA r=1": {"lora.rank": 1, "lora.alpha": 2.0},
    "LoRA r=8": {},
    "LoRA r=64": {"lora.rank": 64, "lora.alpha": 128.0},
    "LoRA r=8, rank-stabilized": {"lora.rank_stabilized": True, "lora.alpha": 2 * 8**0.5},
    "LoRA+ r=8": {"lora.b_lr_ratio": 16.0, "optim.lr": 2e-4},
    "DoRA r=8": {"lora.variant": "dora"},
    "PiSSA r=8": {"lora.variant": "pissa", "lora.alpha": 8.0, "optim.lr": 2e-4},
    "LoRA-FA r=8": {"lora.variant": "fa", "optim.lr": 2e-3},
    "QLoRA r=8, NF4 base": {"quant.scheme": "nf4"},
    "LoRA r=8, factors in int8": {"lora.factors": "int8"},
    "QLoRA r=8, both": {"quant.scheme": "nf4", "lora.factors": "int8"},
    "full": {"lora.rank": 0, "optim.lr": 2e-5},
}
SIZES = {"cpu": ({}, ()), "smoke": ({"train.steps": 12, "optim.warmup_steps": 2}, ("--test=64", "--train=64"))}


def main() -> None:
    f = flags.FLAGS
    if f.size not in SIZES or f.seeds < 1:
        raise UserError(f"--size={f.size} --seeds={f.seeds}; expected one of {', '.join(SIZES)} and at least 1 seed")
    root = pathlib.Path(f.runs).expanduser() / f.size
    checkpoint.make_directory(root)
    changes, limits = SIZES[f.size]
    jobs: list[tuple[pathlib.Path, list[str]]] = []
    for kind in PROMPTED:
        done = root / f"{kind}.json"
        jobs.append((done, [str(HERE / "measure.py"), f"--kind={kind}", f"--output={done}", *limits]))
    for seed in range(f.seeds):
        for name, own in TRAINED.items():
            run = root / f"{report.slug(name)}-{seed}"
            overrides = {f"config.{k}": v for k, v in (changes | own | {"train.seed": seed}).items()}
            flags_ = [f"--{key}={value}" for key, value in overrides.items()]
            recipe = f"--config={ROOT / 'configs' / 'sentiment_lora.py'}"
            jobs.append((run / "summary.json", ["-m", "llm_jax.train", recipe, f"--workdir={run}", *flags_]))
            if f.size == "cpu":
                other = ["-m", "llm_jax.evaluate", f"--checkpoint={run}", "--data=sentiment:amazon-reviews", "--json"]
                jobs.append((run / "amazon.json", other))
    waiting = [job for job in jobs if not job[0].exists()]
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting)) as bar:
        for done, command in waiting:
            bar.set_description(done.parent.name if done.name != f"{done.stem}.json" else done.stem)
            run_one(done, command)
            bar.update()
    print(report.write(HERE, root, f.size, f.seeds, PROMPTED, TRAINED))


def run_one(done: pathlib.Path, command: list[str]) -> None:
    """Runs a job; what it prints goes beside its result. Raises UserError where it fails."""
    done.parent.mkdir(exist_ok=True)
    log = done.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.run(
            [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
    lines = log.read_text().strip().splitlines() or ["no output"]
    if process.returncode:
        raise UserError(f"{' '.join(command[:3])} failed with exit code {process.returncode}: {lines[-1]} ({log})")
    if not done.exists():  # a command that prints its result
        done.write_text(lines[-1] + "\n")


if __name__ == "__main__":
    cli.run(main)
