"""The verdict and the tables of the width experiment. The rules below were fixed before the run.

The *loss given up* at a width is the held-out loss of the rate that is best at the base width (by the
mean over the seeds) minus that of the width's own best rate, in nats a token; a run that diverges counts
as the loss of knowing nothing, log 256. Seeds pair by initialization and batches. Of each seed it is
measured against the rate that is best by the mean of the *other* seeds: the least of several noisy means
would count its own luck as a loss. It is judged by the 95 % t-interval of its mean over the seeds.

The rate *transfers* under a parametrization if the interval lies below MARGIN at every width, and
*does not* if the interval at the widest lies above MARGIN. W1 (width transfer by table 8 of
arXiv:2203.03466 makes the best rate hold across widths, which it does not by itself) holds if the rate
transfers with it and does not without; fails if it does not transfer with it, or transfers without;
else it is undecided.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from llm_jax.intervals import Interval, mean
from llm_jax.research import findings
from llm_jax.research.findings import Finding

MARGIN = 0.05  # nats a token
KINDS = ("μP", "as it is")
COMMAND = "PYTHONPATH=. python experiments/width_transfer/sweep.py"


def given_up(losses: np.ndarray, chosen: int) -> np.ndarray:
    """(rates, seeds) -> (seeds,): the loss of a rate minus that of the one that the other seeds find best."""
    seeds = range(losses.shape[1])
    best = [int(np.argmin(np.delete(losses, seed, 1).mean(1))) for seed in seeds]
    return np.array([losses[chosen, seed] - losses[best[seed], seed] for seed in seeds])


def write(
    here: pathlib.Path, found: Mapping[str, float | None], widths: Sequence[int], powers: Sequence[int], seeds: int
) -> str:
    """Writes results.json and the tables in README.md; returns the verdict as text."""

    def loss(kind: str, width: int) -> np.ndarray:  # (powers, seeds)
        rows = [[found[f"{kind} {width} {p} {s}"] for s in range(seeds)] for p in powers]
        return np.array([[math.log(256) if x is None else x for x in row] for row in rows])

    table = {kind: {width: loss(kind, width) for width in widths} for kind in KINDS}
    lost = {kind: losses_given_up(of, widths[0]) for kind, of in table.items()}
    with_transfer, without = (transfers(lost[kind]) for kind in KINDS)
    result = judge(lost, seeds)
    findings.save(here, [result])
    lines = [
        "",
        "Held-out loss in nats a byte, mean ± standard deviation over the seeds; the best rate of a row is bold:",
    ]
    for kind, of in table.items():
        lines += ["", f"| {kind}: width | " + " | ".join(f"2^{p}" for p in powers) + " | given up |"]
        lines += ["|---" * (len(powers) + 2) + "|"]
        for width, losses in of.items():
            best = int(np.argmin(losses.mean(1)))
            cells = [f"{row.mean():.3f} ± {row.std(ddof=1):.3f}" for row in losses]
            cells[best] = f"**{cells[best]}**"
            given = "{:.3f} [{:.3f}, {:.3f}]".format(*lost[kind][width])
            lines += [f"| {width} | " + " | ".join(cells) + f" | {given} |"]
    lines += ["", f"Transfers with μP: {with_transfer}; without: {without}. Verdict: **{result.verdict}**.", ""]
    findings.replace_section(here / "README.md", "results", lines)
    return findings.summary([result])


def losses_given_up(losses: Mapping[int, np.ndarray], base_width: int) -> dict[int, Interval]:
    """By width, the loss given up by the rate that is best at the base width; losses are (rates, seeds) by width."""
    chosen = int(np.argmin(losses[base_width].mean(1)))
    return {width: mean(given_up(of_width, chosen)) for width, of_width in losses.items()}


def transfers(lost: Mapping[int, Interval]) -> str:
    """Whether the rate transfers under a parametrization: "yes", "no" or "undecided"."""
    if all(interval.high < MARGIN for interval in lost.values()):
        return "yes"
    return "no" if lost[max(lost)].low > MARGIN else "undecided"


def judge(lost: Mapping[str, Mapping[int, Interval]], seeds: int) -> Finding:
    """The verdict by the rule above; `lost` has the losses given up by parametrization and width."""
    with_transfer, without = (transfers(lost[kind]) for kind in KINDS)
    fails = with_transfer == "no" or without == "yes"
    verdict = "holds" if (with_transfer, without) == ("yes", "no") else "fails" if fails else "undecided"
    value = {f"{kind}, width {width}": interval for kind, of in lost.items() for width, interval in of.items()}
    return findings.finding("W1", "loss given up, nats a byte", value, verdict, command=COMMAND, n=seeds)
