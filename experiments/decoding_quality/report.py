"""The verdicts, the table and the picture. The rules below were fixed before the run.

Intervals are 95 %, by bootstrap over the texts (over the texts' means where a figure has a value a token).

D2  "greedy is repetitive": holds if greedy's share of texts that end in a loop lies above both that of the human
    text and that of sampling, intervals apart. "Locally optimal": holds if the beam of 4 finds texts of the same
    length that are likelier, by the interval of the paired difference of their log-probabilities, and in more than
    half of the prompts. The claim holds if both do.
D4  holds if at least a tenth of the tokens' distributions have more than 5 % of their mass outside the 40 likeliest
    (what the nucleus of .95 would still draw from), and top-k 40 with temperature 0.7 keeps less than half of the
    model's entropy, its interval below; "holds when" names which of the two.
D5  holds if the nucleus has mass .95 or more at every token, its size's 10 % and 90 % quantiles differ by a factor
    of 10 or more, and its texts' perplexity is nearer to the human text's (in logarithms) than those of greedy and
    of the beam.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.decoding_quality import metrics
from llm_jax.intervals import Interval, bootstrap
from llm_jax.research import findings, pictures, verdicts
from llm_jax.research.findings import Finding

COMMAND = "PYTHONPATH=. python experiments/decoding_quality/run.py"


def write(here: pathlib.Path, made: Mapping[str, Any], steps: Mapping[str, Any], size: str) -> str:
    """Writes results.json, sizes.png and the tables of README.md; returns the verdicts as text."""
    figures = {name: of_method(texts) for name, texts in made.items()}
    of_steps = {name: np.asarray(values) for name, values in steps.items()}
    results = judge(made, figures, of_steps, f"{COMMAND} {size}")
    draw(of_steps, here / "sizes.png")
    return findings.publish(here, results, tables(figures))


def of_method(texts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...] | float]:
    """The figures of one method's texts."""
    ids = [t["ids"] for t in texts]
    nats = bootstrap([-np.mean(t["logs"]) for t in texts])
    return {
        "perplexity": Interval(*(math.exp(x) for x in nats)),
        "self-BLEU": bootstrap(metrics.self_bleu(ids)),
        "loops %": Interval(*(100 * x for x in bootstrap([metrics.loops(i) for i in ids]))),
        "4-grams repeated %": Interval(*(100 * x for x in bootstrap([metrics.repeated(i) for i in ids]))),
        "distinct-2": metrics.distinct(ids, 2),
        "distinct-4": metrics.distinct(ids, 4),
    }


def judge(made, figures, steps: Mapping[str, np.ndarray], command: str) -> list[Finding]:
    """The verdicts by the rules above."""

    def finding(statement: str, measure: str, value: Mapping[str, Any], verdict: str) -> Finding:
        return findings.finding(statement, measure, value, verdict, command=command)

    loops = {name: figures[name]["loops %"] for name in ("greedy", "human", "sampling", "beam 4", "nucleus 0.95")}
    repetitive = all(loops["greedy"][1] > loops[other][2] for other in ("human", "sampling"))
    sums = {name: [sum(t["logs"]) for t in made[name]] for name in ("greedy", "beam 4")}
    gains = [b - g for b, g in zip(sums["beam 4"], sums["greedy"], strict=True)]
    gain, wins = bootstrap(gains), float(np.mean([g > 0 for g in gains]))
    local = gain[1] > 0 and wins > 0.5
    d2 = verdicts.holds_for(["repetition", "local optimality"], [repetitive, local])

    def by_text(name: str) -> Interval:
        return bootstrap(steps[name].mean(1))

    outside = bootstrap((steps["mass of 40"] < 0.95).mean(1))
    kept = {
        name: bootstrap((steps[f"entropy of {name}"].mean(1) / steps["entropy"].mean(1)).tolist())
        for name in ("nucleus", "40", "40, temperature 0.7")
    }
    leaves = outside[1] >= 0.1
    low = kept["40, temperature 0.7"][2] < 0.5
    d4 = "holds" if leaves and low else "fails"
    if leaves != low:
        d4 = "holds when the mass left out counts, not the entropy" if leaves else "holds when entropy counts"

    sizes = np.quantile(steps["nucleus"], [0.1, 0.5, 0.9])
    covers, changes = bool((steps["nucleus mass"] >= 0.95 - 1e-4).all()), bool(sizes[2] >= 10 * sizes[0])
    human = math.log(figures["human"]["perplexity"][0])
    away = {n: abs(math.log(figures[n]["perplexity"][0]) - human) for n in figures if n != "human"}
    nearer = away["nucleus 0.95"] < min(away["greedy"], away["beam 4"])
    return [
        finding(
            "D2",
            "texts that end in a loop, %; log-probability of beam minus greedy, nats",
            {**loops, "beam - greedy": gain, "prompts where the beam is likelier": wins},
            d2,
        ),
        finding(
            "D4",
            "tokens with more than 5 % of the mass outside the 40 likeliest; share of the entropy kept",
            {
                "outside": outside,
                **{f"entropy kept by {k}": v for k, v in kept.items()},
                "mass of 40": by_text("mass of 40"),
            },
            d4,
        ),
        finding(
            "D5",
            "size of the nucleus of .95, quantiles; distance to the human log-perplexity",
            {"10 %": sizes[0], "median": sizes[1], "90 %": sizes[2], **{f"distance {k}": v for k, v in away.items()}},
            "holds" if covers and changes and nearer else "fails",
        ),
    ]


def tables(figures: Mapping[str, Any]) -> list[str]:
    """The table of methods, then the verdicts."""
    names = list(next(iter(figures.values())))
    lines = ["", "| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method, row in figures.items():
        cells = [f"{v[0]:.3g} ({v[1]:.3g}–{v[2]:.3g})" if isinstance(v, tuple) else f"{v:.2f}" for v in row.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def draw(steps: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    """How large the nucleus is, token by token, beside fixed k."""
    with pictures.figure(path, figsize=(6, 3.2)) as axes:
        sizes = np.sort(steps["nucleus"].ravel())
        axes.plot(sizes, np.linspace(0, 1, len(sizes)))
        for k in (40, 640):
            axes.axvline(k, color="grey", linestyle=":")
            axes.text(k, 0.02, f" k = {k}", color="grey")
        axes.set(xscale="log", xlabel="tokens in the nucleus of .95", ylabel="share of the tokens of a human text")
