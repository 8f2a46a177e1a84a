"""How a question is put: templates and styles, as data.

A template turns an example's fields into text. A style says what stands around it: nothing (zero-shot), solved
examples (few-shot), an expert's role, or a request to reason first (chain of thought).
"""

import dataclasses
import random
import string
from collections.abc import Mapping, Sequence

from llm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One question and its answer.

    Attributes:
      fields: what the template names, such as {"question": "2 + 2?"}.
      answer: the right answer.
      choices: the possible answers, where they are scored by likelihood.
      explanation: reasoning that leads to the answer, shown in few-shot chains of thought.
    """

    fields: Mapping[str, str]
    answer: str
    choices: tuple[str, ...] = ()
    explanation: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """Format strings over an example's fields; `answer` also over {answer}."""

    question: str
    answer: str = " {answer}"
    instruction: str = ""
    separator: str = "\n\n"

    def ask(self, example: Example) -> str:
        return _fill(self.question, example.fields)

    def solve(self, example: Example, answer: str) -> str:
        """What follows the question where the answer is `answer`."""
        return _fill(self.answer, {**example.fields, "answer": answer})


@dataclasses.dataclass(frozen=True)
class Style:
    """What stands around a question.

    Attributes:
      shots: solved examples before it.
      persona: who is asked, over {domain}.
      reason: the model reasons before it answers, after this cue.
      request: an instruction that is added.
      conclude: what leads from the reasoning to the answer.
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
    # Kojima et al. 2022, arXiv:2205.11916, section 3: the cue, and the second prompt that draws the answer out.
    "cot_zero_shot": Style(reason="Let's think step by step."),
    # Wei et al. 2022, arXiv:2201.11903: examples whose answers are explained.
    "cot_few_shot": Style(shots=4, reason="Explanation:", request="Give detailed explanations for the answer."),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as turns of a conversation: (role, text), the last of the user.

    Attributes:
      reason: whether the model is to reason before what `conclude` says.
    """

    turns: tuple[tuple[str, str], ...]
    begun: str
    reason: bool
    conclude: str

    def plain(self) -> str:
        """The prompt as one text, up to where the model goes on."""
        return "".join(text for _, text in self.turns) + self.begun

    def messages(self) -> list[dict[str, str]]:
        """The prompt for a chat template; what has begun the answer comes after it."""
        return [{"role": role, "content": text.strip()} for role, text in self.turns]


def build(
    template: Template, style: Style, example: Example, shots: Sequence[Example], domain: str = "this field"
) -> Prompt:
    """The prompt for one example.

    Args:
      shots: solved examples, in the order in which they are shown.
      domain: what the expert is an expert in.

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
    begun = f"\n{style.reason}" if style.reason else ""
    return Prompt(tuple(turns), begun, bool(style.reason), style.conclude)


def choose_shots(pool: Sequence[Example], count: int, seed: int, select: str = "random") -> list[Example]:
    """Which examples are shown, and in which order.

    Args:
      select: "first" takes them as they stand, "random" draws them and their order from `seed`, "balanced"
        does so with as equal a number of every answer as there can be.

    Raises:
      UserError: fewer examples than asked for, or an unknown way to select.
    """
    if count > len(pool):
        raise UserError(f"--shots={count}, but the task has {len(pool)} solved examples to show")
    if select == "first":
        return list(pool[:count])
    shuffled = random.Random(seed).sample(list(pool), len(pool))
    if select == "random":
        return shuffled[:count]
    if select != "balanced":
        raise UserError(f"--select={select}; expected first, random or balanced")
    seen: dict[str, int] = {}
    rank = []
    for index, one in enumerate(shuffled):  # the i-th of its answer comes after all (i-1)-th ones
        seen[one.answer] = seen.get(one.answer, 0) + 1
        rank.append((seen[one.answer], index))
    return [shuffled[index] for _, index in sorted(rank)[:count]]


def names(template: Template) -> set[str]:
    """The fields that a template names. Raises UserError where it is no format string."""
    try:
        parts = [p for text in (template.question, template.answer) for p in string.Formatter().parse(text)]
    except ValueError as error:
        raise UserError(f"the template {template.question[:60]!r} is no format string ({error})") from error
    return {name for _, name, _, _ in parts if name is not None} - {"answer"}


def _fill(text: str, fields: Mapping[str, str]) -> str:
    try:
        return text.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        have = ", ".join(sorted(fields))
        raise UserError(f"the template {text[:60]!r} cannot be filled: {error} (an example has {have})") from error
