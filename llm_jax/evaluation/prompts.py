"""Prompts of tasks: builds them from style, template, solved examples and chat template, and encodes them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llm_jax import tokenizers
from llm_jax.errors import UserError
from llm_jax.evaluation import templates
from llm_jax.evaluation.tasks import Task
from llm_jax.evaluation.templates import STYLES, Example, Prompt
from llm_jax.tokenizers import PretrainedTokenizer, Tokenizer, chat_template

# {value of `normalize`: function of a choice and its token ids that returns the divisor of its log-probability}.
NORMALIZERS = {
    "none": lambda choice, ids: 1,
    "tokens": lambda choice, ids: len(ids),
    "bytes": lambda choice, ids: len(choice.encode()),
}


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Options for the prompts of a task.

    Attributes:
      style: one of `templates.STYLES`.
      template: index of one of the task's paraphrases.
      shots: number of solved examples; -1: the default of the style.
      select, shot_seed: how solved examples are selected and ordered; see `templates.choose_shots`.
      chat: whether the chat template of the tokenizer renders the prompt.
      normalize: name in `NORMALIZERS`: normalization of the log-probabilities of choices.
      context: maximum number of tokens of a prompt and its answer; 0: the maximum length of the model. Longer prompts
        are truncated on the left.
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
        """Raises UserError if an option is out of range for the task."""
        for name, value, options in (("style", self.style, STYLES), ("normalize", self.normalize, NORMALIZERS)):
            if value not in options:
                raise UserError(f"--{name}={value}; expected one of {', '.join(options)}")
        if not 0 <= self.template < len(task.templates):
            raise UserError(
                f"--template={self.template}; expected 0 to {len(task.templates) - 1} for the task {task.name}"
            )
        self.chosen_shots(task)

    def chosen_shots(self, task: Task) -> list[Example]:
        """The solved examples of the prompts."""
        count = STYLES[self.style].shots if self.shots < 0 else self.shots
        return templates.choose_shots(task.shots, count, self.shot_seed, self.select)


def prompts(task: Task, config: PromptConfig, examples: Sequence[Example]) -> list[Prompt]:
    """The prompts for examples of the task."""
    template, shots = task.templates[config.template], config.chosen_shots(task)
    return [templates.build(template, STYLES[config.style], example, shots, task.domain) for example in examples]


def render(tokenizer: Tokenizer, prompts: Sequence[Prompt], chat: bool) -> list[str]:
    """Renders prompts as texts that the model continues.

    Args:
      chat: whether the chat template of the tokenizer renders them.

    Raises:
      UserError: the tokenizer has no chat template.
    """
    if not chat:
        return [prompt.plain() for prompt in prompts]
    rendered = render_chat(tokenizer, [prompt.messages() for prompt in prompts])
    return [text + prompt.answer_start.lstrip() for text, prompt in zip(rendered, prompts, strict=True)]


def render_chat(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[dict[str, Any]]], answer: bool = True
) -> list[str]:
    """The conversations as the text of the tokenizer's chat template; see `tokenizers.chat_template.render`.

    Raises:
      UserError: the tokenizer has no chat template.
    """
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise UserError(f"--chat needs a tokenizer with a chat template; this checkpoint's is {tokenizer.kind}")
    jobs = [chat_template.job(messages, answer) for messages in conversations]
    return [rendered.text for rendered in chat_template.render_all(tokenizer.special, jobs)]


def encode(tokenizer: Tokenizer, text: str, rendered: bool = False) -> list[int]:
    """The token ids of a prompt.

    Args:
      rendered: whether a chat template has rendered the text; names of special tokens are then converted to their ids.
    """
    if rendered and isinstance(tokenizer, PretrainedTokenizer):
        return tokenizer.encode_chat(text)
    return tokenizers.prompt(tokenizer, text)


def encode_pair(tokenizer: Tokenizer, prompt: str, answer: str, rendered: bool = False) -> tuple[list[int], list[int]]:
    """Returns (token ids of the prompt, token ids of the answer): the ids of prompt + answer, split at the answer.

    A token that contains text of both belongs to the answer. Spaces at the end of the prompt belong to the answer,
    because most vocabularies have words with a leading space.

    Args:
      rendered: see `encode`.
    """
    head = prompt.rstrip(" ")
    text, ids = prompt + answer, encode(tokenizer, prompt + answer, rendered)
    if rendered and isinstance(tokenizer, PretrainedTokenizer):
        ends, border = [end for _, end in tokenizer.chat_offsets(text)], len(head)
    else:
        ends, border = [end for _, end in tokenizer.spans(text)], len(head.encode())
    added = len(ids) - len(ends)  # BOS
    count = added + next((i for i, end in enumerate(ends) if end > border), len(ends))
    return ids[:count], ids[count:]
