"""Templates and prompting styles, as data.

A template converts the fields of an example to text. A style adds nothing (zero-shot), solved examples (few-shot), an
expert persona, or a request to reason before the answer (chain of thought).
"""

import dataclasses
import random
import string
from collections.abc import Mapping, Sequence

from llm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """A question and its answer.

    Attributes:
      fields: the values of the fields that templates name, such as {"question": "2 + 2?"}.
      answer: the right answer.
      choices: the possible answers, if they are scored by likelihood.
      explanation: the reasoning that leads to the answer, for few-shot chains of thought.
    """

    fields: Mapping[str, str]
    answer: str
    choices: tuple[str, ...] = ()
    explanation: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """Format strings with the names of an example's fields; `answer` may also contain {answer}."""

    question: str
    answer: str = " {answer}"
    instruction: str = ""
    separator: str = "\n\n"

    def ask(self, example: Example) -> str:
        return _fill(self.question, example.fields)

    def solve(self, example: Example, answer: str) -> str:
        """The text that follows the question, with this answer."""
        return _fill(self.answer, {**example.fields, "answer": answer})


@dataclasses.dataclass(frozen=True)
class Style:
    """A prompting style.

    Attributes:
      shots: number of solved examples before the question.
      persona: format string with {domain} for the system message.
      reason: the cue after which the model reasons before it answers; "": it answers directly.
      request: an instruction that is added to the system message.
      conclude: the text between the reasoning and the answer.
    """

    shots: int = 0
    persona: str = ""
    reason: str = ""
    request: str = ""
    conclude: str = "\nTherefore, the answer is"


STYLES = {
    "zero_shot": Style(),
    "few_shot": Style(shots=4),
    "expert": Style(persona="You are a world-leading expert in {domain}."),
    # Kojima et al. 2022, arXiv:2205.11916, section 3: the cue, and the second prompt, which extracts the answer.
    "cot_zero_shot": Style(reason="Let's think step by step."),
    # Wei et al. 2022, arXiv:2201.11903: examples whose answers are explained.
    "cot_few_shot": Style(shots=4, reason="Explanation:", request="Give detailed explanations for the answer."),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as a conversation.

    Attributes:
      turns: (role, text) of each message; the last one is the user's.
      answer_start: the beginning of the answer, which is part of the prompt.
      reason: whether the model reasons before `conclude`.
      conclude: the text between the reasoning and the answer.
    """

    turns: tuple[tuple[str, str], ...]
    answer_start: str
    reason: bool
    conclude: str

    def plain(self) -> str:
        """The prompt as one text, which the model continues."""
        return "".join(text for _, text in self.turns) + self.answer_start

    def messages(self) -> list[dict[str, str]]:
        """The messages for a chat template, without `answer_start`, which follows the rendered text."""
        return [{"role": role, "content": text.strip()} for role, text in self.turns]


def build(
    template: Template, style: Style, example: Example, shots: Sequence[Example], domain: str = "this field"
) -> Prompt:
    """The prompt for one example.

    Args:
      shots: solved examples, in their order in the prompt.
      domain: the field of the expert persona.

    Raises:
      UserError: the template names a field that an example lacks.
    """
    system = [_fill(style.persona, {"domain": domain}), template.instruction, style.request]
    head = "\n".join(part for part in system if part)
    turns: list[tuple[str, str]] = [("system", head + template.separator)] if head else []
    for shot in shots:
        reasoning = f"\n{style.reason} {shot.explanation}{style.conclude}" if style.reason and shot.explanation else ""
        turns.append(("user", template.ask(shot)))
        turns.append(("assistant", reasoning + template.solve(shot, shot.answer) + template.separator))
    turns.append(("user", template.ask(example)))
    answer_start = f"\n{style.reason}" if style.reason else ""
    return Prompt(tuple(turns), answer_start, bool(style.reason), style.conclude)


def choose_shots(pool: Sequence[Example], count: int, seed: int, select: str = "random") -> list[Example]:
    """The solved examples of a prompt, in their order.

    Args:
      pool: all solved examples of the task.
      select: "first": the first examples; "random": examples in random order, drawn with `seed`; "balanced": like
        "random", but every answer occurs equally often if possible.

    Raises:
      UserError: the pool has fewer than `count` examples, or `select` is unknown.
    """
    if count > len(pool):
        raise UserError(f"--shots={count}, but the task has only {len(pool)} solved examples")
    if select == "first":
        return list(pool[:count])
    shuffled = random.Random(seed).sample(list(pool), len(pool))
    if select == "random":
        return shuffled[:count]
    if select != "balanced":
        raise UserError(f"--select={select}; expected first, random or balanced")
    seen: dict[str, int] = {}
    rank = []
    for index, example in enumerate(shuffled):  # the i-th example of an answer comes after all (i-1)-th ones
        seen[example.answer] = seen.get(example.answer, 0) + 1
        rank.append((seen[example.answer], index))
    return [shuffled[index] for _, index in sorted(rank)[:count]]


def names(template: Template) -> set[str]:
    """The names of the fields in a template. Raises UserError if it is not a format string."""
    try:
        parts = [p for text in (template.question, template.answer) for p in string.Formatter().parse(text)]
    except ValueError as error:
        raise UserError(f"the template {template.question[:60]!r} is not a format string ({error})") from error
    return {name for _, name, _, _ in parts if name is not None} - {"answer"}


def _fill(text: str, fields: Mapping[str, str]) -> str:
    try:
        return text.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        names = ", ".join(sorted(fields))
        raise UserError(f"the template {text[:60]!r} cannot be filled: {error} (an example has {names})") from error
