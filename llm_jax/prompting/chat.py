"""Conversations as text, by the Jinja template of a tokenizer."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm_jax.errors import UserError


def render(special: Mapping[str, Any], messages: Sequence[Mapping[str, str]], answer: bool = True) -> str:
    """Messages as the text the model was trained on; templates run in a sandbox.

    Args:
      special: `chat_template` (Jinja source) and the special tokens that it names ("bos_token", ...).
      messages: {"role": "system", "user" or "assistant", "content": text} each.
      answer: end with what begins an answer.

    Raises:
      UserError: no template, or one that fails or refuses the messages.
    """
    source = special.get("chat_template")
    if not source:
        raise UserError("this model's tokenizer has no chat template; leave --chat out")

    def refuse(reason: str) -> None:
        raise UserError(f"the chat template refuses these messages: {reason}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    tokens = {name: token for name, token in special.items() if name.endswith("_token") and isinstance(token, str)}
    try:
        template = environment.from_string(source)
        return template.render(messages=list(messages), add_generation_prompt=answer, **tokens)
    except (jinja2.TemplateError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"the chat template fails ({type(error).__name__}: {error})") from error
