"""How much do answers depend on how one asks? Tasks x paraphrases x prompt types x models: M1 to M4.

    PYTHONPATH=. python experiments/prompt_sensitivity/run.py [--reference=RUN] [--examples=8]

Every record is kept under --runs; the same command goes on where it was stopped. Writes results.json, the tables of
README.md and spread.png. The rules below were fixed before the run.

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

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from llm_jax import bars, checkpoints, cli
from llm_jax.evaluation import answers
from llm_jax.evaluation.builtin import TASKS
from llm_jax.evaluation.prompts import PromptConfig
from llm_jax.intervals import Interval, bootstrap
from llm_jax.research import experiments, findings, pictures, provenance, verdicts
from llm_jax.research.findings import Finding
from llm_jax.research.provenance import Provenance

HERE = pathlib.Path(__file__).parent
STYLES = ("zero_shot", "few_shot", "expert", "cot_zero_shot", "cot_few_shot")
Cells = dict[tuple[str, str, str], np.ndarray]  # (model, task, style) -> (paraphrases, examples)

flags.DEFINE_string("model", "asset:smollm2-135m-instruct", "the instruct model")
flags.DEFINE_string("reference", "", "a run of configs/reference_lm.py, asked too if given")
flags.DEFINE_integer("examples", 8, "of each task", lower_bound=2)
flags.DEFINE_integer("shots", 2, "solved examples in few-shot prompts")
flags.DEFINE_integer("reasoning_tokens", 24, "of a chain of thought at most")
flags.DEFINE_integer("paraphrases", 10, "ways to put each question", lower_bound=2, upper_bound=10)
flags.DEFINE_string("runs", "runs/prompt_sensitivity", "where records are kept")


def main() -> None:
    f = flags.FLAGS
    root = experiments.directory(f.runs, f.examples, f.shots, f.reasoning_tokens)
    models = {"smollm2": f.model} | ({"reference": f.reference} if f.reference else {})
    records: list[dict[str, Any]] = []
    for model, path in models.items():
        loaded = checkpoints.load(path)
        grid = list(itertools.product(TASKS, STYLES, range(f.paraphrases)))
        for name, style, template in bars.bar(grid, model):
            task = dataclasses.replace(TASKS[name](f.examples), reasoning_tokens=f.reasoning_tokens)
            shots = f.shots if "few" in style else 0
            config = PromptConfig(style, template, shots, "balanced" if name == "sentiment" else "random")
            file = root / f"{model}-{name}-{style}-{template}.jsonl"
            cell = {"model": model, "task": name, "style": style, "template": template}
            records.append(cell | answered(loaded, path, task, config, file))
    cells, tokens = gather(records, "right"), gather(records, "tokens", "reasoning_tokens")
    draw(cells, experiments.output(__file__) / "spread.png")
    origins = list(dict.fromkeys(origin for record in records for origin in record["origins"]))
    command = experiments.command(__file__, {"model": "RUN", "reference": "RUN"})
    results = judge(cells, tokens)
    print(experiments.publish(__file__, results, table(cells, tokens), origins=origins, measured_by=command))


def answered(loaded, path: str, task, config: PromptConfig, file: pathlib.Path) -> dict[str, Any]:
    """Example by example, the results of one cell of the grid, from the records there and those still to be made."""
    log = answers.AnswerLog(file, {"checkpoint": path, "task": task.digest(), **dataclasses.asdict(config)})
    done = {record["index"] for record in log.records}
    rest = [i for i in range(len(task.examples)) if i not in done]
    origin = dataclasses.asdict(provenance.here(""))
    for record in answers.records(loaded, task, config, rest, batch_size=8):
        log.add(record | {"origin": origin})
    figures = {key: [record[key] for record in log.records] for key in ("right", "tokens", "reasoning_tokens")}
    # Records of earlier versions have no origin.
    return figures | {"origins": [Provenance(**record.get("origin", {})) for record in log.records]}


def gather(records: Sequence[Mapping[str, Any]], *keys: str) -> Cells:
    """The sum of some figures, by model, task and prompt type, with the paraphrases along the first axis."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for record in sorted(records, key=lambda record: record["template"]):
        value = sum(np.asarray(record[key], float) for key in keys)
        groups.setdefault((record["model"], record["task"], record["style"]), []).append(value)
    return {key: np.stack(rows) for key, rows in groups.items()}


def best_minus_worst(right: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Best minus worst accuracy of the paraphrases, and the 95 % quantile of that by chance."""
    random, by_chance = np.random.default_rng(0), []
    for _ in range(draws):
        accuracy = random.permuted(right, axis=0).mean(1)
        by_chance.append(accuracy.max() - accuracy.min())
    accuracy = right.mean(1)
    return float(accuracy.max() - accuracy.min()), float(np.quantile(by_chance, 0.95))


def judge(cells: Cells, tokens: Cells) -> list[Finding]:
    """The verdicts by the rules above."""
    main = next(iter(cells))[0]
    models = sorted({model for model, _, _ in cells})
    tasks = sorted({task for _, task, _ in cells})
    styles = [s for s in dict.fromkeys(style for _, _, style in cells) if s != "zero_shot"]

    def gain(model: str, style: str, among: Sequence[str]) -> Interval:  # over zero-shot, by example
        rows = [(cells[model, t, style] - cells[model, t, "zero_shot"]).mean(0) for t in among]
        return bootstrap(np.concatenate(rows))

    spreads = {task: best_minus_worst(cells[main, task, "zero_shot"]) for task in tasks}
    moved = [task for task, (difference, chance) in spreads.items() if difference > chance]
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
    m1_values = {task: difference for task, (difference, _) in spreads.items()}
    m1_values |= {f"{task} by chance": chance for task, (_, chance) in spreads.items()}
    m3_values = {"tokens": longer, "accuracy in arithmetic": sums[main]}
    rows = [
        ("M1", "best minus worst accuracy over paraphrases, zero-shot", m1_values, m1),
        ("M2", "accuracy minus that of zero-shot", gains, m2),
        ("M3", "tokens and accuracy of chain of thought minus zero-shot", m3_values, m3),
        ("M4", "accuracy of chain of thought minus zero-shot, arithmetic, by model", sums, m4),
    ]
    return [findings.finding(*row) for row in rows]


def table(cells: Cells, tokens: Cells) -> list[str]:
    """Accuracy over paraphrases for each model, task and prompt type."""
    rows = []
    for key, right in cells.items():
        a = right.mean(1)
        figures = (a.mean(), a.std(ddof=1), a.min(), a.max())
        rows.append([*key, *(f"{x:.2f}" for x in figures), f"{tokens[key].mean():.1f}"])
    head = ["model", "task", "prompt", "mean", "standard deviation", "worst", "best", "tokens written"]
    return ["", *findings.markdown_table(head, rows)]


def draw(cells: Cells, path: pathlib.Path) -> None:
    """The accuracy of every paraphrase."""
    with pictures.figure(path, figsize=(8, 3.4)) as axes:
        labels = [" ".join(key) for key in cells]
        for place, right in enumerate(cells.values()):
            axes.plot([place] * len(right), right.mean(1), "_", markersize=12)
        axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=6)
        axes.set_ylabel("accuracy of each paraphrase")


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"examples": 2, "paraphrases": 2, "shots": 1, "reasoning_tokens": 4}))
