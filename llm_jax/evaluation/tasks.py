"""Tasks: examples, a template, how the answer is read, and how it is judged. A JSONL file is one, with no code.

    {"task": "capitals", "question": "The capital of {country} is", "scoring": "generate"}
    {"country": "France", "answer": "Paris", "shot": true}
    {"country": "Italy", "answer": "Rome"}

The first line may be left out, where examples have "question" and "answer". Examples with "shot" are shown, the
others are asked.
"""

import dataclasses
import difflib
import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.data import records
from llm_jax.errors import UserError
from llm_jax.evaluation import templates
from llm_jax.evaluation.templates import Example, Template

SCORINGS = ("likelihood", "generate")


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def _number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


METRICS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda said, right: _plain(said) == _plain(right),
    "number": lambda said, right: _number(said) is not None and _number(said) == _number(right),
    "starts": lambda said, right: (_plain(said) + " ").startswith(_plain(right) + " "),
    "contains": lambda said, right: f" {_plain(right)} " in f" {_plain(said)} ",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked and how it is judged.

    Attributes:
      templates: ways to put the question; they are paraphrases of each other.
      examples: what is asked. shots: what may be shown before.
      scoring: "likelihood" takes the likeliest of an example's choices, "generate" reads what the model writes.
      extract: regular expression whose last match (its first group, if it has one) is the answer in a text.
      metric: one of `METRICS`, of what was extracted against the right answer.
      max_new_tokens, stop: of the answer, where it is generated.
      reasoning_tokens: of the chain of thought before it.
      domain: what an expert persona is an expert in.
    """

    name: str
    templates: tuple[Template, ...]
    examples: tuple[Example, ...]
    shots: tuple[Example, ...] = ()
    scoring: str = "generate"
    extract: str = r"[^\n]+"
    metric: str = "exact"
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ("\n",)
    reasoning_tokens: int = 96
    domain: str = "this field"

    def check(self) -> None:
        """Raises UserError where the parts do not fit together."""
        if not self.examples:
            raise UserError(f"the task {self.name} has no examples to ask")
        if self.scoring not in SCORINGS:
            raise UserError(f"the task {self.name}: scoring is {self.scoring!r}; expected one of {', '.join(SCORINGS)}")
        if self.metric not in METRICS:
            raise UserError(f"the task {self.name}: metric is {self.metric!r}; expected one of {', '.join(METRICS)}")
        try:
            re.compile(self.extract)
        except re.error as error:
            raise UserError(f"the task {self.name}: extract is no regular expression ({error})") from error
        for template in self.templates:
            wanted = templates.names(template)
            for number, one in enumerate((*self.examples, *self.shots), 1):
                if lacking := wanted - set(one.fields):
                    raise UserError(f"the task {self.name}: example {number} lacks the field '{min(lacking)}'")
        if self.scoring == "likelihood":
            for number, one in enumerate(self.examples, 1):
                if len(one.choices) < 2 or one.answer not in one.choices:
                    raise UserError(
                        f"the task {self.name}: example {number} needs choices, two or more, with its answer among them"
                    )

    def digest(self) -> str:
        """The same for the same task, and for no other."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def read(self, text: str) -> str:
        """The answer in a generated text, or ""."""
        found = list(re.finditer(self.extract, text))
        return (found[-1][1] if found[-1].re.groups else found[-1][0]).strip() if found else ""

    def right(self, said: str, example: Example) -> bool:
        return METRICS[self.metric](said, example.answer)


_HEADER = {
    "task": str, "question": (str, list), "instruction": str, "answer": str, "separator": str, "choices": list,
    "scoring": str, "extract": str, "metric": str, "max_new_tokens": int, "stop": list, "reasoning_tokens": int,
    "domain": str,
}  # fmt: skip


def read(path: pathlib.Path) -> Task:
    """The task in a JSONL file.

    Raises:
      UserError: a line that is no JSON object, an unknown key, a wrong type, a missing answer: with its number.
    """
    lines = list(records.json_lines(path))
    if not lines:
        raise UserError(f"--task={path}: the file is empty")
    header = lines.pop(0)[1] if "task" in lines[0][1] else {"task": path.stem}
    for key, value in header.items():
        if key not in _HEADER:
            near = difflib.get_close_matches(key, _HEADER, 1, 0.0)[0]
            raise UserError(f"{path}, line 1: unknown key '{key}'; did you mean '{near}'?")
        if not isinstance(value, _HEADER[key]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise UserError(f"{path}, line 1: {key} is {value!r}, of the wrong type")
        if isinstance(value, list) and (not value or not all(isinstance(v, str) for v in value)):
            raise UserError(f"{path}, line 1: {key} must be a list of texts, at least one")
    choices = tuple(header.get("choices", ()))
    examples = [(bool(one.pop("shot", False)), _example(path, number, one, choices)) for number, one in lines]
    questions = header.get("question", "{question}\n")
    texts = {k: header[k] for k in ("instruction", "answer", "separator") if k in header}
    own: dict[str, Any] = {
        k: header[k] for k in ("extract", "metric", "max_new_tokens", "reasoning_tokens", "domain") if k in header
    }
    if "stop" in header:
        own["stop"] = tuple(header["stop"])
    task = Task(
        header["task"],
        tuple(Template(q, **texts) for q in ([questions] if isinstance(questions, str) else questions)),
        tuple(one for shot, one in examples if not shot),
        tuple(one for shot, one in examples if shot),
        header.get("scoring", "likelihood" if all(one.choices for _, one in examples) else "generate"),
        **own,
    )
    task.check()
    return task


def _example(path: pathlib.Path, number: int, one: Mapping[str, Any], choices: tuple[str, ...]) -> Example:
    if "answer" not in one:
        raise UserError(f"{path}, line {number}: an example needs an 'answer'")
    own = one.get("choices", list(choices))
    if not isinstance(own, list) or not all(isinstance(c, str) for c in own):
        raise UserError(f"{path}, line {number}: choices must be a list of texts")
    fields = {k: v for k, v in one.items() if k not in ("answer", "choices", "explanation")}
    for name, value in {**fields, "answer": one["answer"], "explanation": one.get("explanation", "")}.items():
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise UserError(f"{path}, line {number}: {name} is {value!r}; expected a text or a number")
    texts = {name: str(value) for name, value in fields.items()}
    return Example(texts, str(one["answer"]), tuple(own), str(one.get("explanation", "")))
