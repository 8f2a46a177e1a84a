"""The verdicts, the tables and the picture of the length experiment. The rules below were fixed before the run.

A *rise* is the loss at 8 times the trained length minus the loss at 1 time, of the same targets, by the
sliding window, in nats a token. Every comparison is paired by seed and judged by the 95 % t-interval of
its mean over the seeds.

P2  holds if sinusoidal vectors, added and concatenated, and learned ones, added, each have a lower loss at
    the trained length than no positions (the interval of the difference lies below 0).
P4  a kind *fails* past its length if the interval of its rise lies above MARGIN and *stays* if it lies
    below. Holds if sinusoidal and learned fail and Shaw, T5, ALiBi and rope stay; holds when the kind is
    one of those relative kinds that stay, if the absolute ones fail and some relative kinds stay; fails if
    all relative kinds fail or an absolute kind stays; else undecided.
P5  holds if keys alone and values alone each have a lower loss at the trained length than no positions.
P7  fails if rope's rise lies above MARGIN, holds if it lies below; "holds when" names the scalings, at
    test time or after the fine-tuning, whose rise from the *unscaled* loss at 1 time lies below MARGIN.
P8  of the kinds that learn the task (mean accuracy on seen offsets of at least 0.9): holds if every
    relative kind is more accurate than every absolute one on new_place (the interval of the difference
    above 0); holds when the kind is one of those that are, if some are; else fails. Undecided if no
    absolute or no relative kind learns it.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.intervals import Interval, mean, paired
from llm_jax.research import findings, pictures, verdicts
from llm_jax.research.findings import Finding

MARGIN = 0.05  # nats a token
LEARNED = 0.9
ABSOLUTE, RELATIVE = ("sinusoidal", "learned"), ("shaw", "t5", "alibi", "rope")
FACTORS = ("1", "2", "4", "8")


def rise(runs: list[Any], base: list[Any] | None = None) -> Interval:
    """The interval of loss at 8 times - loss at 1 time (of `base`, by default the same run)."""
    base = base or runs
    return paired([r["sliding"]["8"] for r in runs], [b["sliding"]["1"] for b in base])


def judge(loss: dict[str, list[Any]], copied: dict[str, list[Any]], seeds: int) -> list[Finding]:
    """The verdicts by the rules above."""

    def gain(kind: str) -> Interval:  # over no positions, at the trained length
        return paired([run["windows"]["1"] for run in loss[kind]], [run["windows"]["1"] for run in loss["none"]])

    def beats(names: Sequence[str]) -> tuple[dict[str, Interval], str]:
        value = {name: gain(name) for name in names}
        return value, verdicts.holds_when([name for name in names if value[name].high < 0], names)

    p2 = beats(["sinusoidal", "sinusoidal concatenated", "learned"])
    value, verdict = beats(["shaw keys", "shaw values"])
    p5 = value | {"shaw": gain("shaw")}, verdict

    rises = {kind: rise(loss[kind]) for kind in ("none", *ABSOLUTE, *RELATIVE)}
    fail = {kind for kind, (_, low, _) in rises.items() if low > MARGIN}
    stay = {kind for kind, (_, _, high) in rises.items() if high < MARGIN}
    staying = [k for k in RELATIVE if k in stay]
    if set(ABSOLUTE) & stay or not (staying or set(RELATIVE) - fail):
        p4 = "fails"
    elif set(ABSOLUTE) <= fail and staying:
        p4 = verdicts.holds_when(staying, RELATIVE, "the relative kind is")
    else:
        p4 = "undecided"

    ropes = {k: rise(v, loss["rope"]) for k, v in loss.items() if k == "rope" or k.startswith("rope,")}
    low, high = ropes["rope"][1:]
    scaled = [k.removeprefix("rope, ") for k, v in ropes.items() if k != "rope" and v[2] < MARGIN]
    if high < MARGIN:
        p7 = "holds"
    elif scaled:
        p7 = ("fails without scaling; " if low > MARGIN else "undecided without; ") + f"holds when: {'; '.join(scaled)}"
    else:
        p7 = "fails" if low > MARGIN else "undecided"

    able = [k for k, runs in copied.items() if np.mean([r["seen"] for r in runs]) >= LEARNED]
    absolute, relative = [k for k in able if k in ABSOLUTE], [k for k in able if k in RELATIVE]

    def above(a: str, b: str) -> Interval:
        return paired([run["new_place"] for run in copied[a]], [run["new_place"] for run in copied[b]])

    differences = {f"{a} - {b}": above(a, b) for a in relative for b in absolute}
    knows = [a for a in relative if all(differences[f"{a} - {b}"][1] > 0 for b in absolute)]
    if not absolute or not relative:
        p8 = f"undecided: the task was learned by {', '.join(able) or 'no kind'} only"
    elif len(knows) == len(relative):
        p8 = f"holds for the kinds that learn the task ({', '.join(able)})"
    else:
        p8 = verdicts.holds_when(knows, relative, "the relative kind is")
    accuracies = {
        f"{kind}, {group}": mean([r[group] for r in runs])
        for kind, runs in copied.items()
        for group in ("seen", "new_place", "new_offset")
    }
    rows = [
        ("P2", "loss at 1x minus that of no positions, nats a token", *p2),
        ("P4", "rise of the loss from 1x to 8x, nats a token", rises, p4),
        ("P5", "loss at 1x minus that of no positions, nats a token", *p5),
        ("P7", "loss at 8x minus the loss of unscaled rope at 1x, nats a token", ropes, p7),
        ("P8", "accuracy of copying; differences on new_place", accuracies | differences, p8),
    ]
    return [findings.finding(*row, n=seeds) for row in rows]


def tables(loss: dict[str, list[Any]], copied: dict[str, list[Any]]) -> list[str]:
    """Markdown."""

    columns = [(protocol, factor) for protocol in ("windows", "sliding") for factor in FACTORS]
    groups = ("seen", "new_place", "new_offset")
    perplexities = (
        [kind, *(findings.deviation_text([np.exp(run[p][f]) for run in runs], 1) for p, f in columns)]
        for kind, runs in loss.items()
    )
    accuracies = (
        [kind, *(findings.deviation_text([run[group] for run in runs], 2) for group in groups)]
        for kind, runs in copied.items()
    )
    lines = ["", "Perplexity, mean ± standard deviation over the seeds:", ""]
    lines += findings.markdown_table(["kind", *(f"{protocol} {factor}×" for protocol, factor in columns)], perplexities)
    lines += ["", "Accuracy of copying the token k back, last half of the sequence:", ""]
    return [*lines, *findings.markdown_table(["kind", *groups], accuracies)]


def draw(loss: dict[str, list[Any]], path: pathlib.Path) -> None:
    """Loss against length by the sliding window: the kinds, and rope's scalings at once and fine-tuned."""
    plain = {k: v for k, v in loss.items() if "concatenated" not in k and "," not in k}
    panels = {
        "every kind": plain,
        "rope scaled at test time": {k: v for k, v in loss.items() if k == "rope" or "test time" in k},
        "rope fine-tuned at 8×": {k: v for k, v in loss.items() if k == "rope" or "fine-tuned" in k},
    }
    with pictures.figure(path, 1, len(panels), figsize=(14, 4.2), sharey=True) as axes:
        x = [int(f) for f in FACTORS]
        for axis, (title, runs_by_name) in zip(axes, panels.items(), strict=True):
            for name, runs in runs_by_name.items():
                y = np.array([[r["sliding"][f] for f in FACTORS] for r in runs])
                label = name.removeprefix("rope, ").removesuffix(" at test time").removesuffix(", fine-tuned")
                axis.errorbar(x, y.mean(0), y.std(0, ddof=1), marker="o", markersize=3, capsize=2, label=label)
            axis.set(title=title, xscale="log", xlabel="length / trained length")
            axis.set_xticks(x, [f"{f}×" for f in FACTORS])
            axis.set_xticks([], minor=True)
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("held-out loss, nats a token (sliding window)")
