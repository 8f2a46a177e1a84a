"""Converts documents to examples: token ids, and which of them the loss counts. By `data.kind`.

"text": a document is an example, and every token after the first is a target.

"instructions": a record has `messages`, each with a `role` and a `content`, or a `prompt` and its `answer` (or
`completion`); or it is a record of ShareGPT (`conversations` with `from` and `value`) or of Alpaca (`instruction`,
`input`, `output`). What the assistant writes counts.

"preferences": a record has `chosen` and `rejected`, two answers to its `prompt`, and makes two examples in this order;
prompt and answers are text or lists of messages (without a prompt, the messages that both begin with are the prompt);
the answers count.

"labelled" is in `labelled.py`.

A conversation is rendered by the chat template of the tokenizer and tokenized whole; the tokens that overlap the
characters of an answer count. Those characters are what the template's `{% generation %}` blocks mark, or else what an
answer adds to the text that asks for it. A record's `tools` and `documents`, and all fields of its messages, are passed
to the template. If the template renders an answer differently once the conversation goes on, that answer makes an
example of its own, rendered as the last message. Without a template, a prompt is followed at once by its answer,
messages are "role: content" and an empty line each, and EOS follows what the assistant writes.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llm_jax import tokenizers
from llm_jax.errors import UserError
from llm_jax.tokenizers import Tokenizer, chat_template
from llm_jax.tokenizers.chat_template import Rendered
from llm_jax.tokenizers.detokenize import common_prefix

_RECORDS = 256  # records whose conversations are rendered in one process
_SHOWN_FIELDS = ("tool_calls", "reasoning_content")  # fields of messages that a template must show

Span = tuple[int, int]  # begin and end of a range of characters or bytes


class TokenizedExample(NamedTuple):
    """One training sequence.

    Attributes:
      ids: token ids.
      mask: for each token, 1 where the loss counts it; empty where it counts all.
      size: bytes in UTF-8 of the text that counts.
      ends_document: False if another example of the same document follows.
    """

    ids: Sequence[int]
    mask: bytes
    size: int
    ends_document: bool = True


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How the texts of documents become examples.

    Attributes:
      encode: (tokenizer, texts) -> examples, in the order of the texts.
      plain: the text of a document on which a tokenizer is trained.
      masks: whether the loss leaves out some tokens.
      examples: examples of one document; at least so many where a template needs more.
    """

    encode: Callable[[Tokenizer, Iterable[str]], Iterator[TokenizedExample]]
    plain: Callable[[str], str]
    masks: bool
    examples: int = 1


class Conversation(NamedTuple):
    """Messages to render.

    Attributes:
      messages: of the conversation; those of the assistant from index `first` on count.
      first: index of the first message that may count.
      bare: whether prompt and answer are plain text.
      tools, documents: what the record has under these names.
      record: the begin of the record, for messages about errors.
    """

    messages: list[dict[str, Any]]
    first: int
    bare: bool
    tools: list[Any] | None
    documents: list[Any] | None
    record: str

    def answers(self) -> list[int]:
        """Indices of the messages that count."""
        return [i for i, m in enumerate(self.messages) if i >= self.first and m["role"] == "assistant"]


def _documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[TokenizedExample]:
    for text in texts:
        yield TokenizedExample(tokenizers.document(tokenizer, text), b"", len(text.encode()))


# ---------------------------------------------------------------- records to conversations


def _instruction(text: str) -> list[Conversation]:
    record = _record(text)
    if "messages" in record:
        return [_conversation(text, record, _messages(text, record["messages"], "assistant"), 0, False)]
    if "conversations" in record:
        messages = _messages(text, _from_sharegpt(record["conversations"]), "assistant")
        return [_conversation(text, record, messages, 0, False)]
    if "instruction" in record and "output" in record:
        _need(text, record, ("instruction", "output"), "text in 'instruction' and 'output'")
        question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
        messages = _messages(text, question, "user") + _messages(text, record["output"], "assistant")
        return [_conversation(text, record, messages, 1, False)]
    if "completion" in record and "answer" not in record:
        record["answer"] = record["completion"]
    _need(text, record, ("prompt", "answer"), "'messages', or 'prompt' and 'answer'")
    ask, answer = _messages(text, record["prompt"], "user"), _messages(text, record["answer"], "assistant")
    return [_conversation(text, record, ask + answer, len(ask), isinstance(record["prompt"], str))]


_SHAREGPT = {"human": "user", "gpt": "assistant"}  # other names are those of the roles


def _from_sharegpt(turns: Any) -> Any:
    """Turns with "from" and "value" as messages; other values stay as they are."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return turns
    return [{"role": _SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")} for turn in turns]


def _preference(text: str) -> list[Conversation]:
    record = _record(text)
    _need(text, record, ("chosen", "rejected"), "'chosen' and 'rejected', and their 'prompt'")
    prompt = _messages(text, record["prompt"], "user") if record.get("prompt") else []
    answers = [_messages(text, record[name], "assistant") for name in ("chosen", "rejected")]
    shared = 0 if prompt else sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*answers)))  # noqa: B905
    if shared == min(map(len, answers)):
        raise UserError(f"the record {_head(text)}: 'chosen' and 'rejected' are the same answer, or have none")
    bare = isinstance(record.get("prompt", ""), str)
    return [_conversation(text, record, prompt + answer, len(prompt) + shared, bare) for answer in answers]


def _conversation(
    text: str, record: dict[str, Any], messages: list[dict[str, Any]], first: int, bare: bool
) -> Conversation:
    lists = {name: record.get(name) or None for name in ("tools", "documents")}
    for name, value in lists.items():
        if value is not None and not isinstance(value, list):
            raise UserError(f"the record {_head(text)}: '{name}' is no list")
    return Conversation(messages, first, bare, lists["tools"], lists["documents"], _head(text))


def _record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{_head(text)} is no record; this data.kind reads JSON lines, CSV, TSV, Parquet or hf:NAME")
    return record


def _head(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _need(text: str, record: dict[str, Any], names: tuple[str, ...], expected: str) -> None:
    if any(record.get(name) is None for name in names):
        raise UserError(f"the record {_head(text)} has {', '.join(record) or 'no field'}; expected {expected}")


def _messages(text: str, value: Any, role: str) -> list[dict[str, Any]]:
    """Messages from a list of them, or from text that `role` writes."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    valid = isinstance(value, list) and all(isinstance(m, dict) and _is_message(m) for m in value)
    if not valid or (role == "assistant" and not any(m["role"] == "assistant" for m in value)):
        wanted = "one by the assistant" if role == "assistant" else "text"
        raise UserError(f"the record {_head(text)}: expected messages with 'role' and 'content', and {wanted}")
    return [dict(message) for message in value]


def _is_message(message: dict[str, Any]) -> bool:
    """Whether it has a role, and a content: text, a list of parts, or none beside a call of a tool."""
    content = message.get("content")
    parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    called = content is None and bool(message.get("tool_calls"))
    return isinstance(message.get("role"), str) and (isinstance(content, str) or parts or called)


# ---------------------------------------------------------------- conversations to text


class _Text(NamedTuple):
    """A rendered conversation, and the ranges of characters that count."""

    text: str
    answers: list[Span]


def _plain_texts(conversation: Conversation) -> list[_Text]:
    """The conversation without a template, in parts: each but a last one ends with an answer, which EOS follows."""
    c = conversation
    if c.tools or c.documents:
        raise UserError(f"the record {c.record} has tools or documents, and no chat template shows them")
    parts, text, answers = [], "", c.answers()
    for i, message in enumerate(c.messages):
        if field := next((name for name in _SHOWN_FIELDS if message.get(name)), None):
            raise UserError(f"the record {c.record}: no chat template shows '{field}'; leave it out")
        content = _text_of_parts(c, message["content"])
        text += "" if c.bare else f"{message['role']}: "
        begin = len(text)
        text += content
        if i in answers:
            parts.append(_Text(text, [(begin, len(text))]))
            text = ""
        elif not c.bare:
            text += "\n\n"
    return [*parts, _Text(text, [])] if text else parts


def _text_of_parts(conversation: Conversation, content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in content):
        raise UserError(f"the record {conversation.record}: a part of a message is no text")
    return "".join(part["text"] for part in content)


def _templated_texts(special: Any, conversations: Sequence[Conversation]) -> list[list[_Text]]:
    """The texts of each conversation by the chat template; several where answers need texts of their own."""
    conversations = [c._replace(messages=c.messages[: c.answers()[-1] + 1]) for c in conversations]
    marks = "{% generation" in special["chat_template"] or "{%- generation" in special["chat_template"]
    jobs, checks = [], []
    for c in conversations:
        jobs.append(_job(c, len(c.messages), False))
        for i in () if marks else c.answers():
            jobs += [_job(c, i, False), _job(c, i, True), _job(c, i + 1, False)]
        checks.append(_checks(c))
    jobs += [job for some in checks for _, *pair in some for job in pair]
    rendered = iter(chat_template.render_all(special, jobs))
    texts = []
    for c in conversations:
        whole = next(rendered)
        if marks:
            texts.append([_Text(whole.text, _marked(c, whole))])
        else:
            around = [[item.text for item in itertools.islice(rendered, 3)] for _ in c.answers()]
            texts.append(_by_prefixes(c, whole.text, around))
        for message in c.messages:
            if isinstance(message.get("content"), list) and str(message["content"]) in whole.text:
                raise UserError(f"the record {c.record}: the chat template cannot show a content in parts; give text")
    for c, some in zip(conversations, checks, strict=True):
        for field, *_ in some:
            if next(rendered).text == next(rendered).text:
                raise UserError(f"the record {c.record}: the chat template does not show '{field}'; leave it out")
    return texts


def _job(c: Conversation, count: int, answer: bool) -> dict[str, Any]:
    return chat_template.job(c.messages[:count], answer, c.tools, c.documents)


def _checks(c: Conversation) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(field, the job with it, the job without it): the template must render them differently."""
    checks = []
    count = len(c.messages)
    for name, without in (("tools", c._replace(tools=None)), ("documents", c._replace(documents=None))):
        if getattr(c, name):
            checks.append((name, _job(c, count, False), _job(without, count, False)))
    counted = c.answers()
    for i, message in enumerate(c.messages):
        for field in _SHOWN_FIELDS:
            # Templates may leave out the reasoning of earlier turns.
            if message.get(field) and (field == "tool_calls" or i in counted):
                less = {name: value for name, value in message.items() if name != field}
                less["content"] = message.get("content") or ""
                without = c._replace(messages=[*c.messages[:i], less])
                checks.append((field, _job(c, i + 1, False), _job(without, i + 1, False)))
    return checks


def _marked(c: Conversation, whole: Rendered) -> list[Span]:
    """The ranges that the template's `{% generation %}` blocks mark, of the messages that count."""
    by_assistant = [i for i, message in enumerate(c.messages) if message["role"] == "assistant"]
    if not c.first:
        return whole.answers
    if len(whole.answers) != len(by_assistant):
        raise UserError(
            f"the record {c.record}: the chat template marks {len(whole.answers)} answers of {len(by_assistant)} "
            "messages by the assistant; expected one each"
        )
    return [span for span, i in zip(whole.answers, by_assistant, strict=True) if i >= c.first]


def _by_prefixes(c: Conversation, whole: str, around: Sequence[Sequence[str]]) -> list[_Text]:
    """Finds each answer as what it adds to the text before it.

    Args:
      around: for each answer, the conversation before it without and with the begin of an answer, and the one with it.
    """
    texts, spans = [], []
    for before, asked, answered in around:
        if not answered.startswith(before):
            raise UserError(
                f"the record {c.record}: the chat template renders earlier messages differently once an answer "
                "follows, so that the tokens of the answer are unknown; leave all but the last answer out"
            )
        span = (max(len(before), len(common_prefix(asked, answered))), len(answered))
        if whole.startswith(answered):
            spans.append(span)
        else:  # rendered differently when the conversation goes on
            texts.append(_Text(answered, [span]))
    return [*texts, _Text(whole, spans)] if spans else texts


# ---------------------------------------------------------------- texts to examples


def _conversations(
    parse: Callable[[str], list[Conversation]], single: bool = False
) -> Callable[..., Iterator[TokenizedExample]]:
    """The `encode` of an `Encoder`; with `single`, a conversation that needs several examples is refused."""

    def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[TokenizedExample]:
        special = getattr(tokenizer, "special", {})
        texts = iter(texts)
        while conversations := [c for text in itertools.islice(texts, _RECORDS) for c in parse(text)]:
            if special.get("chat_template"):
                for some, conversation in zip(_templated_texts(special, conversations), conversations, strict=True):
                    if single and len(some) > 1:
                        raise UserError(
                            f"the record {conversation.record}: the chat template renders earlier answers differently; "
                            "expected one answer each in 'chosen' and 'rejected'"
                        )
                    for index, text in enumerate(some, 1):
                        yield _templated_example(tokenizer, text)._replace(ends_document=index == len(some))
            else:
                for conversation in conversations:
                    yield _plain_example(tokenizer, _plain_texts(conversation))

    return encode


def _templated_example(tokenizer: Any, text: _Text) -> TokenizedExample:
    ids, offsets = tokenizer.encode_chat(text.text), tokenizer.chat_offsets(text.text)
    size = sum(len(text.text[a:b].encode()) for a, b in text.answers)
    return TokenizedExample(ids, _mask(offsets, text.answers), size)


def _plain_example(tokenizer: Tokenizer, parts: Sequence[_Text]) -> TokenizedExample:
    ids: list[int] = [] if tokenizer.bos is None else [tokenizer.bos]
    mask, size = bytearray(len(ids)), 0
    for text, answers in parts:
        spans = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in answers]
        ids += tokenizer.encode(text)
        mask += _mask(tokenizer.spans(text), spans)
        size += sum(b - a for a, b in spans)
        if answers and tokenizer.eos is not None:
            ids.append(tokenizer.eos)
            mask.append(1)
    return TokenizedExample(ids, bytes(mask), size)


def _mask(offsets: Sequence[Span], answers: Sequence[Span]) -> bytes:
    """1 for every token that overlaps an answer, and for those of no width between them."""
    mask = bytearray(len(offsets))
    for begin, end in answers:
        inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > begin]
        if inside:
            mask[inside[0] : inside[-1] + 1] = b"\1" * (inside[-1] + 1 - inside[0])
    return bytes(mask)


def _as_text(parse: Callable[[str], list[Conversation]]) -> Callable[[str], str]:
    def plain(text: str) -> str:
        fields = ("role", "content")
        for conversation in (conversations := parse(text)):  # a tokenizer is trained on what is written, alone
            for message in conversation.messages:
                for name in [name for name in message if name not in fields]:
                    del message[name]
                message["content"] = message["content"] or ""
        conversations = [c._replace(tools=None, documents=None) for c in conversations]
        return "".join(part.text for c in conversations for part in _plain_texts(c))

    return plain


ENCODERS = {
    "text": Encoder(_documents, str, masks=False),
    "instructions": Encoder(_conversations(_instruction), _as_text(_instruction), masks=True),
    "preferences": Encoder(_conversations(_preference, single=True), _as_text(_preference), masks=True, examples=2),
}
