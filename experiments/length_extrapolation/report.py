"""The verdicts, the tables and the picture of the length experiment.

Every comparison is paired by seed and judged by the 95 % t-interval of its mean over the seeds.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from llm_jax.intervals import Interval, mean, paired
from llm_jax.research import findings, plots, verdicts
from llm_jax.research.findings import Figures, Finding

MARGIN = 0.05  # nats per token
LEARNED = 0.9
ABSOLUTE, RELATIVE = ("sinusoidal", "learned"), ("shaw", "t5", "alibi", "rope")
FACTORS = ("1", "2", "4", "8")
GROUPS = ("seen", "new_place", "new_offset")


def judge(loss: Figures, copied: Figures, seeds: int) -> list[Finding]:
    """The verdicts by the rules of statements.toml."""

    def gains(kinds: Iterable[str]) -> dict[str, Interval]:  # over no positions, at the trained length
        at_1 = {kind: [run["windows"]["1"] for run in loss[kind]] for kind in (*kinds, "none")}
        return {kind: paired(at_1[kind], at_1["none"]) for kind in kinds}

    def rises(kinds: Iterable[str], base: str = "") -> dict[str, Interval]:
        at_1 = {kind: [run["sliding"]["1"] for run in loss[base or kind]] for kind in kinds}
        return {kind: paired([run["sliding"]["8"] for run in loss[kind]], at_1[kind]) for kind in kinds}

    absolute_gains = gains(["sinusoidal", "sinusoidal concatenated", "learned"])
    shaw_gains = gains(["shaw keys", "shaw values", "shaw"])
    p2 = verdicts.holds_when([kind for kind, gain in absolute_gains.items() if gain.high < 0], list(absolute_gains))
    parts = ["shaw keys", "shaw values"]
    p5 = verdicts.holds_when([part for part in parts if shaw_gains[part].high < 0], parts)

    of_kinds = rises(("none", *ABSOLUTE, *RELATIVE))
    fail = {kind for kind, rise in of_kinds.items() if rise.low > MARGIN}
    staying = [kind for kind in RELATIVE if of_kinds[kind].high < MARGIN]
    if any(of_kinds[kind].high < MARGIN for kind in ABSOLUTE) or set(RELATIVE) <= fail:
        p4 = "fails"
    elif set(ABSOLUTE) <= fail and staying:
        p4 = verdicts.holds_when(staying, RELATIVE, "the relative kind is")
    else:
        p4 = "undecided"

    ropes = rises([kind for kind in loss if kind == "rope" or kind.startswith("rope,")], "rope")
    p7 = verdicts.above(ropes["rope"], MARGIN)
    p7 = {"holds": "fails", "fails": "holds"}.get(p7, p7)  # it generalizes if it does not rise
    scaled = [kind.removeprefix("rope, ") for kind, rise in ropes.items() if kind != "rope" and rise.high < MARGIN]
    if scaled and p7 != "holds":
        unscaled = "fails without scaling" if p7 == "fails" else "undecided without"
        p7 = f"{unscaled}; holds when: {'; '.join(scaled)}"

    able = [kind for kind, runs in copied.items() if np.mean([run["seen"] for run in runs]) >= LEARNED]
    absolute, relative = ([kind for kind in able if kind in kinds] for kinds in (ABSOLUTE, RELATIVE))
    places = {kind: [run["new_place"] for run in copied[kind]] for kind in able}
    differences = {f"{a} - {b}": paired(places[a], places[b]) for a in relative for b in absolute}
    better = [a for a in relative if all(differences[f"{a} - {b}"].low > 0 for b in absolute)]
    if not absolute or not relative:
        p8 = f"undecided: the task was learned by {', '.join(able) or 'no kind'} only"
    elif better == relative:
        p8 = f"holds for the kinds that learn the task ({', '.join(able)})"
    else:
        p8 = verdicts.holds_when(better, relative, "the relative kind is")
    accuracies = {
        f"{kind}, {group}": mean([run[group] for run in runs]) for kind, runs in copied.items() for group in GROUPS
    }
    gain = "loss at 1x minus that of no positions, nats per token"
    rows = [
        ("P2", gain, absolute_gains, p2),
        ("P4", "rise of the loss from 1x to 8x, nats per token", of_kinds, p4),
        ("P5", gain, shaw_gains, p5),
        ("P7", "loss at 8x minus the loss of unscaled rope at 1x, nats per token", ropes, p7),
        ("P8", "accuracy of copying; differences on new_place", accuracies | differences, p8),
    ]
    return [findings.finding(*row, n=seeds) for row in rows]


def tables(loss: Figures, copied: Figures) -> list[str]:
    """Markdown."""

    def perplexity(protocol: str, factor: str) -> Callable[[findings.Runs], str]:
        return lambda runs: findings.deviation_text([np.exp(run[protocol][factor]) for run in runs], 1)

    points = itertools.product(("windows", "sliding"), FACTORS)
    perplexities = {f"{protocol} {factor}×": perplexity(protocol, factor) for protocol, factor in points}
    accuracies = {group: findings.deviation(group, 2) for group in GROUPS}
    return [
        *("", "Perplexity, mean ± standard deviation over the seeds:", ""),
        *findings.condition_table("kind", loss, perplexities),
        *("", "Accuracy of copying the token k back, last half of the sequence:", ""),
        *findings.condition_table("kind", copied, accuracies),
    ]


def draw(loss: Figures, path: pathlib.Path) -> None:
    """Loss against length by the sliding window: the kinds, and rope's scalings at once and fine-tuned."""
    panels = {
        "every kind": [kind for kind in loss if "concatenated" not in kind and "," not in kind],
        "rope scaled at test time": [kind for kind in loss if kind == "rope" or "test time" in kind],
        "rope fine-tuned at 8×": [kind for kind in loss if kind == "rope" or "fine-tuned" in kind],
    }
    lengths = [int(factor) for factor in FACTORS]
    with plots.figure(path, 1, len(panels), figsize=(14, 4.2), sharey=True) as axes:
        for axis, (title, kinds) in zip(axes, panels.items(), strict=True):
            for kind in kinds:
                y = np.array([[run["sliding"][factor] for factor in FACTORS] for run in loss[kind]])
                label = kind.removeprefix("rope, ").removesuffix(" at test time").removesuffix(", fine-tuned")
                axis.errorbar(lengths, y.mean(0), y.std(0, ddof=1), marker="o", markersize=3, capsize=2, label=label)
            axis.set(title=title, xscale="log", xlabel="length / trained length")
            axis.set_xticks(lengths, [f"{factor}×" for factor in FACTORS])
            axis.set_xticks([], minor=True)
        axes[0].set_ylabel("held-out loss, nats per token (sliding window)")
