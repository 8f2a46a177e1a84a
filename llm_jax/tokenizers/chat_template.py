"""Renders conversations to text by the Jinja chat template of a tokenizer.

Templates come with downloaded files, so they are rendered in Jinja's sandbox, in a child process with limited time and
memory. They see what transformers' `apply_chat_template` passes: `messages`, `tools`, `documents` (None where there are
none), `add_generation_prompt` and the special tokens. `{% generation %}` blocks mark what the assistant writes.
"""

import datetime
import json
import math
import os
import pathlib
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax.errors import UserError
from llm_jax.schema import other_libraries
from llm_jax.tokenizers.base import PretrainedTokenizer, Tokenizer

_SECONDS, _BYTES = 10, 2**30  # for each conversation
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
      special: "chat_template" (Jinja source, or {name: source}) and the special tokens that it names ("bos_token",
        ...). Of several templates "tool_use" is taken where there are tools, else "default", as in transformers.
      messages: {"role": "system", "user" or "assistant", "content": text} each.
      answer: whether the text ends with the beginning of an answer (`add_generation_prompt`).
      tools: descriptions of tools that the model may call.
      documents: documents for retrieval-augmented generation.

    Raises:
      UserError: no template, or one that fails, refuses the messages, or takes too long or too much memory.
    """
    return render_all(special, [job(messages, answer, tools, documents)])[0].text


@other_libraries.explain_unknown_keywords
def apply_chat_template(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
) -> list[int]:
    """The token ids of a conversation by the tokenizer's chat template, those of transformers' method of this name.

    Args:
      messages: {"role": "system", "user" or "assistant", "content": text} each.
      add_generation_prompt: whether the ids end with the beginning of an answer.
      tools: descriptions of tools that the model may call.
      documents: documents for retrieval-augmented generation.

    Raises:
      UserError: `messages` is not a list of messages with roles, the tokenizer has no chat template, or see `render`.
    """
    wrong = [m for m in messages if not (isinstance(m, Mapping) and "role" in m)]
    if isinstance(messages, str | Mapping) or wrong:
        shown = repr(messages if isinstance(messages, str | Mapping) else wrong[0])
        raise UserError(
            f"messages: {shown[:60]} is not a message; expected one conversation, a list such as "
            '[{"role": "user", "content": "..."}]'
        )
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise UserError(f"a tokenizer of kind {tokenizer.kind} has no chat template; expected one of a chat model")
    return tokenizer.encode_chat(render(tokenizer.special, messages, add_generation_prompt, tools, documents))


def plain_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation without a template, and of the beginning of an answer.

    It has the form of training data without a template: "role: content" and an empty line each; EOS follows answers.
    """
    ids: list[int] = [] if tokenizer.bos is None else [tokenizer.bos]
    text = ""
    for message in messages:
        text += f"{message['role']}: {message['content']}"
        if message["role"] == "assistant" and tokenizer.eos is not None:
            ids += [*tokenizer.encode(text), tokenizer.eos]
            text = ""
        else:
            text += "\n\n"
    return [*ids, *tokenizer.encode(f"{text}assistant:")]


def job(
    messages: Sequence[Message],
    answer: bool,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    extends: int | None = None,
) -> dict[str, Any]:
    """One conversation for `render_all`: the arguments of `render`.

    Args:
      extends: index of an earlier job whose text this one probably begins with; the child process then sends only what
        follows it.
    """
    return {
        "messages": list(messages),
        "add_generation_prompt": answer,
        "tools": tools or None,
        "documents": documents or None,
        "extends": extends,
        "names": [*(["tool_use"] if tools else []), "default"],  # of templates, the first that exists is taken
    }


def template_of(special: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """The chat template of a job. Raises UserError if there is none, or none of the names that the job takes."""
    templates = special.get("chat_template")
    if not templates:
        raise UserError("this model's tokenizer has no chat template; leave --chat out")
    if isinstance(templates, str):
        return templates
    if name := next((name for name in job["names"] if name in templates), None):
        return templates[name]
    raise UserError(
        f"this model's tokenizer has the chat templates {', '.join(sorted(templates))} and no 'default'; choose one "
        "with --chat_template=NAME, or with tokenizer.chat_template in a configuration"
    )


def render_all(special: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]]) -> list[Rendered]:
    """Renders several conversations in one process. Raises as `render`.

    Args:
      jobs: conversations made by `job`.
    """
    return [checked(rendered) for rendered in render_each(special, jobs)]


def checked(rendered: Rendered | UserError) -> Rendered:
    """A result of `render_each`; raises it if it is an error."""
    if isinstance(rendered, UserError):
        raise rendered
    return rendered


def render_each(
    special: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]]
) -> Generator[Rendered | UserError, None, None]:
    """Yields each conversation, rendered in one process, or the error that the template raised for it.

    The limits of time and memory apply to each conversation.

    Args:
      jobs: conversations made by `job`.

    Raises:
      UserError: no template, or it takes too long or too much memory.
    """
    if not jobs:
        return
    mark = secrets.token_hex(8)  # no template or message contains it
    request, bases = _request(special, jobs, mark), {job["extends"]: "" for job in jobs}
    with tempfile.TemporaryFile("w+") as file:  # unlike a pipe, it can be left unread
        file.write(request)
        file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_jax.tokenizers.chat_template"],
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    timer = threading.Timer(_SECONDS * (1 + len(jobs)), process.kill)  # where the child cannot limit its own time
    timer.daemon = True
    assert process.stdout is not None
    with process:
        timer.start()
        try:
            for index, item in enumerate(jobs):
                if not (line := process.stdout.readline()):
                    raise UserError(
                        "the chat template took too much time or memory, or cannot be rendered in a child process"
                    )
                result = json.loads(line)
                if "error" in result:
                    yield UserError(result["error"])
                    continue
                text = bases[item["extends"]] * result["extends"] + result["text"]
                if index in bases:
                    bases[index] = text
                yield _rendered(text, mark)
        finally:
            timer.cancel()
            process.kill()


def _request(special: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]], mark: str) -> str:
    """The input of the child process. Jobs share messages and templates, so each is sent once."""
    values: list[Any] = []
    indices: dict[int, int] = {}

    def index(value: Any) -> int:
        if id(value) not in indices:
            indices[id(value)] = len(values)
            values.append(value)
        return indices[id(value)]

    packed = [
        dict(item)
        | {"messages": [index(message) for message in item["messages"]]}
        | {name: None if item[name] is None else index(item[name]) for name in ("tools", "documents")}
        | {"names": index(template_of(special, item))}
        for item in jobs
    ]
    tokens = {name: token for name, token in special.items() if name.endswith("_token") and isinstance(token, str)}
    return json.dumps({"tokens": tokens, "mark": mark, "seconds": _SECONDS, "values": values, "jobs": packed})


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


def _compiled(template: str, mark: str) -> Callable[..., str]:
    """The template as a function of what it sees; `mark` is put around `{% generation %}` blocks."""
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
    return environment.from_string(template).render


def _child() -> None:
    """Renders the jobs on stdin; for each, a line of JSON with its text or the error goes to stdout."""
    text = sys.stdin.read()
    request = json.loads(text)
    _limit("RLIMIT_AS", _BYTES + 8 * len(text))
    values, jobs = request["values"], request["jobs"]
    bases = {job["extends"]: "" for job in jobs}
    templates: dict[int, Callable[..., str]] = {}
    for index, job in enumerate(jobs):
        _limit("RLIMIT_CPU", math.ceil(time.process_time()) + request["seconds"])
        for name in ("tools", "documents"):
            job[name] = None if job[name] is None else values[job[name]]
        base, template = bases[job.pop("extends")], job.pop("names")
        try:
            if template not in templates:
                templates[template] = _compiled(values[template], request["mark"])
            messages = [values[i] for i in job["messages"]]
            text = templates[template](**request["tokens"] | job | {"messages": messages})
        except _RefusedError as error:
            result: dict[str, Any] = {"error": f"the chat template refuses these messages: {error}"}
        except Exception as error:  # a template may raise any exception
            result = {"error": f"the chat template fails ({type(error).__name__}: {error})"}
        else:
            extends = bool(base) and text.startswith(base)
            result = {"text": text[len(base) :] if extends else text, "extends": extends}
            if index in bases:
                bases[index] = text
        print(json.dumps(result), flush=True)


def _limit(name: str, value: int) -> None:
    """Lowers or raises a soft limit of this process, on systems that have it."""
    try:
        import resource

        resource.setrlimit(getattr(resource, name), (value, resource.getrlimit(getattr(resource, name))[1]))
    except (ImportError, AttributeError, ValueError, OSError):
        pass


if __name__ == "__main__":
    _child()
