"""Accuracy by task, paraphrase of the question, type of prompt, and model: M1 to M4.

All combinations have the same examples. Intervals are 95 %, by bootstrap over examples.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from llm_jax import checkpoints, cli
from llm_jax.evaluation import answers
from llm_jax.evaluation.builtin import TASKS
from llm_jax.evaluation.prompts import PromptConfig
from llm_jax.intervals import Interval, bootstrap
from llm_jax.research import experiments, findings, plots, verdicts
from llm_jax.research.findings import Finding
from llm_jax.research.provenance import Provenance

STYLES = ("zero_shot", "few_shot", "expert", "cot_zero_shot", "cot_few_shot")
Cells = dict[tuple[str, str, str], np.ndarray]  # (model, task, style) -> (paraphrases, examples)

flags.DEFINE_string("model", "asset:smollm2-135m-instruct", "the instruct model")
flags.DEFINE_string("reference", "", "a run of configs/reference_lm.py, which is measured too; empty: none")
flags.DEFINE_integer("examples", 8, "examples of each task", lower_bound=2)
flags.DEFINE_integer("shots", 2, "solved examples in few-shot prompts")
flags.DEFINE_integer("reasoning_tokens", 24, "maximum number of tokens of a chain of thought")
flags.DEFINE_integer("paraphrases", 10, "paraphrases of each question", lower_bound=2, upper_bound=10)


def main() -> None:
    f = flags.FLAGS
    root = experiments.directory(f.runs, f.examples, f.shots, f.reasoning_tokens)
    models = {"smollm2": f.model} | ({"reference": f.reference} if f.reference else {})
    tasks = {
        name: dataclasses.replace(make(f.examples), reasoning_tokens=f.reasoning_tokens) for name, make in TASKS.items()
    }
    load = functools.lru_cache(1)(checkpoints.load)

    def records(model: str, name: str, style: str, template: int) -> list[dict]:
        shots = f.shots if "few" in style else 0
        config = PromptConfig(style, template, shots, "balanced" if name == "sentiment" else "random")
        return list(answers.records(load(models[model]), tasks[name], config, range(len(tasks[name].examples))))

    grid = list(itertools.product(models, TASKS, STYLES, range(f.paraphrases)))
    computations = {}
    for cell in grid:
        settings = experiments.digest(models[cell[0]], tasks[cell[1]].digest())
        computations["-".join(map(str, (*cell, settings)))] = functools.partial(records, *cell)
    origins: list[Provenance] = []
    by_cell = zip(grid, experiments.measure_all(root, computations, origins).values(), strict=True)
    right: Cells = {}
    tokens: Cells = {}
    for key, paraphrases in itertools.groupby(by_cell, lambda item: item[0][:3]):
        rows = [answered for _, answered in paraphrases]
        right[key] = np.array([[float(r["right"]) for r in row] for row in rows])
        tokens[key] = np.array([[r["tokens"] + r["reasoning_tokens"] for r in row] for row in rows], float)
    draw(right, experiments.output(__file__) / "spread.png")
    command = experiments.command(__file__, {"model": "RUN", "reference": "RUN"})
    lines = table(right, tokens)
    print(experiments.publish(__file__, judge(right, tokens), lines, origins=origins, measured_by=command))


def best_minus_worst(right: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Best minus worst accuracy of the paraphrases, and the 95 % quantile of that by chance."""
    random = np.random.default_rng(0)
    by_chance = [np.ptp(random.permuted(right, axis=0).mean(1)) for _ in range(draws)]
    return float(np.ptp(right.mean(1))), float(np.quantile(by_chance, 0.95))


def judge(cells: Cells, tokens: Cells) -> list[Finding]:
    """The verdicts by the rules of statements.toml; `cells`: 1 for each right answer."""
    main = next(iter(cells))[0]
    models, tasks = (sorted({key[i] for key in cells}) for i in (0, 1))
    styles = [s for s in dict.fromkeys(style for _, _, style in cells) if s != "zero_shot"]

    def gain(figures: Cells, model: str, style: str, among: Sequence[str]) -> Interval:  # over zero-shot, by example
        rows = [(figures[model, t, style] - figures[model, t, "zero_shot"]).mean(0) for t in among]
        return bootstrap(np.concatenate(rows))

    spreads = {task: best_minus_worst(cells[main, task, "zero_shot"]) for task in tasks}
    moved = [task for task, (difference, chance) in spreads.items() if difference > chance]
    spread = {task: difference for task, (difference, _) in spreads.items()}
    spread |= {f"{task} by chance": chance for task, (_, chance) in spreads.items()}
    gains = {style: gain(cells, main, style, tasks) for style in styles}
    better = [style for style, interval in gains.items() if interval.low > 0]
    longer = gain(tokens, main, "cot_zero_shot", [t for t in tasks if t != "sentiment"])
    sums = {model: gain(cells, model, "cot_zero_shot", ["arithmetic"]) for model in models}
    m3 = "fails"
    if longer.low > 0:
        m3 = "holds" if sums[main].low > 0 else "holds for the length only"
    pays = [model for model, interval in sums.items() if interval.low > 0]
    m4 = f"fails: it pays for {' and '.join(pays)}" if pays else "consistent; large models untested here"
    m3_values = {"tokens": longer, "accuracy in arithmetic": sums[main]}
    m1, m2 = verdicts.holds_when(moved, tasks, "the task is"), verdicts.holds_when(better, styles)
    return [
        findings.finding("M1", "best minus worst accuracy over paraphrases, zero-shot", spread, m1),
        findings.finding("M2", "accuracy minus that of zero-shot", gains, m2),
        findings.finding("M3", "tokens and accuracy of chain of thought minus zero-shot", m3_values, m3),
        findings.finding("M4", "accuracy of chain of thought minus zero-shot, arithmetic, by model", sums, m4),
    ]


def table(cells: Cells, tokens: Cells) -> list[str]:
    """Markdown: accuracy over paraphrases for each model, task and prompt type."""
    rows = []
    for key, right in cells.items():
        a = right.mean(1)
        figures = (a.mean(), a.std(ddof=1), a.min(), a.max())
        rows.append([*key, *(f"{x:.2f}" for x in figures), f"{tokens[key].mean():.1f}"])
    head = ["model", "task", "prompt", "mean", "standard deviation", "worst", "best", "tokens written"]
    return ["", *findings.markdown_table(head, rows)]


def draw(cells: Cells, path: pathlib.Path) -> None:
    """The accuracy of every paraphrase."""
    with plots.figure(path, figsize=(8, 3.4)) as axes:
        for place, right in enumerate(cells.values()):
            axes.plot([place] * len(right), right.mean(1), "_", markersize=12)
        axes.set_xticks(range(len(cells)), [" ".join(key) for key in cells], rotation=60, ha="right", fontsize=6)
        axes.set_ylabel("accuracy of each paraphrase")


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"examples": 2, "paraphrases": 2, "shots": 1, "reasoning_tokens": 4}))
