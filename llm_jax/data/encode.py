"""Converts documents to examples: token ids, and which of them the loss counts. By `data.kind`.

"text": a document is an example, and every token after the first is a target.

"instructions": a record has `messages`, each with a `role` and a `content`, or a `prompt` and its `answer` (or
`completion`; or `question` and `answer`, or `query` and `response`, without a `context`); or it is a record of ShareGPT
(`conversations` with `from` and `value`) or of Alpaca (`instruction`, `input`, `output`, `history`). A field
`system` is the first message. The loss counts the messages of the assistant, except those whose field `weight`,
`train`, `trainable`, `loss` or `loss_mask` is 0 or false.

"preferences": a record has a `prompt` and two answers, `chosen` and `rejected`, and gives two examples in this order.
Prompt and answers are text or lists of messages; if there is no prompt, or both answers repeat it, their common first
messages are the prompt. The loss counts the answers.

"labelled" is in `labelled.py`.

The chat template of the tokenizer renders a conversation, which is tokenized as a whole. The loss counts the tokens
that overlap the characters of an answer: the characters in the template's `{% generation %}` blocks, or, without such
blocks, the text that the answer adds to the preceding conversation. The template receives `tools` and `documents` of
the record and all fields of the messages. If the template renders an answer differently when more messages follow, the
answer becomes a separate example, rendered as the last message. Without a template, an answer directly follows its
prompt, messages are written as "role: content" and an empty line, and EOS follows every answer.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax import tokenizers
from llm_jax.data.chat_text import COUNTS, ChatText, Conversation, Span, plain_texts, templated_texts
from llm_jax.errors import UserError
from llm_jax.tokenizers import Tokenizer

# Records whose conversations are rendered in one process, and characters after which another one is started.
_RECORDS, _CHARACTERS = 256, 2**22


class TokenizedExample(NamedTuple):
    """One training sequence.

    Attributes:
      ids: token ids.
      mask: 1 for each token that the loss counts, else 0; empty if the loss counts all tokens.
      size: bytes in UTF-8 of the counted text.
      ends_document: False if another example of the same document follows.
    """

    ids: Sequence[int]
    mask: bytes
    size: int
    ends_document: bool = True


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Converts the texts of documents to examples.

    Attributes:
      encode: (tokenizer, texts) -> examples, in the order of the texts.
      plain: the text of a document on which a tokenizer is trained.
      masks: whether the loss ignores some tokens.
      examples: number of examples of one document; a template may need more.
    """

    encode: Callable[[Tokenizer, Iterable[str]], Iterator[TokenizedExample]]
    plain: Callable[[str], str]
    masks: bool
    examples: int = 1


def _documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[TokenizedExample]:
    for text in texts:
        yield TokenizedExample(tokenizers.document(tokenizer, text), b"", len(text.encode()))


# ---------------------------------------------------------------- records to conversations


def _instruction(text: str) -> list[Conversation]:
    record = _record(text)
    is_undesirable = str(record.get("label")).lower() in ("false", "0", "0.0")  # CSV and TSV files hold text
    if is_undesirable and "text" not in record:
        raise UserError(
            f"the record {_head(text)}: 'label' is {record['label']!r}: a rejected answer; leave such "
            "records out, or make pairs of 'chosen' and 'rejected' for data.kind=preferences"
        )
    for name in ("messages", "conversations"):
        if name in record:
            turns = _from_sharegpt(_parsed(text, name, record[name]))
            messages = [*_system(text, record), *_messages(text, turns, "assistant")]
            return [_conversation(text, record, messages, 0, False)]
    if "instruction" in record and "output" in record:
        _need(text, record, ("instruction", "output"), "text in 'instruction' and 'output'")
        question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
        messages = [*_system(text, record), *_history(text, record)]
        messages += _messages(text, question, "user") + _messages(text, record["output"], "assistant")
        return [_conversation(text, record, messages, 0, False)]
    record |= _prompt_and_answer(record)
    _need(text, record, ("prompt", "answer"), _INSTRUCTIONS)
    system = _system(text, record)
    prompt = system + _messages(text, record["prompt"], "user")
    answer = _messages(text, record["answer"], "assistant")
    return [_conversation(text, record, prompt + answer, len(prompt), isinstance(record["prompt"], str) and not system)]


# The fields of `_instruction`, for messages.
_INSTRUCTIONS = (
    "the fields 'messages'; 'conversations'; 'instruction' and 'output'; 'prompt' and 'answer' (or 'completion'); "
    "'question' and 'answer'; or 'query' and 'response'"
)
# Fields of a record -> the kind of data whose records have them, the first that fits.
_KINDS = (
    (("chosen", "rejected"), "preferences"),
    (("messages",), "instructions"),
    (("conversations",), "instructions"),
    (("instruction", "output"), "instructions"),
    (("prompt", "answer"), "instructions"),
    (("prompt", "completion"), "instructions"),
    (("question", "answer"), "instructions"),
    (("query", "response"), "instructions"),
    (("text", "label"), "labelled"),
    (("text",), "text"),
)
# Other names of 'prompt' and 'answer'.
_PAIRS = (("prompt", "completion"), ("question", "answer"), ("query", "response"))


def _prompt_and_answer(record: dict[str, Any]) -> dict[str, Any]:
    """`prompt` and `answer` of a record that has them under other names; {} if the names are ambiguous."""
    if {"prompt", "answer"} <= record.keys():
        return {}
    pairs = [pair for pair in _PAIRS if set(pair) <= record.keys()]
    if len(pairs) != 1 or (pairs[0][0] != "prompt" and ("prompt" in record or record.get("context"))):
        return {}
    return dict(zip(("prompt", "answer"), (record[name] for name in pairs[0]), strict=True))


_SHAREGPT = {"human": "user", "gpt": "assistant"}  # other names are those of the roles


def _from_sharegpt(turns: list[Any]) -> list[Any]:
    """Turns with "from" and "value" as messages; other values stay as they are."""
    if not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return turns
    messages = []
    for turn in turns:
        others = {name: value for name, value in turn.items() if name not in ("from", "value")}
        role, content = _SHAREGPT.get(turn["from"], turn["from"]), turn.get("value")
        messages.append({"role": role, "content": content} | others)
    return messages


def _parsed(text: str, name: str, value: Any) -> list[Any]:
    """Returns a list; tables and CSV files contain it as JSON text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise UserError(f"the record {_head(text)}: '{name}' is not a list")
    return value


def _system(text: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The system message of a record with a separate field for it, as a list of at most one message."""
    return _messages(text, record["system"], "system") if record.get("system") else []


def _history(text: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns before the instruction of an Alpaca record, from its pairs of a question and an answer."""
    pairs = _parsed(text, "history", record.get("history") or [])
    if not all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs):
        raise UserError(f"the record {_head(text)}: expected 'history' as pairs of a question and its answer")
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _preference(text: str) -> list[Conversation]:
    record = _record(text)
    _need(text, record, ("chosen", "rejected"), "'chosen' and 'rejected', and their 'prompt'", "preferences")
    prompt = _messages(text, record["prompt"], "user") if record.get("prompt") else []
    answers = [_messages(text, record[name], "assistant") for name in ("chosen", "rejected")]
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*answers)))  # noqa: B905
    first = [next((m["role"] for m in answer if m["role"] != "system"), "") for answer in answers]
    if prompt and "user" in first:  # whole conversations, which have the prompt as well
        if not all(message in answers[0][:shared] for message in prompt):
            raise UserError(
                f"the record {_head(text)}: 'prompt' is not that of the conversations in 'chosen' and 'rejected'; give "
                "the same prompt in all three, or only the answers in 'chosen' and 'rejected'"
            )
        prompt = []
    shared = 0 if prompt else shared
    if shared == min(map(len, answers)):
        raise UserError(f"the record {_head(text)}: 'chosen' and 'rejected' are the same answer, or have none")
    system = _system(text, record)
    bare = isinstance(record.get("prompt", ""), str) and not shared and not system
    before, first_answer = system + prompt, len(system) + len(prompt) + shared
    return [_conversation(text, record, before + answer, first_answer, bare) for answer in answers]


def _conversation(
    text: str, record: dict[str, Any], messages: list[dict[str, Any]], first: int, bare: bool
) -> Conversation:
    tools, documents = (
        _parsed(text, name, record[name]) or None if record.get(name) else None for name in ("tools", "documents")
    )
    for flag, value in ((flag, message[flag]) for message in messages for flag in COUNTS if flag in message):
        if value not in (0, 1, None):
            raise UserError(f"the record {_head(text)}: '{flag}' of a message is {value!r}; expected 0 or 1")
    conversation = Conversation(messages, first, bare, tools, documents, _head(text))
    if not conversation.answers():
        raise UserError(f"the record {_head(text)}: the loss counts no message of the assistant; remove the record")
    return conversation


def _record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(
            f"{_head(text)} is not a record; this data.kind reads JSON lines, CSV, TSV, Parquet or hf:NAME; plain text "
            "needs data.kind=text"
        )
    return record


def _head(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _need(text: str, record: dict[str, Any], names: tuple[str, ...], expected: str, kind: str = "instructions") -> None:
    if any(record.get(name) is None for name in names):
        matching = (other for fields, other in _KINDS if all(record.get(name) is not None for name in fields))
        other = next(matching, kind)
        cure = f"; did you mean data.kind={other}?" if other != kind else ""
        raise UserError(f"the record {_head(text)} has {', '.join(record) or 'no field'}; expected {expected}{cure}")


def _messages(text: str, value: Any, role: str) -> list[dict[str, Any]]:
    """Messages from a list of them, or from text that `role` writes."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    expected = "expected messages with 'role' and 'content'"
    if not isinstance(value, list):
        raise UserError(f"the record {_head(text)}: {expected}, or text, not {type(value).__name__}")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not _is_message(message):
            raise UserError(f"the record {_head(text)}: {expected}, and message {index} is {_head(str(message))}")
    roles = dict.fromkeys(message["role"] for message in value)
    if role == "assistant" and role not in roles:
        names = f"the roles are {', '.join(map(repr, roles))}" if roles else "it has no messages"
        raise UserError(f"the record {_head(text)}: {expected}, and one with the role 'assistant'; {names}")
    return [dict(message) for message in value]


def _is_message(message: dict[str, Any]) -> bool:
    """Whether a message has a role and a content: text, a list of parts, or None if it calls a tool."""
    content = message.get("content")
    parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    called = content is None and bool(message.get("tool_calls"))
    return isinstance(message.get("role"), str) and (isinstance(content, str) or parts or called)


# ---------------------------------------------------------------- texts to examples


def _conversations(
    parse: Callable[[str], list[Conversation]], single: bool = False
) -> Callable[..., Iterator[TokenizedExample]]:
    """The `encode` of an `Encoder`; with `single`, a conversation that needs several examples is refused."""

    def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[TokenizedExample]:
        special = getattr(tokenizer, "special", {})
        for batch in _batches(texts):
            conversations = [c for text in batch for c in parse(text)]
            if not special.get("chat_template"):
                for conversation in conversations:
                    yield plain_example(tokenizer, plain_texts(conversation))
                continue
            rendered = templated_texts(special, conversations)
            for conversation, chat_texts in zip(conversations, rendered, strict=True):
                if single and len(chat_texts) > 1:
                    raise UserError(
                        f"the record {conversation.record}: the chat template renders earlier answers differently; "
                        "expected one answer each in 'chosen' and 'rejected'"
                    )
                for index, text in enumerate(chat_texts, 1):
                    yield templated_example(tokenizer, text)._replace(ends_document=index == len(chat_texts))

    return encode


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == _RECORDS or size > _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def templated_example(tokenizer: Any, text: ChatText) -> TokenizedExample:
    """The tokens of a rendered text; the loss counts tokens that overlap an answer."""
    ids, offsets = tokenizer.encode_chat(text.text), tokenizer.chat_offsets(text.text)
    size = sum(len(text.text[a:b].encode()) for a, b in text.answers)
    return TokenizedExample(ids, _mask(offsets, text.answers), size)


def plain_example(tokenizer: Tokenizer, parts: Sequence[ChatText]) -> TokenizedExample:
    """The tokens of a text in parts: EOS, which counts, follows each part with an answer."""
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
    """Returns 1 for every token that overlaps an answer, and for tokens of width 0 between such tokens, else 0."""
    mask = np.zeros(len(offsets), np.uint8)
    first, last = np.asarray(offsets, np.int64).reshape(-1, 2).T
    for begin, end in answers:
        inside = np.flatnonzero((first < end) & (last > begin))
        if len(inside):
            mask[inside[0] : inside[-1] + 1] = 1
    return mask.tobytes()


def _as_text(parse: Callable[[str], list[Conversation]]) -> Callable[[str], str]:
    def plain(text: str) -> str:
        fields = ("role", "content")
        for conversation in (conversations := parse(text)):  # a tokenizer is trained on what is written, alone
            for message in conversation.messages:
                for name in [name for name in message if name not in fields]:
                    del message[name]
                message["content"] = message["content"] or ""
        conversations = [c._replace(tools=None, documents=None) for c in conversations]
        return "".join(part.text for c in conversations for part in plain_texts(c))

    return plain


ENCODERS = {
    "text": Encoder(_documents, str, masks=False),
    "instructions": Encoder(_conversations(_instruction), _as_text(_instruction), masks=True),
    "preferences": Encoder(_conversations(_preference, single=True), _as_text(_preference), masks=True, examples=2),
}
