"""The verdicts, the tables and the picture. The rules below were fixed before the run.

A cell is one model x task x prompt type x paraphrase; its accuracy is over the same examples everywhere. Intervals
are 95 %, by bootstrap over examples.

M1  holds for a task if the best and the worst paraphrase of a prompt type differ by more than chance would have
    them: the best minus the worst accuracy lies above the 95 % quantile of that difference when each example's
    answers are shuffled over the paraphrases (permutation test). The claim holds if it does so for zero-shot prompts
    of every task of the instruct model, "holds when" names the tasks, and fails if for none.
M2  for each prompt type, mean accuracy minus that of zero-shot, of the instruct model, paired by example and
    paraphrase, over all tasks. The claim (the types help) holds if all intervals lie above 0; "holds when" names
    those that do; fails if none.
M3  "longer outputs": holds if chain-of-thought zero-shot writes more tokens than zero-shot, interval above 0, on
    tasks that are written; "and better": if the accuracy in arithmetic rises, interval above 0.
M4  "chain of thought pays for large models": here only that small ones gain nothing can be seen: "consistent, large
    models untested here" if no model's interval of the gain in arithmetic lies above 0, else "fails".
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.intervals import Interval, bootstrap
from llm_jax.research import findings, pictures, verdicts
from llm_jax.research.findings import Finding

COMMAND = "PYTHONPATH=. python experiments/prompt_sensitivity/run.py"
Cells = dict[tuple[str, str, str], np.ndarray]  # (model, task, style) -> bool (paraphrases, examples)


def write(here: pathlib.Path, found: Sequence[Mapping[str, Any]], size: str) -> str:
    """Writes results.json, spread.png and the tables of README.md; returns the verdicts as text."""
    cells, tokens = gather(found, "right"), gather(found, "tokens", "reasoning_tokens")
    results = judge(cells, tokens, f"{COMMAND} {size}")
    draw(cells, here / "spread.png")
    return findings.publish(here, results, tables(cells, tokens))


def gather(found: Sequence[Mapping[str, Any]], *keys: str) -> Cells:
    """The sum of some figures, by model, task and prompt type, with the paraphrases along the first axis."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for one in sorted(found, key=lambda o: o["template"]):
        value = sum(np.asarray(one[key], float) for key in keys)
        groups.setdefault((one["model"], one["task"], one["style"]), []).append(value)
    return {key: np.stack(rows) for key, rows in groups.items()}


def spread(right: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Best minus worst accuracy of the paraphrases, and the 95 % quantile of that by chance."""
    random, by_chance = np.random.default_rng(0), []
    for _ in range(draws):
        accuracy = random.permuted(right, axis=0).mean(1)
        by_chance.append(accuracy.max() - accuracy.min())
    accuracy = right.mean(1)
    return float(accuracy.max() - accuracy.min()), float(np.quantile(by_chance, 0.95))


def judge(cells: Cells, tokens: Cells, command: str) -> list[Finding]:
    """The verdicts by the rules above."""
    main = next(iter(cells))[0]
    models = sorted({model for model, _, _ in cells})
    tasks = sorted({task for _, task, _ in cells})
    styles = [s for s in dict.fromkeys(style for _, _, style in cells) if s != "zero_shot"]

    def finding(statement: str, measure: str, value: Mapping[str, Any], verdict: str) -> Finding:
        return findings.finding(statement, measure, value, verdict, command=command)

    def gain(model: str, style: str, among: Sequence[str]) -> Interval:  # over zero-shot, by example
        rows = [(cells[model, t, style] - cells[model, t, "zero_shot"]).mean(0) for t in among]
        return bootstrap(np.concatenate(rows))

    spreads = {task: spread(cells[main, task, "zero_shot"]) for task in tasks}
    moved = [task for task, (found, chance) in spreads.items() if found > chance]
    m1 = verdicts.holds_when(moved, tasks, "the task is")
    gains = {style: gain(main, style, tasks) for style in styles}
    better = [style for style, (_, low, _) in gains.items() if low > 0]
    m2 = verdicts.holds_when(better, styles)
    written = [t for t in tasks if t != "sentiment"]
    longer = bootstrap(
        np.concatenate([(tokens[main, t, "cot_zero_shot"] - tokens[main, t, "zero_shot"]).mean(0) for t in written])
    )
    sums = {model: gain(model, "cot_zero_shot", ["arithmetic"]) for model in models}
    m3 = "holds" if longer[1] > 0 and sums[main][1] > 0 else "holds for the length only" if longer[1] > 0 else "fails"
    pays = [model for model, (_, low, _) in sums.items() if low > 0]
    m4 = f"fails: it pays for {' and '.join(pays)}" if pays else "consistent; large models untested here"
    by_chance = {f"{task} by chance": chance for task, (_, chance) in spreads.items()}
    return [
        finding(
            "M1",
            "best minus worst accuracy over paraphrases, zero-shot",
            {task: found for task, (found, _) in spreads.items()} | by_chance,
            m1,
        ),
        finding("M2", "accuracy minus that of zero-shot", gains, m2),
        finding(
            "M3",
            "tokens and accuracy of chain of thought minus zero-shot",
            {"tokens": longer, "accuracy in arithmetic": sums[main]},
            m3,
        ),
        finding("M4", "accuracy of chain of thought minus zero-shot, arithmetic, by model", sums, m4),
    ]


def tables(cells: Cells, tokens: Cells) -> list[str]:
    """Accuracy over paraphrases for each model, task and prompt type, then the verdicts."""
    lines = [
        "",
        "| model | task | prompt | mean | standard deviation | worst | best | tokens written |",
        "|---" * 8 + "|",
    ]
    for (model, task, style), right in cells.items():
        a = right.mean(1)
        lines.append(
            f"| {model} | {task} | {style} | {a.mean():.2f} | {a.std(ddof=1):.2f} | {a.min():.2f} | {a.max():.2f} "
            f"| {tokens[model, task, style].mean():.1f} |"
        )
    return lines


def draw(cells: Cells, path: pathlib.Path) -> None:
    """The accuracy of every paraphrase."""
    with pictures.figure(path, figsize=(8, 3.4)) as axes:
        labels = [" ".join(key) for key in cells]
        for place, right in enumerate(cells.values()):
            axes.plot([place] * len(right), right.mean(1), "_", markersize=12)
        axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=6)
        axes.set_ylabel("accuracy of each paraphrase")
