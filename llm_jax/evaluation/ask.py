"""Asks a model the examples of a task, in one style, and judges what it says."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm_jax import tokenizers
from llm_jax.decoding import score, stops
from llm_jax.decoding.complete import complete, fit
from llm_jax.decoding.options import Options
from llm_jax.errors import UserError
from llm_jax.evaluation import templates
from llm_jax.evaluation.statistics import wilson
from llm_jax.evaluation.tasks import Task
from llm_jax.evaluation.templates import STYLES, Example, Prompt, Template
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers import Foreign, chat
from llm_jax.tokenizers.base import Tokenizer

NORMALIZE = {
    "none": lambda answer, ids: 1,
    "tokens": lambda answer, ids: len(ids),
    "bytes": lambda answer, ids: len(answer.encode()),
}
Model = tuple[Transformer, Any, Tokenizer]


@dataclasses.dataclass(frozen=True)
class Manner:
    """How a task is asked.

    Attributes:
      style: one of `templates.STYLES`.
      template: which of the task's paraphrases.
      shots: solved examples; -1: as many as the style has.
      select, shot_seed: which, and in which order (`templates.choose_shots`).
      chat: through the model's chat template.
      normalize: what log-probabilities of choices are divided by: one of `NORMALIZE`.
      context: tokens of a prompt and its answer at most, 0: the model's bound; too long a prompt loses its left end.
    """

    style: str = "zero_shot"
    template: int = 0
    shots: int = -1
    select: str = "random"
    shot_seed: int = 0
    chat: bool = False
    normalize: str = "none"
    context: int = 0

    def check(self, task: Task) -> None:
        """Raises UserError for a manner that the task cannot be asked in."""
        for name, value, kinds in (("style", self.style, STYLES), ("normalize", self.normalize, NORMALIZE)):
            if value not in kinds:
                raise UserError(f"--{name}={value}; expected one of {', '.join(kinds)}")
        if not 0 <= self.template < len(task.templates):
            raise UserError(f"--template={self.template}; the task {task.name} has {len(task.templates)}, from 0 on")
        self.chosen_shots(task)

    def chosen_shots(self, task: Task) -> list[Example]:
        count = STYLES[self.style].shots if self.shots < 0 else self.shots
        return templates.choose_shots(task.shots, count, self.shot_seed, self.select)


def prompts(task: Task, manner: Manner, examples: Sequence[Example]) -> list[Prompt]:
    """The prompts for some examples of the task."""
    template, shots = task.templates[manner.template], manner.chosen_shots(task)
    return [templates.build(template, STYLES[manner.style], one, shots, task.domain) for one in examples]


def records(
    of: Model, task: Task, manner: Manner, which: Sequence[int], batch_size: int = 8
) -> Iterator[dict[str, Any]]:
    """One record for every example that `which` names, batch by batch, in that order.

    {"index", "right", "said", "answer", "reasoning_tokens", "tokens"}, and "scores" where choices were scored:
    natural log-probabilities, divided as `manner.normalize` says. Decoding is greedy.
    """
    manner.check(task)
    template = task.templates[manner.template]
    for first in range(0, len(which), batch_size):
        batch = list(which[first : first + batch_size])
        examples = [task.examples[i] for i in batch]
        asked = prompts(task, manner, examples)
        texts = _texts(of, asked, manner)
        thoughts = [""] * len(batch)
        if asked[0].reason:
            # What comes after the reasoning's end, or a next example made up, is not reasoning.
            ends = (template.separator, asked[0].conclude) if template.separator else (asked[0].conclude,)
            thoughts, lengths = _write(of, texts, manner, task.reasoning_tokens, ends, batch_size)
            joined = zip(texts, thoughts, asked, strict=True)
            texts = [text + thought.rstrip() + prompt.conclude for text, thought, prompt in joined]
        else:
            lengths = [0] * len(batch)
        judged = (_choose if task.scoring == "likelihood" else _generate)(
            of, task, template, manner, examples, texts, batch_size
        )
        for index, example, length, (said, tokens, scores) in zip(batch, examples, lengths, judged, strict=True):
            right = said == example.answer if scores else task.right(said, example)
            found = {"index": index, "right": right, "said": said, "answer": example.answer}
            yield found | {"reasoning_tokens": length, "tokens": tokens} | ({"scores": scores} if scores else {})


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy with its 95 % interval (Wilson 1927), and the mean number of tokens written before the answer."""
    n, right = len(found), sum(bool(r["right"]) for r in found)
    low, high = wilson(right, n)
    mean = {k: sum(r[k] for r in found) / n for k in ("reasoning_tokens", "tokens")}
    return {"examples": n, "accuracy": right / n, "low": low, "high": high, **mean}


class Log:
    """Records on disk, a line each after a line that says what was asked; what is there is not asked again."""

    def __init__(self, path: pathlib.Path | None, settings: Mapping[str, Any]):
        self.records: list[dict[str, Any]] = []
        self._path = path
        if path is None:
            return
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # an interruption may cut the last one
        try:
            said = [json.loads(line) for line in whole]
        except ValueError as error:
            raise UserError(f"--output={path}: not a file of records ({error})") from error
        if said and said[0] != dict(settings):
            differ = [k for k in settings if not isinstance(said[0], dict) or said[0].get(k) != settings[k]]
            raise UserError(
                f"--output={path} holds the records of another run ({', '.join(differ)} differ); name another"
            )
        self.records = said[1:]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".new")
            temporary.write_text("".join(whole) or json.dumps(dict(settings)) + "\n")
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"--output={path}: cannot be written ({error})") from error

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def split(tokenizer: Tokenizer, prompt: str, answer: str, marked: bool = False) -> tuple[list[int], list[int]]:
    """Ids of prompt and answer, as the tokenizer cuts the two together where it keeps the border between them."""

    def encode(text: str) -> list[int]:
        if marked and isinstance(tokenizer, Foreign):
            return tokenizer.encode_chat(text)
        return tokenizers.prompt(tokenizer, text)

    space = len(prompt) - len(prompt.rstrip(" "))
    if space:  # vocabularies have words with the space before them
        prompt, answer = prompt[:-space], prompt[-space:] + answer
    head, whole = encode(prompt), encode(prompt + answer)
    if whole[: len(head)] == head and len(whole) > len(head):
        return head, whole[len(head) :]
    return head, tokenizer.encode(answer)


def _texts(of: Model, asked: Sequence[Prompt], manner: Manner) -> list[str]:
    if not manner.chat:
        return [prompt.plain() for prompt in asked]
    tokenizer = of[2]
    if not isinstance(tokenizer, Foreign):
        raise UserError(f"--chat needs a tokenizer with a chat template; this checkpoint's is {tokenizer.kind}")
    rendered = chat.render_all(tokenizer.special, [prompt.messages() for prompt in asked])
    return [text + prompt.begun.lstrip() for text, prompt in zip(rendered, asked, strict=True)]


def _write(
    of: Model, texts: Sequence[str], manner: Manner, limit: int, stop: tuple[str, ...], batch_size: int
) -> tuple[list[str], list[int]]:
    """What the model writes after each text, greedily, and how many tokens."""
    model, params, tokenizer = of
    stop = stops.possible(tokenizer, stop, limit)
    options = Options(temperature=0, max_new_tokens=limit, stop=stop, context=manner.context, truncate="left")
    rows = [_encoded(of, text, manner) for text in texts]
    rows += [rows[-1]] * (batch_size - len(rows))  # a last, smaller batch does not compile again
    made = [several[0] for several in complete(model, params, tokenizer, rows, options)][: len(texts)]
    return [one.text for one in made], [len(one.made.ids) for one in made]


def _encoded(of: Model, text: str, manner: Manner) -> list[int]:
    tokenizer = of[2]
    if manner.chat and isinstance(tokenizer, Foreign):
        return tokenizer.encode_chat(text)
    return tokenizers.prompt(tokenizer, text)


def _generate(of, task: Task, template: Template, manner: Manner, examples, texts, batch_size: int):
    said, lengths = _write(of, texts, manner, task.max_new_tokens, task.stop, batch_size)
    return [(task.read(text), length, None) for text, length in zip(said, lengths, strict=True)]


def _choose(of, task: Task, template: Template, manner: Manner, examples, texts, batch_size: int):
    model, params, tokenizer = of
    pairs, divide = [], []
    for example, text in zip(examples, texts, strict=True):
        for choice in example.choices:
            answer = template.solve(example, choice)
            if manner.chat and not STYLES[manner.style].reason:  # a turn begins with its text, as those of shots do
                answer = answer.lstrip()
            head, tail = split(tokenizer, text, answer, manner.chat)
            head = fit(model, head, Options(max_new_tokens=len(tail), context=manner.context, truncate="left"))
            pairs.append((head, tail))
            divide.append(NORMALIZE[manner.normalize](answer, tail))
    scored = score.score(model, params, pairs, batch_size)
    values = iter(sum(one.log_probabilities) / by for one, by in zip(scored, divide, strict=True))
    found = []
    for example in examples:
        scores = [next(values) for _ in example.choices]
        found.append((example.choices[scores.index(max(scores))], 0, scores))
    return found
