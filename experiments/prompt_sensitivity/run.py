"""How much do answers depend on how one asks? Tasks x paraphrases x prompt types x models: M1 to M4.

    PYTHONPATH=. python experiments/prompt_sensitivity/run.py [--reference=RUN] [--examples=8]

Every record is kept under --runs; the same command goes on where it was stopped. Writes results.json, the tables of
README.md and spread.png.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments.prompt_sensitivity import report
from llm_jax import checkpoints, cli, files
from llm_jax.errors import UserError
from llm_jax.evaluation import answers
from llm_jax.evaluation.builtin import TASKS
from llm_jax.evaluation.prompts import PromptConfig

HERE = pathlib.Path(__file__).parent
STYLES = ("zero_shot", "few_shot", "expert", "cot_zero_shot", "cot_few_shot")

flags.DEFINE_string("model", "asset:smollm2-135m-instruct", "the instruct model")
flags.DEFINE_string("reference", "", "a run of configs/reference_lm.py, asked too if given")
flags.DEFINE_integer("examples", 8, "of each task")
flags.DEFINE_integer("shots", 2, "solved examples in few-shot prompts")
flags.DEFINE_integer("reasoning_tokens", 24, "of a chain of thought at most")
flags.DEFINE_integer("paraphrases", 10, "ways to put each question")
flags.DEFINE_string("runs", "runs/prompt_sensitivity", "where records are kept")


def main() -> None:
    f = flags.FLAGS
    if f.examples < 2 or not 2 <= f.paraphrases <= 10:
        raise UserError(f"--examples={f.examples} --paraphrases={f.paraphrases}; expected 2 or more, and 2 to 10")
    root = pathlib.Path(f.runs).expanduser() / f"{f.examples}-{f.shots}-{f.reasoning_tokens}"
    files.make_directory(root)
    models = {"smollm2": (f.model, True)} | ({"reference": (f.reference, False)} if f.reference else {})
    found: list[dict[str, Any]] = []
    total = len(models) * len(TASKS) * f.paraphrases * len(STYLES)
    with tqdm(total=total) as bar:
        for name, (path, _) in models.items():
            of = checkpoints.load(path)
            for task_name, make in TASKS.items():
                task = dataclasses.replace(make(f.examples), reasoning_tokens=f.reasoning_tokens)
                for style in STYLES:
                    shots = f.shots if "few" in style else 0
                    for template in range(f.paraphrases):
                        config = PromptConfig(
                            style, template, shots, "balanced" if task_name == "sentiment" else "random"
                        )
                        bar.set_description(f"{name} {task_name} {style}")
                        one = asked(of, path, task, config, root / f"{name}-{task_name}-{style}-{template}.jsonl")
                        found.append({"model": name, "task": task_name, "style": style, "template": template, **one})
                        bar.update()
    sizes = f"--examples={f.examples} --shots={f.shots} --reasoning_tokens={f.reasoning_tokens}"
    command = sizes + (" --reference=RUN" if f.reference else "")
    print(report.write(HERE, found, command))


def asked(of, path: str, task, config: PromptConfig, file: pathlib.Path) -> dict[str, Any]:
    """Example by example what one cell of the grid came to, from the records there and those still to be made."""
    log = answers.AnswerLog(file, {"checkpoint": path, "task": task.digest(), **dataclasses.asdict(config)})
    done = {record["index"] for record in log.records}
    rest = [i for i in range(len(task.examples)) if i not in done]
    for record in answers.records(of, task, config, rest, batch_size=8):
        log.add(record)
    return {key: [record[key] for record in log.records] for key in ("right", "tokens", "reasoning_tokens")}


if __name__ == "__main__":
    cli.run_script(main)
