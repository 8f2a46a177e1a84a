"""Renders conversations to text by the Jinja chat template of a tokenizer.

Templates come with downloaded files, so they are rendered in Jinja's sandbox, in a child process with limited time and
memory. They see what transformers' `apply_chat_template` passes: `messages`, `tools`, `documents` (None where there are
none), `add_generation_prompt` and the special tokens. `{% generation %}` blocks mark what the assistant writes.
"""

import datetime
import json
import os
import pathlib
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax.errors import UserError

_SECONDS, _BYTES = 10, 2**30
Message = Mapping[str, Any]  # {"role": ..., "content": ...}, and what else the template reads


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
      text: what the template writes.
      answers: ranges of characters (begin, end) inside `{% generation %}` blocks, in order.
    """

    text: str
    answers: list[tuple[int, int]]


def render(
    special: Mapping[str, Any],
    messages: Sequence[Message],
    answer: bool = True,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
) -> str:
    """Renders messages to the text that the model was trained on.

    Args:
      special: "chat_template" (Jinja source) and the special tokens that it names ("bos_token", ...).
      messages: {"role": "system", "user" or "assistant", "content": text} each.
      answer: whether the text ends with the begin of an answer (`add_generation_prompt`).
      tools: descriptions of tools that the model may call.
      documents: documents for retrieval-augmented generation.

    Raises:
      UserError: no template, or one that fails, refuses the messages, or takes too long or too much memory.
    """
    return render_all(special, [job(messages, answer, tools, documents)])[0].text


def job(
    messages: Sequence[Message],
    answer: bool,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """One conversation for `render_all`: the arguments of `render`."""
    return {
        "messages": list(messages),
        "add_generation_prompt": answer,
        "tools": tools or None,
        "documents": documents or None,
    }


def render_all(special: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]]) -> list[Rendered]:
    """Renders several conversations in one process. Raises as `render`.

    Args:
      jobs: conversations made by `job`.
    """
    if not special.get("chat_template"):
        raise UserError("this model's tokenizer has no chat template; leave --chat out")
    if not jobs:
        return []
    mark = secrets.token_hex(8)  # no template or message contains it
    try:
        done = subprocess.run(
            [sys.executable, "-m", "llm_jax.tokenizers.chat_template"],
            input=json.dumps({"special": dict(special), "jobs": list(jobs), "mark": mark}),
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
    result = json.loads(done.stdout)
    if "error" in result:
        raise UserError(result["error"])
    return [_rendered(text, mark) for text in result["texts"]]


def _rendered(text: str, mark: str) -> Rendered:
    """The text without the marks around `{% generation %}` blocks, and the ranges between them."""
    parts, answers, length = text.split(mark), [], 0
    for index, part in enumerate(parts):
        if index % 2:
            answers.append((length, length + len(part)))
        length += len(part)
    return Rendered("".join(parts), answers)


class _RefusedError(Exception):
    """Raised by a template."""


def _render(special: Mapping[str, Any], jobs: list[dict[str, Any]], mark: str) -> list[str]:
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: its content between two marks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return mark + caller() + mark

    def refuse(reason: str) -> None:
        raise _RefusedError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    tokens = {name: token for name, token in special.items() if name.endswith("_token") and isinstance(token, str)}
    template = environment.from_string(special["chat_template"])
    return [template.render(**job, **tokens) for job in jobs]


def _child() -> None:
    """Renders the jobs on stdin; the texts, or the error, go to stdout as JSON."""
    jobs = json.load(sys.stdin)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    except (ImportError, ValueError, OSError):
        pass  # not on every system
    try:
        result: dict[str, Any] = {"texts": _render(**jobs)}
    except _RefusedError as error:
        result = {"error": f"the chat template refuses these messages: {error}"}
    except Exception as error:  # whatever a template can raise
        result = {"error": f"the chat template fails ({type(error).__name__}: {error})"}
    print(json.dumps(result))


if __name__ == "__main__":
    _child()
