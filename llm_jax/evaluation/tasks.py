"""Tasks: examples, templates, and a metric. A file of JSON lines is a task:

    {"task": "capitals", "question": "The capital of {country} is", "scoring": "generate"}
    {"country": "France", "answer": "Paris", "shot": true}
    {"country": "Italy", "answer": "Rome"}

The first line has the options of the task, which are named like the attributes of `Task`. It may be omitted if the
examples have "question" and "answer". Examples with "shot" are the solved examples of few-shot prompts.
"""

import dataclasses
import decimal
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

# A number: an optional sign (not the hyphen of "3-4"), an optional currency, digits with optional thousands separators,
# and an optional exponent.
_GROUP = "[,_'\N{RIGHT SINGLE QUOTATION MARK}\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}]"
_NUMBER = re.compile(
    r"(?:(?<![\w.)])(?P<sign>[-+\N{MINUS SIGN}])\s?)?[$\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}]?\s?"
    rf"(?P<digits>\d{{1,3}}(?:{_GROUP}\d{{3}})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d+)?"
)


def number(text: str) -> decimal.Decimal | None:
    """The last number of a text, or None. Handles signs, thousands separators, currencies and percent signs."""
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007
        pass
    if match is None:
        return None
    value = decimal.Decimal(re.sub(_GROUP, "", match["digits"]) + (match["exponent"] or ""))
    return -value if match["sign"] and match["sign"] != "+" else value


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


# {normalization: function that is applied to predictions and answers before they are compared}.
NORMALIZATIONS: dict[str, Callable[[str], str]] = {"none": str.strip, "words": _words}
# {metric: function (prediction, answer) -> whether the prediction is correct}; both are normalized and not empty.
_BEFORE, _AFTER = r"(?<![^\s(\"'])", r"(?![^\s.,;:!?)\"'])"  # the answer is not part of a longer word
METRICS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda prediction, answer: prediction == answer,
    "number": lambda prediction, answer: number(prediction) is not None and number(prediction) == number(answer),
    "starts": lambda prediction, answer: bool(re.match(re.escape(answer) + _AFTER, prediction)),
    "contains": lambda prediction, answer: bool(re.search(_BEFORE + re.escape(answer) + _AFTER, prediction)),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions with their correct answers, and the metric of a model's answers.

    Attributes:
      templates: paraphrases of the question.
      examples: the examples that the model answers.
      shots: solved examples for few-shot prompts.
      scoring: "likelihood": the answer is the most likely choice of the example; "generate": the model writes it.
      extract: regular expression; its last match (the first group, if it has one) is the answer in a generated text.
      metric: name in `METRICS`; compares the extracted answer with the correct one.
      max_new_tokens, stop: limits of a generated answer.
      reasoning_tokens: maximum number of tokens of the chain of thought before the answer.
      domain: the field of the expert persona.
      normalization: name in `NORMALIZATIONS`: "none" strips surrounding white space, "words" also ignores case and
        punctuation.
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
    normalization: str = "none"

    def check(self) -> None:
        """Raises UserError if the task is inconsistent, for example if an example lacks a field of the template."""
        if not self.examples:
            raise UserError(f"the task {self.name} has no examples to ask")
        for name, options in (("scoring", SCORINGS), ("metric", METRICS), ("normalization", NORMALIZATIONS)):
            if (value := getattr(self, name)) not in options:
                raise UserError(f"the task {self.name}: {name} is {value!r}; expected one of {', '.join(options)}")
        try:
            re.compile(self.extract)
        except re.error as error:
            raise UserError(f"the task {self.name}: extract is not a regular expression ({error})") from error
        for template in self.templates:
            fields = templates.names(template)
            for index, example in enumerate((*self.examples, *self.shots), 1):
                if missing := fields - set(example.fields):
                    raise UserError(f"the task {self.name}: example {index} lacks the field '{min(missing)}'")
        if self.scoring == "generate":
            self._check_answers()
            return
        for index, example in enumerate(self.examples, 1):
            if len(example.choices) < 2 or example.answer not in example.choices:
                raise UserError(
                    f"the task {self.name}: example {index} needs at least two choices that include its answer"
                )
            if len(set(example.choices)) < len(example.choices):
                raise UserError(f"the task {self.name}: two choices of example {index} are the same")

    def _check_answers(self) -> None:
        """Raises UserError if the metric cannot distinguish the answers of the task."""
        if self.metric == "number":
            if self.normalization != "none":
                raise UserError(f"the task {self.name}: metric 'number' requires normalization 'none'")
            for index, example in enumerate(self.examples, 1):
                if number(example.answer) is None:
                    raise UserError(
                        f"the task {self.name}: the answer of example {index} is {example.answer!r}; expected a number"
                    )
        normalize = NORMALIZATIONS[self.normalization]
        answers: dict[str, str] = {}
        for index, example in enumerate(self.examples, 1):
            other = answers.setdefault(normalize(example.answer), example.answer)
            if not normalize(example.answer) or other.strip() != example.answer.strip():
                problem = f"the same as {other!r}" if normalize(example.answer) else "empty"
                raise UserError(
                    f"the task {self.name}: the answer of example {index} is {example.answer!r}, which is {problem} "
                    f"with normalization '{self.normalization}'"
                )

    def digest(self) -> str:
        """A hash of everything that defines the task."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def extract_answer(self, text: str) -> str:
        """The answer in a generated text, or ""."""
        matches = list(re.finditer(self.extract, text))
        return ((matches[-1][1] if matches[-1].re.groups else matches[-1][0]) or "").strip() if matches else ""

    def is_correct(self, prediction: str, example: Example) -> bool:
        """Whether an extracted answer is correct for the example; an empty answer never is."""
        normalize = NORMALIZATIONS[self.normalization]
        prediction = normalize(prediction)
        return bool(prediction) and METRICS[self.metric](prediction, normalize(example.answer))


_HEADER = {
    "task": str, "question": (str, list), "instruction": str, "answer": str, "separator": str, "choices": list,
    "scoring": str, "extract": str, "metric": str, "max_new_tokens": int, "stop": list, "reasoning_tokens": int,
    "domain": str, "normalization": str,
}  # fmt: skip


def read(path: pathlib.Path) -> Task:
    """The task in a file of JSON lines.

    Raises:
      UserError: a line is not a JSON object, has an unknown key, a value of the wrong type, or no answer; or see
        `Task.check`.
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
    examples = [(bool(line.pop("shot", False)), _example(path, index, line, choices)) for index, line in lines]
    questions = header.get("question", "{question}\n")
    texts = {k: header[k] for k in ("instruction", "answer", "separator") if k in header}
    names = ("extract", "metric", "max_new_tokens", "reasoning_tokens", "domain", "normalization")
    options: dict[str, Any] = {name: header[name] for name in names if name in header}
    if "stop" in header:
        options["stop"] = tuple(header["stop"])
    task = Task(
        header["task"],
        tuple(Template(q, **texts) for q in ([questions] if isinstance(questions, str) else questions)),
        tuple(example for is_shot, example in examples if not is_shot),
        tuple(example for is_shot, example in examples if is_shot),
        header.get("scoring", "likelihood" if all(example.choices for _, example in examples) else "generate"),
        **options,
    )
    task.check()
    return task


def _example(path: pathlib.Path, index: int, line: Mapping[str, Any], choices: tuple[str, ...]) -> Example:
    if "answer" not in line:
        raise UserError(f"{path}, line {index}: an example needs an 'answer'")
    example_choices = line.get("choices", list(choices))
    if not isinstance(example_choices, list) or not all(isinstance(c, str) for c in example_choices):
        raise UserError(f"{path}, line {index}: choices must be a list of texts")
    fields = {k: v for k, v in line.items() if k not in ("answer", "choices", "explanation")}
    for name, value in {**fields, "answer": line["answer"], "explanation": line.get("explanation", "")}.items():
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise UserError(f"{path}, line {index}: {name} is {value!r}; expected a text or a number")
    texts = {name: str(value) for name, value in fields.items()}
    return Example(texts, str(line["answer"]), tuple(example_choices), str(line.get("explanation", "")))
