"""The training loss of a run with its running mean, and its held-out loss, against the number of tokens."""

import pathlib

import numpy as np
from absl import flags

from llm_jax import cli
from llm_jax.errors import UserError
from llm_jax.research import plots, runs

WINDOW = 50  # steps of the running mean

flags.DEFINE_string("run", "runs/reference_lm", "run directory")
flags.DEFINE_string("output", str(pathlib.Path(__file__).with_name("curve.png")), "file of the picture")


def main() -> None:
    lines = runs.read_lines(pathlib.Path(flags.FLAGS.run).expanduser() / "metrics.jsonl")
    if not lines:
        raise UserError(f"--run={flags.FLAGS.run}: no metrics.jsonl here; expected a run")
    tokens = np.cumsum([line["tokens"] for line in lines]) / 1e6
    loss = np.asarray([line["loss"] for line in lines], float)
    held = [(t, line["validation_loss"]) for t, line in zip(tokens, lines, strict=True) if "validation_loss" in line]
    with plots.figure(flags.FLAGS.output, figsize=(7, 3.6), dpi=120) as axes:
        axes.plot(tokens, loss, color="tab:blue", alpha=0.25, linewidth=0.6, label="training, each step")
        if len(loss) >= WINDOW:
            mean = np.convolve(loss, np.ones(WINDOW) / WINDOW, "valid")
            axes.plot(tokens[WINDOW - 1 :], mean, color="tab:blue", label=f"training, mean of {WINDOW} steps")
        for points, style, label in ((held[:-1], "o-", "the first eval.rows rows"), (held[-1:], "s", "all")):
            if points:
                color = "tab:orange" if style == "o-" else "tab:red"
                axes.plot(*zip(*points, strict=True), style, color=color, label=f"held out, {label}")
        axes.set(xlabel="million tokens", ylabel="nats per token")
    print(f"wrote {flags.FLAGS.output}")


if __name__ == "__main__":
    cli.run_script(main)
