"""The table and the verdicts of the sentiment experiment.

Accuracies are in points of 100: of trained models the mean over the seeds with its 95 % t-interval, differences paired
by seed; of others, and on product reviews (of the first seed's run), with the 95 % interval of Wilson. With fewer than
three seeds every verdict on what is trained is "untested here".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.intervals import Interval, mean
from llm_jax.research import findings, verdicts
from llm_jax.research.findings import Figures, Finding

MARGIN = 1.0  # points
LORA, PISSA, NF4, INT8 = "LoRA r=8", "PiSSA r=8", "QLoRA r=8, NF4 base", "LoRA r=8, factors in int8"
BOTH, FULL = "QLoRA r=8, both", "full"
JUDGED = (LORA, PISSA, NF4, INT8, BOTH, FULL)
MEASURES = {
    "L1": "accuracy of LoRA r=8 minus full fine-tuning, points; share trained, %",
    "L5": "accuracy of PiSSA minus LoRA, r=8, points",
    "L8": "accuracy with factors in int8 minus LoRA, r=8, points",
    "L9": "accuracy over an NF4 base minus LoRA, r=8, points; both quantized beside it",
    "L10": "accuracy of LoRA r=8 against prompting, %",
    "L12": "A is d x r, B is r x d and dW = B A",
}


def judge(prompted: Mapping[str, Any], runs: Figures, seeds: int, size: str) -> list[Finding]:
    """The verdicts by the rules of statements.toml.

    Args:
      prompted: the figures of jobs that train no model.
      runs: those of all others.
    """
    judged = {name: runs[name] for name in JUDGED}
    gains = findings.differences(judged, "test_accuracy", LORA, 100)
    l1 = findings.differences(judged, "test_accuracy", FULL, 100)[LORA]
    share = 100 * runs[LORA][0]["trained_parameters"] / runs[LORA][0]["parameters"]
    l1_verdict = verdicts.above(l1, -MARGIN)
    if l1_verdict == "holds" and share > 2:
        l1_verdict = "undecided"
    best = findings.means(judged, "test_accuracy", 100)[LORA]
    accuracies = {name: _percent(figures) for name, figures in prompted.items()}
    high, low = (max(getattr(accuracies[kind], end) for kind in ("zero-shot", "few-shot")) for end in ("high", "low"))
    l10 = "holds" if best.low > high else "fails" if best.high < low else "undecided"
    shapes = runs[LORA][0]["factors"]
    (i, r), (r2, o) = shapes["a"], shapes["b"]
    l12 = {"a": shapes["a"], "b": shapes["b"], "a b": [i, o], "b a": f"needs {o} = {i}; {r2} x {r}"}
    judgements: dict[str, tuple[Any, str]] = {
        "L1": ({"difference": l1, "share": share}, l1_verdict),
        "L5": (gains[PISSA], verdicts.above(gains[PISSA])),
        "L8": (gains[INT8], verdicts.above(gains[INT8], -MARGIN)),
        "L9": ({"NF4 base": gains[NF4], "both": gains[BOTH]}, verdicts.above(gains[NF4], -MARGIN)),
        "L10": ({LORA: best} | accuracies, l10),
        "L12": (l12, "fails as written: of these shapes A B is the update, B A at best r x r"),
    }
    untested = "untested here (needs three seeds)" if seeds < 3 or size != "cpu" else ""
    return [
        findings.finding(name, MEASURES[name], value, untested if untested and name != "L12" else verdict, n=seeds)
        for name, (value, verdict) in judgements.items()
    ]


def _percent(figures: Mapping[str, float]) -> Interval:
    return Interval(*(100 * figures[key] for key in ("accuracy", "low", "high")))


def table(prompted: Mapping[str, Any], runs: Figures, size: str, seeds: int) -> list[str]:
    def products(results: Sequence[Mapping[str, Any]]) -> str:
        """Of the seed that was asked about product reviews, if it is done."""
        return next((findings.interval_text(_percent(r["products"]), 1) for r in results if "products" in r), "")

    rows: list[list[Any]] = []
    for kind, r in prompted.items():
        accuracy, trained = findings.interval_text(_percent(r), 1), f"{r.get('trained_parameters', 0):,}"
        rows.append([kind, "", accuracy, products([r]), trained, "", "", ""])
    for name, results in runs.items():
        if results:
            accuracy = findings.interval_text(mean([100 * r["test_accuracy"] for r in results]), 1)
            trained = results[0]["trained_parameters"]
            # A run that was resumed has the time and the peak of its last part: it is shorter than 100 steps.
            peaks = [r["peak_host_bytes"] / 2**30 for r in results if r["seconds"] > 100 * r["step_seconds"]]
            seconds = min(r["step_seconds"] for r in results)  # the run that was least disturbed
            sizes = [f"{trained:,}", f"{4 * trained / 2**20:.2f}", f"{seconds:.1f}"]
            peak = f"{max(peaks):.2f}" if peaks else ""
            rows.append([name, len(results), accuracy, products(results), *sizes, peak])
    head = ["kind", "seeds", "accuracy, %", "product reviews, %", "trained", "adapter, MiB", "step, s"]
    title = f"Size `{size}`, {seeds} seed{'s' * (seeds > 1)}:"
    return ["", title, "", *findings.markdown_table([*head, "peak memory, GiB"], rows)]
