"""The verdict and the tables of the width experiment. The rules below were fixed before the run.

The *loss given up* at a width is the held-out loss of the rate that is best at the base width (by the
mean over the seeds) minus that of the width's own best rate, in nats a token; a run that diverges counts
as the loss of knowing nothing, log 256. Seeds pair by initialization and batches. Of each seed it is
measured against the rate that is best by the mean of the *other* seeds: the least of several noisy means
would count its own luck as a loss. It is judged by the 95 % t-interval of its mean over the seeds.

The rate *transfers* under a parametrization if the interval lies below MARGIN at every width, and
*does not* if the interval at the widest lies above MARGIN. The claim (width transfer by table 8 of
arXiv:2203.03466 makes the best rate hold across widths, which it does not by itself) holds if the rate
transfers with it and does not without; fails if it does not transfer with it, or transfers without;
else it is undecided.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from llm_jax import files

MARGIN = 0.05  # nats a token
KINDS = ("μP", "as it is")
COMMAND = "PYTHONPATH=. python experiments/width_transfer/sweep.py"
BEGIN, END = "<!-- results: written by sweep.py -->\n", "<!-- end of results -->"


def given_up(losses: np.ndarray, chosen: int) -> np.ndarray:
    """(rates, seeds) -> (seeds,): the loss of a rate minus that of the one that the other seeds find best."""
    seeds = range(losses.shape[1])
    best = [int(np.argmin(np.delete(losses, seed, 1).mean(1))) for seed in seeds]
    return np.array([losses[chosen, seed] - losses[best[seed], seed] for seed in seeds])


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean and half its 95 % t-interval."""
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def write(
    here: pathlib.Path, found: Mapping[str, float | None], widths: Sequence[int], powers: Sequence[int], seeds: int
) -> str:
    """Writes results.json and the tables in README.md; returns the verdict as text."""

    def loss(kind: str, width: int) -> np.ndarray:  # (powers, seeds)
        rows = [[found[f"{kind} {width} {p} {s}"] for s in range(seeds)] for p in powers]
        return np.array([[math.log(256) if x is None else x for x in row] for row in rows])

    table = {kind: {width: loss(kind, width) for width in widths} for kind in KINDS}
    value, spread = {}, {}
    for kind, of in table.items():
        chosen = int(np.argmin(of[widths[0]].mean(1)))
        for width, losses in of.items():
            mean, half = interval(given_up(losses, chosen))
            value[f"{kind}, width {width}"] = mean
            spread[f"{kind}, width {width}"] = [mean - half, mean + half]

    def transfers(kind: str) -> str:
        if all(spread[f"{kind}, width {w}"][1] < MARGIN for w in widths):
            return "yes"
        return "no" if spread[f"{kind}, width {widths[-1]}"][0] > MARGIN else "undecided"

    said = transfers(KINDS[0]), transfers(KINDS[1])
    verdict = "holds" if said == ("yes", "no") else "fails" if said[0] == "no" or said[1] == "yes" else "undecided"
    result: dict[str, Any] = {
        "claim": "with width transfer the best rate holds across widths, without it does not (loss given up)",
        "value": value,
        "spread": spread,
        "seeds": seeds,
        "verdict": verdict,
        "command": COMMAND,
    }
    files.write_json(here / "results.json", [result])
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
            low, high = spread[f"{kind}, width {width}"]
            given = f"{value[f'{kind}, width {width}']:.3f} [{low:.3f}, {high:.3f}]"
            lines += [f"| {width} | " + " | ".join(cells) + f" | {given} |"]
    lines += ["", f"Transfers with μP: {said[0]}; without: {said[1]}. Verdict: **{verdict}**.", "", ""]
    readme = here / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + "\n".join(lines) + END + rest.split(END)[1])
    return f"{result['claim']}: {verdict}"
