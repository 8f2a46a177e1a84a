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
    l1_measure = "accuracy of LoRA r=8 minus full fine-tuning, points; share trained, %"
    l9_measure = "accuracy over an NF4 base minus LoRA, r=8, points; both quantized beside it"
    l9_values = {"NF4 base": l9, "both": difference("QLoRA r=8, both")}
    l12_verdict = "fails as written: of these shapes A B is the update, B A at best r x r"
    rows = [
        ("L1", l1_measure, {"difference": l1, "share": share}, l1_verdict),
        ("L5", "accuracy of PiSSA minus LoRA, r=8, points", l5, verdicts.above(l5)),
        ("L8", "accuracy with factors in int8 minus LoRA, r=8, points", l8, verdicts.above(l8, -MARGIN)),
        ("L9", l9_measure, l9_values, verdicts.above(l9, -MARGIN)),
        ("L10", "accuracy of LoRA r=8 against prompting, %", {"LoRA r=8": best} | prompted, l10),
        ("L12", "A is d x r, B is r x d and dW = B A", l12, l12_verdict),
    ]
    if seeds < 3 or size != "cpu":
        untested = f"untested here (wants {COMMAND}, three seeds)"
        rows = [(*row[:3], row[3] if row[0] == "L12" else untested) for row in rows]
    return [findings.finding(*row, n=seeds) for row in rows]


def table(asked, runs, size: str, seeds: int) -> list[str]:
    """Markdown."""

    def percent(prompted: dict[str, Any]) -> str:
        return findings.interval_text([100 * prompted[k] for k in ("accuracy", "low", "high")], 1)

    def products(results: Sequence[dict[str, Any]]) -> str:
        """Of the seed that was asked about product reviews, if it is done."""
        return next((percent(r["products"]) for r in results if "products" in r), "")

    rows = [
        [kind, "", percent(r), products([r]), f"{r.get('trained_parameters', 0):,}", "", "", ""]
        for kind, r in asked.items()
    ]
    for name, results in runs.items():
        if results:
            accuracy = findings.interval_text(mean([100 * r["test_accuracy"] for r in results]), 1)
            trained = results[0]["trained_parameters"]
            # A run that was resumed has the time and the peak of its last part: it is shorter than 100 steps.
            peaks = [r["peak_host_bytes"] / 2**30 for r in results if r["seconds"] > 100 * r["step_seconds"]]
            seconds = min(r["step_seconds"] for r in results)  # the run that was least disturbed
            peak = f"{max(peaks):.2f}" if peaks else ""
            sizes = [f"{trained:,}", f"{4 * trained / 2**20:.2f}", f"{seconds:.1f}", peak]
            rows.append([name, len(results), accuracy, products(results), *sizes])
    head = ["kind", "seeds", "accuracy, %", "product reviews, %", "trained", "adapter, MiB", "step, s"]
    title = f"Size `{size}`, {seeds} seed{'s' * (seeds > 1)}:"
    return ["", title, "", *findings.markdown_table([*head, "peak memory, GiB"], rows)]
