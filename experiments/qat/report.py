"""The verdict, the table and the picture of the QAT experiment. The rule below was fixed before the run.

The *lost* loss of a scheme is the held-out loss of the best method after training minus that of the full model
(both trained for the same steps in all). The *gain* is the loss of that method minus that of the model trained
with quantization in the loop, as integers. Both are paired by seed and judged by the 95 % t-interval of the mean
over the seeds; the best method is the one with the least mean loss.

Q2  holds for a scheme if the interval of the gain lies above 0, fails for it if it lies below, else undecided.
    Holds if it holds for all schemes; "holds when" names those for which it does, if there are some; else fails
    if it fails for all, else undecided.
The share recovered is the mean gain over the mean lost loss: of the best method, and, as torchao counts it, of
plain rounding (absmax). The aim of this project, two thirds, is judged for 4 bits and below: it is given beside the
verdict.
"""

import json
import pathlib
from typing import Any

import numpy as np

from llm_jax.intervals import paired
from llm_jax.research import findings, pictures, verdicts
from llm_jax.research.findings import Finding

COMMAND = "PYTHONPATH=. python experiments/qat/sweep.py"
Found = dict[str, list[dict[str, float]]]


def best(runs: list[dict[str, float]]) -> str:
    """The method after training with the least mean loss."""
    return min((m for m in runs[0] if m not in ("full", "qat")), key=lambda m: np.mean([r[m] for r in runs]))


def judge(found: Found, seeds: int) -> list[Finding]:
    """The verdict by the rule above."""
    value: dict[str, Any] = {}
    holds, fails = [], []
    for name, runs in found.items():
        method = best(runs)
        gain, lost = (paired([r[method] for r in runs], [r[kind] for r in runs]) for kind in ("qat", "full"))
        value |= {f"{name}: lost by {method}": lost, f"{name}: gain": gain, f"{name}: share": gain[0] / lost[0]}
        rounding, trained, full = (np.mean([r[kind] for r in runs]) for kind in ("absmax", "qat", "full"))
        value[f"{name}: share of rounding"] = float((rounding - trained) / (rounding - full))
        holds += [name] if gain.low > 0 else []
        fails += [name] if gain.high < 0 else []
    none = "fails" if len(fails) == len(found) else "undecided"
    verdict = verdicts.holds_when(holds, list(found), "the scheme is", none=none)
    return [findings.finding("Q2", "held-out loss, nats a token", value, verdict, command=COMMAND, n=seeds)]


def write(here: pathlib.Path, found: Found, seeds: int) -> str:
    """Writes results.json, the picture and the table in README.md; returns the verdict as text."""
    results = judge(found, seeds)
    draw(found, here / "qat.png")
    return findings.publish(here, results, table(found, results))


def table(found: Found, results: list[Finding]) -> list[str]:
    """Markdown."""
    methods = list(dict.fromkeys(m for runs in found.values() for m in runs[0]))
    lines = ["", "Held-out loss in nats a token, mean ± standard deviation over the seeds:", ""]
    heads = ["scheme", *methods, "recovered of the best", "recovered of absmax"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, runs in found.items():
        cells = []
        for method in methods:
            values = [r[method] for r in runs if method in r]
            cells.append(f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" if values else "-")
        shares = [f"{results[0][f'{name}: {share}'].estimate:.0%}" for share in ("share", "share of rounding")]
        lines.append(f"| {' | '.join([name, *cells, *shares])} |")
    return lines


def draw(found: Found, path: pathlib.Path) -> None:
    """What each scheme loses to full precision: by the best method after training, and trained in the loop."""
    with pictures.figure(path, figsize=(8, 4)) as axis:
        x = np.arange(len(found))
        for shift, label in ((-0.2, "best after training"), (0.2, "in the loop")):
            methods = [best(runs) if shift < 0 else "qat" for runs in found.values()]
            values = [[r[m] - r["full"] for r in runs] for m, runs in zip(methods, found.values(), strict=True)]
            axis.bar(x + shift, np.mean(values, 1), 0.4, yerr=np.std(values, 1, ddof=1), capsize=3, label=label)
        axis.set_xticks(x, list(found))
        axis.set(ylabel="loss above full precision, nats a token")
        axis.axhline(0, color="black", linewidth=0.5)
        axis.legend()
        axis.grid(alpha=0.3, axis="y")


def read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())
