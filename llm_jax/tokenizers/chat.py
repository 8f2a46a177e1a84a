"""Conversations as text, by the Jinja template of a tokenizer.

Templates come with downloaded files: they are rendered in a sandbox, in a process of its own whose time
and memory are bounded.
"""

import datetime
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.errors import UserError

_SECONDS, _BYTES = 10, 2**30


def render(special: Mapping[str, Any], messages: Sequence[Mapping[str, str]], answer: bool = True) -> str:
    """Messages as the text the model was trained on.

    Args:
      special: `chat_template` (Jinja source) and the special tokens that it names ("bos_token", ...).
      messages: {"role": "system", "user" or "assistant", "content": text} each.
      answer: end with what begins an answer.

    Raises:
      UserError: no template, or one that fails, refuses the messages, or takes too long or too much memory.
    """
    return render_all(special, [messages], answer)[0]


def render_all(
    special: Mapping[str, Any], conversations: Sequence[Sequence[Mapping[str, str]]], answer: bool = True
) -> list[str]:
    """`render` of several conversations, in one process."""
    if not special.get("chat_template"):
        raise UserError("this model's tokenizer has no chat template; leave --chat out")
    job = json.dumps({"special": dict(special), "conversations": [list(c) for c in conversations], "answer": answer})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "llm_jax.tokenizers.chat"],
            input=job,
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the chat template did not end within {_SECONDS} s") from error
    if done.returncode:
        raise UserError("the chat template took too much time or memory, or cannot be rendered in a child process")
    said = json.loads(done.stdout)
    if "error" in said:
        raise UserError(said["error"])
    return said["texts"]


class _RefusedError(Exception):
    """Raised by a template."""


def _render(special: Mapping[str, Any], conversations: list[Any], answer: bool) -> list[str]:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise _RefusedError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    tokens = {name: token for name, token in special.items() if name.endswith("_token") and isinstance(token, str)}
    template = environment.from_string(special["chat_template"])
    return [template.render(messages=messages, add_generation_prompt=answer, **tokens) for messages in conversations]


def _child() -> None:
    """Renders the job on stdin; the answer, or what went wrong, goes to stdout as JSON."""
    job = json.load(sys.stdin)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    except (ImportError, ValueError, OSError):
        pass  # not on every system
    try:
        said: dict[str, Any] = {"texts": _render(**job)}
    except _RefusedError as error:
        said = {"error": f"the chat template refuses these messages: {error}"}
    except Exception as error:  # whatever a template can raise
        said = {"error": f"the chat template fails ({type(error).__name__}: {error})"}
    print(json.dumps(said))


if __name__ == "__main__":
    _child()
