"""The training loss of a run with its running mean, and its held-out loss, against the number of tokens."""

import pathlib

import numpy as np
from absl import flags

from llm_jax import cli
from llm_jax.errors import UserError
from llm_jax.evaluation import example_counts
from llm_jax.research import plots, runs

WINDOW = 50  # steps of the running mean

flags.DEFINE_string("run", "runs/reference_lm", "run directory")
flags.DEFINE_string("output", str(pathlib.Path(__file__).with_name("curve.png")), "file of the picture")


def main() -> None:
    run = runs.load([pathlib.Path(flags.FLAGS.run).expanduser()])[0]
    if not run.metrics:
        raise UserError(f"--run={flags.FLAGS.run}: no metrics.jsonl here; expected a run")
    tokens = np.cumsum([line["tokens"] for line in run.metrics]) / 1e6
    tokens_by_step = {line["step"]: count for line, count in zip(run.metrics, tokens, strict=True)}
    loss = np.asarray([line["loss"] for line in run.metrics], float)
    end = run.final_point("validation_loss")
    with plots.figure(flags.FLAGS.output, figsize=(7, 3.6), dpi=120) as axes:
        axes.plot(tokens, loss, color="tab:blue", alpha=0.25, linewidth=0.6, label="training, each step")
        if len(loss) >= WINDOW:
            mean = np.convolve(loss, np.ones(WINDOW) / WINDOW, "valid")
            axes.plot(tokens[WINDOW - 1 :], mean, color="tab:blue", label=f"training, mean of {WINDOW} steps")
        parts = ((run.curve("validation_loss"), "o-", "tab:orange"), ([end] if end else [], "s", "tab:red"))
        for points, style, color in parts:
            if points:
                label = f"held out, {example_counts.text('validation_loss', points[0].examples)}"
                values = [point.value for point in points]
                axes.plot([tokens_by_step[point.step] for point in points], values, style, color=color, label=label)
        axes.set(xlabel="million tokens", ylabel="nats per token")
    print(f"wrote {flags.FLAGS.output}")


if __name__ == "__main__":
    cli.run_script(main)
