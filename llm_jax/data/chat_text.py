"""Conversations as text, with the ranges of characters that the loss counts.

With a chat template, the text of an answer is the text that it adds to the preceding conversation. Rendering the whole
preceding conversation for every answer takes quadratic time, so each answer is first rendered after the first answer
only (a "window"), and the parts are concatenated. If the result differs from the text of the whole conversation, the
template renders messages differently by position, and every answer is rendered after the whole preceding conversation.
"""

import bisect
import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llm_jax.errors import UserError
from llm_jax.tokenizers import chat_template
from llm_jax.tokenizers.chat_template import Rendered
from llm_jax.tokenizers.detokenize import common_prefix

COUNTS = (
    "weight",
    "train",
    "trainable",
    "loss",
    "loss_mask",
)  # fields of messages; 0 excludes the message from the loss
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")  # the tag around generated text
_SHOWN_FIELDS = ("tool_calls", "reasoning_content")  # fields of messages that a template must show
_PARTS = "the chat template cannot show a content in parts; give text"

Message = dict[str, Any]
Span = tuple[int, int]  # begin and end of a range of characters or bytes


class Conversation(NamedTuple):
    """Messages to render.

    Attributes:
      messages: the messages; the loss counts messages of the assistant from index `first` on.
      first: index of the first message that the loss may count; a field of `COUNTS` with the value 0 excludes a
        message.
      bare: whether prompt and answer are plain text.
      tools, documents: the values of these keys of the record.
      record: the beginning of the record, for error messages.
    """

    messages: list[dict[str, Any]]
    first: int
    bare: bool
    tools: list[Any] | None
    documents: list[Any] | None
    record: str

    def answers(self) -> list[int]:
        """Indices of the messages that the loss counts."""
        return [i for i in self.by_assistant() if i >= self.first and not self._left_out(i)]

    def by_assistant(self) -> list[int]:
        """Indices of the messages by the assistant."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def _left_out(self, index: int) -> bool:
        return any(self.messages[index].get(flag, 1) in (0, False) for flag in COUNTS)


class ChatText(NamedTuple):
    """A rendered conversation and the ranges of characters that the loss counts."""

    text: str
    answers: list[Span]


def plain_texts(conversation: Conversation) -> list[ChatText]:
    """Returns the conversation without a template, in parts that end with an answer, except perhaps the last part."""
    c = conversation
    if c.tools or c.documents:
        raise UserError(f"the record {c.record} has tools or documents, which need a chat template")
    parts, text, answers = [], "", c.answers()
    for i, message in enumerate(c.messages):
        if field := next((name for name in _SHOWN_FIELDS if message.get(name)), None):
            raise UserError(f"the record {c.record}: '{field}' needs a chat template; omit it")
        content = _text_of_parts(c, message["content"])
        text += "" if c.bare else f"{message['role']}: "
        begin = len(text)
        text += content
        if i in answers:
            parts.append(ChatText(text, [(begin, len(text))]))
            text = ""
        elif not c.bare:
            text += "\n\n"
    return [*parts, ChatText(text, [])] if text else parts


def _text_of_parts(conversation: Conversation, content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in content):
        raise UserError(f"the record {conversation.record}: a part of a message is not text")
    return "".join(part["text"] for part in content)


def templated_texts(special: Any, conversations: Sequence[Conversation]) -> list[list[ChatText]]:
    """Renders each conversation by the chat template, as several texts if answers must be rendered separately.

    Args:
      special: as for `chat_template.render`.

    Raises:
      UserError: as `chat_template.render`; the template does not show a part of a conversation; or an answer cannot be
        told from the messages before it.
    """
    conversations = [c._replace(messages=c.messages[: c.answers()[-1] + 1]) for c in conversations]
    requests: list[_Request] = []
    jobs: list[dict[str, Any]] = []
    for c in conversations:
        template = chat_template.template_of(special, _job(c, c.messages))
        marks = bool(_GENERATION.search(template))
        requests.append(_Request(c, marks, [] if marks else _windows(c, len(jobs)), _checks(c)))
        jobs += [
            _job(c, c.messages),
            *requests[-1].windows,
            *(job for check in requests[-1].checks for job in check.jobs),
        ]
    texts: list[list[ChatText]] = []
    unclear: list[tuple[int, Conversation, str]] = []  # conversations whose windows do not make up their text
    hidden: list[_Check] = []  # fields that a window does not show
    with contextlib.closing(chat_template.render_each(special, jobs)) as rendered:
        for request in requests:
            c, whole = request.conversation, _whole(request.conversation, next(rendered))
            windows = list(itertools.islice(rendered, len(request.windows)))
            spans = _marked(c, whole) if request.marks else _by_windows(c, whole.text, windows)
            if spans is None:
                unclear.append((len(texts), c, whole.text))
            texts.append([ChatText(whole.text, spans or [])])
            for message in c.messages:
                if isinstance(message.get("content"), list) and str(message["content"]) in whole.text:
                    raise UserError(f"the record {c.record}: {_PARTS}")
            for check in request.checks:
                pair = list(itertools.islice(rendered, 2))
                if any(isinstance(text, UserError) for text in pair) or pair[0] == pair[1]:
                    hidden.append(check)
    separate = _by_prefixes(special, [(c, text) for _, c, text in unclear])
    for (index, *_), answers in zip(unclear, separate, strict=True):
        texts[index] = answers
    _check_shown(special, hidden)
    return texts


def _whole(c: Conversation, rendered: Rendered | UserError) -> Rendered:
    """The text of the whole conversation. Raises UserError if the template fails, with the record."""
    if isinstance(rendered, UserError):
        has_parts = any(isinstance(message.get("content"), list) for message in c.messages)
        raise UserError(f"the record {c.record}: {f'{_PARTS} ({rendered})' if has_parts else rendered}")
    return rendered


class _Check(NamedTuple):
    """A field that a template must show: two jobs with and without it, whose texts must differ.

    Attributes:
      jobs: of a window.
      prefixes: of the whole conversation up to the message.
    """

    record: str
    field: str
    jobs: list[dict[str, Any]]
    prefixes: list[dict[str, Any]]


class _Request(NamedTuple):
    """The parts of a conversation that are rendered in addition to the whole.

    Attributes:
      marks: whether the template marks answers by `{% generation %}` blocks.
    """

    conversation: Conversation
    marks: bool
    windows: list[dict[str, Any]]
    checks: list[_Check]


def _job(c: Conversation, messages: Sequence[Message], answer: bool = False, extends: int | None = None) -> Any:
    return chat_template.job(messages, answer, c.tools, c.documents, extends)


def _window(c: Conversation, index: int) -> list[Message]:
    """The first answer and the messages before it, then message `index` and those since the answer before it."""
    answers = c.answers()
    if (k := bisect.bisect_left(answers, index)) == 0:
        return c.messages[: index + 1]
    return [*c.messages[: answers[0] + 1], *c.messages[answers[k - 1] + 1 : index + 1]]


def _windows(c: Conversation, first: int) -> list[dict[str, Any]]:
    """For each answer its window without it, with the beginning of an answer, and with it; then the prefixes that test
    the windows: the conversation before some of the answers, without and with the beginning of an answer.

    Args:
      first: index of the job of the whole conversation, which these follow.
    """
    jobs = []
    for k, index in enumerate(c.answers()):
        window, extends = _window(c, index), first + 3 if k else None  # the third of these jobs has the first answer
        jobs += [
            _job(c, window[:-1], False, extends),
            _job(c, window[:-1], True, extends),
            _job(c, window, False, extends),
        ]
    for k in _tested(c):
        jobs += [_job(c, c.messages[: c.answers()[k]], answer) for answer in (False, True)]
    return jobs


def _tested(c: Conversation) -> list[int]:
    """The answers whose windows are compared with the conversation before them. The first two are not cut."""
    count = len(c.answers())
    return [count // 2, count - 1] if count > 2 else []


def _by_windows(c: Conversation, whole: str, rendered: Sequence[Rendered | UserError]) -> list[Span] | None:
    """The ranges of the answers in `whole`, from the jobs of `_windows`; None where windows do not make up `whole`."""
    texts = [item.text for item in rendered if isinstance(item, Rendered)]
    if len(texts) < len(rendered):
        return None
    count, first, length = 3 * len(c.answers()), "", 0
    spans: list[Span] = []
    for before, asked, answered in _groups(texts[:count], 3):
        if not (before.startswith(first) and answered.startswith(before)):
            return None
        if not whole.startswith(answered[len(first) :], length):
            return None
        shift = length - len(first)
        spans.append((shift + _begin(before, asked, answered), shift + len(answered)))
        first, length = first or answered, spans[-1][1]
    for k, (before, asked) in zip(_tested(c), _groups(texts[count:], 2), strict=True):
        answered = whole[: spans[k][1]]
        if not answered.startswith(before) or _begin(before, asked, answered) != spans[k][0]:
            return None
    return spans if length == len(whole) else None


def _groups(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Consecutive items, `size` at a time."""
    return zip(*[iter(items)] * size, strict=True)


def _begin(before: str, asked: str, answered: str) -> int:
    """The position at which an answer begins: the end of the common prefix with the text that precedes the answer."""
    shared = len(asked) if answered.startswith(asked) else len(common_prefix(asked, answered))
    return max(len(before), shared)


def _by_prefixes(special: Any, conversations: Sequence[tuple[Conversation, str]]) -> list[list[ChatText]]:
    """Finds each answer as the text that it adds to the preceding conversation.

    Args:
      conversations: (conversation, text of the whole conversation) pairs.
    """
    jobs: list[dict[str, Any]] = []
    for c, _ in conversations:
        for k, i in enumerate(c.answers()):
            begin = len(jobs)
            jobs += [
                _job(c, c.messages[:i], False, begin - 1 if k else None),
                _job(c, c.messages[:i], True, begin),
                _job(c, c.messages[: i + 1], False, begin),
            ]
    with contextlib.closing(chat_template.render_each(special, jobs)) as rendered:
        return [_prefix_texts(c, whole, itertools.islice(rendered, 3 * len(c.answers()))) for c, whole in conversations]


def _prefix_texts(c: Conversation, whole: str, rendered: Iterable[Rendered | UserError]) -> list[ChatText]:
    """The texts of a conversation, from its text before each answer, with its beginning, and with the answer."""
    texts, spans = [], []
    for group in _groups(rendered, 3):
        before, asked, answered = (chat_template.checked(item).text for item in group)
        if not answered.startswith(before):
            raise UserError(
                f"the record {c.record}: the chat template renders earlier messages differently once an answer "
                "follows, so that the tokens of the answer are unknown; leave all but the last answer out"
            )
        span = (_begin(before, asked, answered), len(answered))
        if whole.startswith(answered):
            spans.append(span)
        else:  # rendered differently if more messages follow
            texts.append(ChatText(answered, [span]))
    return [*texts, ChatText(whole, spans)] if spans else texts


def _checks(c: Conversation) -> list[_Check]:
    """The fields of a conversation that the template must show."""
    checks = []
    for field in ("tools", "documents"):
        if getattr(c, field):
            jobs = [_job(c, c.messages), _job(c, c.messages) | {field: None}]  # by the same template
            checks.append(_Check(c.record, field, jobs, jobs))
    counted = c.answers()
    for i, message in enumerate(c.messages):
        for field in _SHOWN_FIELDS:
            # Templates may omit the reasoning of earlier turns.
            if message.get(field) and (field == "tool_calls" or i in counted):
                less = {name: value for name, value in message.items() if name != field}
                less["content"] = message.get("content") or ""
                window, prefix = (
                    [_job(c, messages), _job(c, [*messages[:-1], less])]
                    for messages in (_window(c, i), c.messages[: i + 1])
                )
                checks.append(_Check(c.record, field, window, prefix))
    return checks


def _check_shown(special: Any, checks: Sequence[_Check]) -> None:
    """Raises UserError for a field that the template does not show."""
    jobs = [job for check in checks for job in check.prefixes]
    with contextlib.closing(chat_template.render_each(special, jobs)) as rendered:
        for check in checks:
            shown, left_out = (chat_template.checked(item) for item in itertools.islice(rendered, 2))
            if shown == left_out:
                raise UserError(
                    f"the record {check.record}: the chat template does not show '{check.field}'; leave it out"
                )


def _marked(c: Conversation, whole: Rendered) -> list[Span]:
    """The ranges of counted messages that the template marks with `{% generation %}` blocks."""
    by_assistant, counted = c.by_assistant(), c.answers()
    if counted == by_assistant:
        return whole.answers
    if len(whole.answers) != len(by_assistant):
        raise UserError(
            f"the record {c.record}: the chat template marks {len(whole.answers)} answers of {len(by_assistant)} "
            "messages by the assistant; expected one each"
        )
    return [span for span, i in zip(whole.answers, by_assistant, strict=True) if i in counted]
