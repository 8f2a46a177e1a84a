"""The table and the verdicts of the sentiment experiment. The rules below were fixed before the run.

Accuracies are those on the test sentences, in points of 100. Of what is trained, the mean over the seeds with
its 95 % t-interval, and differences are paired by seed; of what is not, and on product reviews (of which the first
seed's run is asked), the 95 % interval of Wilson.

L1   holds if LoRA r=8 trains at most 2 % of the parameters and the interval of its difference to full
     fine-tuning lies above -MARGIN; fails if it lies below -MARGIN; else undecided.
L5   holds if the interval of PiSSA's difference to LoRA, both of rank 8, lies above 0; fails if below; else
     undecided.
L8   (low-rank factors in 8 bits, trained straight-through) and L9 (NF4 base with double quantization): hold if
     the interval of the difference to LoRA r=8 lies above -MARGIN; fail if it lies below; else undecided. Of L8:
     the trained masters stay float32, so that training takes no fewer bytes for them. Of L9: the base is of
     Q4_1 numbers already, so that this is no measure of what NF4 costs full-precision weights.
L10  holds if the interval of LoRA r=8 lies above that of zero-shot and of few-shot prompting; fails if it lies below
     that of one of them; else undecided.
L12  holds if a product that has the shape of the weight is a b with a (in, r) and b (r, out), which is the
     text's "A is d x r, B is r x d" with ΔW = A B; its "ΔW = B A" would be r x r. Read off the trained arrays.

With fewer than three seeds every verdict on what is trained is "untested here".
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax import checkpoints, trees
from llm_jax.intervals import Interval, mean, paired
from llm_jax.research import findings, verdicts
from llm_jax.research.findings import Finding

MARGIN = 1.0  # points
JUDGED = (
    "LoRA r=8",
    "PiSSA r=8",
    "QLoRA r=8, NF4 base",
    "LoRA r=8, factors in int8",
    "QLoRA r=8, both",
    "full",
)
COMMAND = "PYTHONPATH=. python experiments/sentiment/sweep.py"


def slug(name: str) -> str:
    """A file's name."""
    return re.sub(r"[^a-z0-9+]+", "-", name.lower()).strip("-")


def write(here: pathlib.Path, asked, runs, size: str, seeds: int) -> str:
    """Writes results.json and the table in README.md; returns the verdicts as text.

    Args:
      asked: what was found by each way of prompting.
      runs: what was found by each kind of training, seed by seed.
    """
    results = judge(asked, runs, runs["LoRA r=8"][0]["factors"], seeds, size)
    return findings.publish(here, results, table(asked, runs, size, seeds))


def factor_shapes(run: pathlib.Path) -> dict[str, Any]:
    """Shapes of one weight's a and b in a checkpoint, one layer's."""
    directory = checkpoints.find(run)
    record = checkpoints.verify(directory)["params"]
    path = next(p.rsplit("/", 1)[0] for p in record if "/mlp/up/" in p)
    lead = trees.layers_of(path) is not None
    return {part: record[f"{path}/{part}"]["shape"][lead:] for part in ("a", "b")}


def judge(asked, runs, shapes, seeds: int, size: str) -> list[Finding]:
    """The verdicts by the rules above."""
    points = {name: [100 * r["test_accuracy"] for r in found] for name, found in runs.items()}

    def difference(name: str, other: str = "LoRA r=8") -> Interval:
        return paired(points[name], points[other])

    def finding(statement: str, measure: str, value: Any, verdict: str) -> Finding:
        if statement != "L12" and (seeds < 3 or size != "cpu"):
            verdict = f"untested here (wants {COMMAND}, three seeds)"
        command = f"{COMMAND} --size={size} --seeds={seeds}"
        return findings.finding(statement, measure, value, verdict, command=command, n=seeds)

    share = 100 * runs["LoRA r=8"][0]["trained_parameters"] / runs["LoRA r=8"][0]["parameters"]
    l1 = difference("LoRA r=8", "full")
    l1_verdict = verdicts.above(l1, -MARGIN)
    if l1_verdict == "holds" and share > 2:
        l1_verdict = "undecided"
    l5 = difference("PiSSA r=8")
    l8, l9 = difference("LoRA r=8, factors in int8"), difference("QLoRA r=8, NF4 base")
    best = mean(points["LoRA r=8"])
    prompts = [asked[kind] for kind in ("zero-shot", "few-shot")]
    high, low = (100 * max(prompt[end] for prompt in prompts) for end in ("high", "low"))
    l10 = "holds" if best.low > high else "fails" if best.high < low else "undecided"
    prompted = {kind: Interval(*(100 * v[k] for k in ("accuracy", "low", "high"))) for kind, v in asked.items()}
    (i, r), (r2, o) = shapes["a"], shapes["b"]
    l12 = {"a": shapes["a"], "b": shapes["b"], "a b": [i, o], "b a": f"needs {o} = {i}; {r2} x {r}"}
    return [
        finding(
            "L1",
            "accuracy of LoRA r=8 minus full fine-tuning, points; share trained, %",
            {"difference": l1, "share": share},
            l1_verdict,
        ),
        finding("L5", "accuracy of PiSSA minus LoRA, r=8, points", l5, verdicts.above(l5)),
        finding("L8", "accuracy with factors in int8 minus LoRA, r=8, points", l8, verdicts.above(l8, -MARGIN)),
        finding(
            "L9",
            "accuracy over an NF4 base minus LoRA, r=8, points; both quantized beside it",
            {"NF4 base": l9, "both": difference("QLoRA r=8, both")},
            verdicts.above(l9, -MARGIN),
        ),
        finding("L10", "accuracy of LoRA r=8 against prompting, %", {"LoRA r=8": best} | prompted, l10),
        finding(
            "L12",
            "A is d x r, B is r x d and dW = B A",
            l12,
            "fails as written: of these shapes A B is the update, B A at best r x r",
        ),
    ]


def table(asked, runs, size: str, seeds: int) -> list[str]:
    """Markdown."""

    def percent(estimate: float, low: float, high: float) -> str:
        return f"{estimate:.1f}" if np.isnan(low) else f"{estimate:.1f} ({low:.1f} to {high:.1f})"

    def products(found: Sequence[dict[str, Any]]) -> str:
        """Of the seed that was asked, if it is done."""
        asked = [
            percent(*(100 * r["products"][k] for k in ("accuracy", "low", "high"))) for r in found if "products" in r
        ]
        return asked[0] if asked else ""

    lines = ["", f"Size `{size}`, {seeds} seed{'s' * (seeds > 1)}:", ""]
    heads = (
        "kind",
        "seeds",
        "accuracy, %",
        "product reviews, %",
        "trained",
        "adapter, MiB",
        "step, s",
        "peak memory, GiB",
    )
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for kind, found in asked.items():
        said = percent(*(100 * found[k] for k in ("accuracy", "low", "high")))
        lines.append(f"| {kind} | | {said} | {products([found])} | {found.get('trained_parameters', 0):,} | | | |")
    for name, found in runs.items():
        if not found:
            continue
        accuracy = percent(*mean([100 * r["test_accuracy"] for r in found]))
        first = found[0]
        # A run that was stopped and went on has the time and the peak of its last part: it is shorter than 100 steps.
        peaks = [r["peak_host_bytes"] / 2**30 for r in found if r["seconds"] > 100 * r["step_seconds"]]
        seconds = min(r["step_seconds"] for r in found)  # the run that was least disturbed
        lines.append(
            f"| {name} | {len(found)} | {accuracy} | {products(found)} | {first['trained_parameters']:,} | "
            f"{4 * first['trained_parameters'] / 2**20:.2f} | {seconds:.1f} | {f'{max(peaks):.2f}' if peaks else ''} |"
        )
    return lines
