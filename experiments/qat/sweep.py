"""Quantizing after training against training with quantization in the loop, for the same budget: Q2.

    PYTHONPATH=. python experiments/qat/sweep.py [--size=full] [--seeds=3]

A start is trained in full precision from every seed. From there, for the same steps on the same batches: once
more in full precision, quantized after that by several methods; and with every scheme in the loop. What is done
is kept under --runs and not done again: the same command goes on where it was stopped. Writes results.json,
qat.png and the tables in README.md.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.qat import report
from llm_jax import checkpoints, cli, files, trees
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows, Shuffled
from llm_jax.errors import UserError
from llm_jax.evaluation import held_out
from llm_jax.model.transformer import Transformer
from llm_jax.quant import calibrate, post_training
from llm_jax.research import jobs, live_table, points
from llm_jax.training import losses

HERE = pathlib.Path(__file__).parent

flags.DEFINE_string("size", "cpu", "cpu, or full (an accelerator)")
flags.DEFINE_integer("seeds", 3, "starts")
flags.DEFINE_integer("jobs", 1, "runs at a time, each on its share of the cores; 0: one a core, or one a GPU")
flags.DEFINE_string("runs", "runs/qat", "where the runs are kept")

# Name -> (scheme, learned steps, methods of quantizing after training). Tables are in 8 bits.
SCHEMES = {
    "int8": ("int8", False, ("absmax", "mse", "gptq")),
    "w8a8": ("w8a8", False, ("absmax", "mse", "smoothquant", "gptq")),
    "int4": ("int4", False, ("absmax", "mse", "awq", "gptq")),
    "int4:channel": ("int4:channel", True, ("absmax", "mse", "awq", "gptq")),
    "int2": ("int2", True, ("absmax", "mse", "awq", "gptq")),
}

# Overrides of all runs by size, and of what follows the start.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cpu": ({}, {"train.steps": 200, "optim.lr": 5e-4, "optim.warmup_steps": 20}),
    "full": (
        {
            "tokenizer.vocab_size": 8192,
            "model.width": 768,
            "model.num_layers": 12,
            "model.num_heads": 12,
            "model.num_kv_heads": 12,
            "model.mlp_dim": 2048,
            "model.precision.compute": "bfloat16",
            "train.steps": 20000,
            "train.batch_size": 64,
            "train.seq_len": 512,
            "optim.lr": 6e-4,
            "optim.warmup_steps": 1000,
        },
        {"train.steps": 4000, "optim.lr": 1e-4, "optim.warmup_steps": 200},
    ),
}


def main() -> None:
    f = flags.FLAGS
    if f.size not in SIZES or f.seeds < 2:
        raise UserError(f"--size={f.size} --seeds={f.seeds}; expected one of {', '.join(SIZES)} and at least 2 seeds")
    root = pathlib.Path(f.runs).expanduser() / f.size
    files.make_directory(root)
    everywhere, after = SIZES[f.size]
    starts, followers = [], []
    for seed in range(f.seeds):
        start = root / f"start-{seed}"
        starts.append(points.training(HERE / "config.py", everywhere | {"train.seed": seed}, start))
        follow = everywhere | after | {"train.seed": seed + 1000, "init_from": str(start)}
        followers.append(points.training(HERE / "config.py", follow, root / f"plain-{seed}"))
        for name, (scheme, learned, _) in SCHEMES.items():
            changes = follow | {"quant.qat.scheme": scheme, "quant.qat.learned_step": learned}
            followers.append(points.training(HERE / "config.py", changes, run_directory(root, name, seed)))
    for phase in (starts, followers):
        jobs.run_all(phase, jobs.machine_shares(f.jobs, len(phase)), show=live_table.print_changes())
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SCHEMES}
    for seed in tqdm(range(f.seeds), "comparing"):
        for name, (scheme, _, methods) in SCHEMES.items():
            run = run_directory(root, name, seed)
            if not (run / "compared.json").exists():
                files.write_json(run / "compared.json", compare(root / f"plain-{seed}", run, scheme, methods))
            found[name].append(report.read(run / "compared.json"))
    print(report.write(HERE, found, f.seeds))


def run_directory(root: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """The run that trains with a scheme in the loop."""
    return root / f"{name.replace(':', '-')}-{seed}"


def compare(plain: pathlib.Path, trained: pathlib.Path, scheme: str, methods: tuple[str, ...]) -> dict[str, float]:
    """Held-out losses, nats a token: of the full model, of each method after training, and of the trained integers."""
    model, params, tokenizer = checkpoints.load(plain)
    config = checkpoints.read_config(checkpoints.find(plain))
    corpus = Source(config.data).corpus(tokenizer)
    held = Rows(corpus.validation, config.train.seq_len)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def loss(params: Any, model: Transformer = model) -> float:
        one = jax.jit(lambda params, batch: losses.language_model(model, params, batch, 0))
        rows = min(len(held), 1024)
        return held_out.evaluate(one, params, held, 32, device, rows)["loss"]

    shuffled = Shuffled(Rows(corpus.train, config.train.seq_len), 0)
    planned = post_training.plan(params, post_training.rules(scheme, "int8"), "the experiment")
    found = {"full": loss(params)}
    for method in methods:
        rows = [shuffled[i] for i in range(128)] if calibrate.needs_text(planned, method) else []
        kept = trained / f"after-{method}"
        made, _ = calibrate.run(
            model, trees.flatten(params), planned, rows, calibrate.CalibrationOptions(method, True, 32), kept
        )
        found[method] = loss(made)
    found["qat"] = loss(post_training.finish(checkpoints.load(trained).params))
    if not all(np.isfinite(list(found.values()))):
        raise UserError(f"{trained}: a loss is not finite ({found})")
    return found


if __name__ == "__main__":
    cli.run_script(main)
