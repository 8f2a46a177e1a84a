"""Documents to examples: token ids, and which of them the loss counts. By `data.kind`.

"text": a document is an example, and every token after its first counts.

"instructions": a record holds `messages`, each with a `role` and a `content`, or a `prompt` and its `answer`;
what the assistant says counts. "preferences": a record holds `chosen` and `rejected`, two answers to its
`prompt`, and makes two examples in this order; prompt and answers are text or lists of messages (without a
prompt, the messages that both begin with are it); the answer counts.

Conversations are written by the chat template of the tokenizer. Without one, a prompt is followed at once by
its answer, and messages are "role: content" and an empty line each; EOS follows what the assistant says.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llm_jax import tokenizers
from llm_jax.errors import UserError
from llm_jax.tokenizers import Tokenizer, chat

_AT_ONCE = 256  # records whose conversations are written together


class Example(NamedTuple):
    """A sequence of its own.

    Attributes:
      ids: token ids.
      mask: 1 where a token counts as a target, by position; empty where all do.
      size: bytes in UTF-8 of the text that counts.
    """

    ids: Sequence[int]
    mask: bytes
    size: int


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How the texts of documents become examples.

    Attributes:
      encode: (tokenizer, texts) -> `examples` examples of each text, in the order of the texts.
      plain: the text of a document as a tokenizer is trained on it.
      masks: whether some tokens do not count.
      examples: of one document.
    """

    encode: Callable[[Tokenizer, Iterable[str]], Iterator[Example]]
    plain: Callable[[str], str]
    masks: bool
    examples: int = 1


class Conversation(NamedTuple):
    """Messages, of which those of the assistant count, from `first` on; `bare`: a prompt and its answer."""

    messages: list[dict[str, str]]
    first: int
    bare: bool


Segment = tuple[str, bool]  # text, and whether it counts


def _documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Example]:
    for text in texts:
        yield Example(tokenizers.document(tokenizer, text), b"", len(text.encode()))


# ---------------------------------------------------------------- records to conversations


def _instruction(text: str) -> list[Conversation]:
    record = _record(text)
    if "messages" in record:
        return [Conversation(_messages(text, record["messages"], "assistant"), 0, False)]
    _need(text, record, ("prompt", "answer"), "'messages', or 'prompt' and 'answer'")
    ask, answer = _messages(text, record["prompt"], "user"), _messages(text, record["answer"], "assistant")
    return [Conversation(ask + answer, len(ask), isinstance(record["prompt"], str))]


def _preference(text: str) -> list[Conversation]:
    record = _record(text)
    _need(text, record, ("chosen", "rejected"), "'chosen' and 'rejected', and their 'prompt'")
    ask = _messages(text, record["prompt"], "user") if record.get("prompt") else []
    answers = [_messages(text, record[name], "assistant") for name in ("chosen", "rejected")]
    shared = 0 if ask else sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*answers)))  # noqa: B905
    if shared == min(map(len, answers)):
        raise UserError(f"the record {_head(text)}: 'chosen' and 'rejected' are the same answer, or have none")
    return [Conversation(ask + a, len(ask) + shared, isinstance(record.get("prompt", ""), str)) for a in answers]


def _record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{_head(text)} is no record; this data.kind reads JSON lines, Parquet or hf:NAME")
    return record


def _head(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _need(text: str, record: dict[str, Any], names: tuple[str, ...], expected: str) -> None:
    if any(record.get(name) is None for name in names):
        raise UserError(f"the record {_head(text)} has {', '.join(record) or 'no field'}; expected {expected}")


def _messages(text: str, value: Any, role: str) -> list[dict[str, str]]:
    """Messages from a list of them, or from the text that `role` says."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    whole = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not whole or (role == "assistant" and not any(m["role"] == "assistant" for m in value)):
        wanted = "one by the assistant" if role == "assistant" else "text"
        raise UserError(f"the record {_head(text)}: expected messages with 'role' and 'content', and {wanted}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


# ---------------------------------------------------------------- conversations to examples


def _counts(conversation: Conversation, index: int) -> bool:
    return index >= conversation.first and conversation.messages[index]["role"] == "assistant"


def _plainly(conversation: Conversation) -> list[Segment]:
    if conversation.bare:
        return [(m["content"], _counts(conversation, i)) for i, m in enumerate(conversation.messages)]
    found: list[Segment] = []
    for i, message in enumerate(conversation.messages):
        counts = _counts(conversation, i)
        found += [(f"{message['role']}: ", False), (message["content"], counts), ("" if counts else "\n\n", False)]
    return found


def _by_template(special: Any, conversations: Sequence[Conversation]) -> list[list[Segment]]:
    """What is new in the text when an answer is added to what asks for it counts."""
    answers = [[i for i in range(len(c.messages)) if _counts(c, i)] for c in conversations]
    places = [(c, i) for c, ends in zip(conversations, answers, strict=True) for i in ends]
    before = chat.render_all(special, [c.messages[:i] for c, i in places], answer=True)
    after = chat.render_all(special, [c.messages[: i + 1] for c, i in places], answer=False)
    rendered = zip(before, after, strict=True)
    found = []
    for ends in answers:
        segments: list[Segment] = []
        done = ""
        for asked, answered in itertools.islice(rendered, len(ends)):
            if not (asked.startswith(done) and answered.startswith(asked)):
                raise UserError(
                    "the chat template writes what was said before in another way when the conversation goes on, so "
                    "that it cannot be said which tokens are the answer; leave all but the last answer out"
                )
            segments += [(asked[len(done) :], False), (answered[len(asked) :], True)]
            done = answered
        found.append(segments)
    return found


def _conversations(parse: Callable[[str], list[Conversation]]) -> Callable[..., Iterator[Example]]:
    def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Example]:
        special = getattr(tokenizer, "special", {})
        texts = iter(texts)
        while some := [c for text in itertools.islice(texts, _AT_ONCE) for c in parse(text)]:
            if special.get("chat_template"):
                for segments in _by_template(special, some):
                    yield _example([], segments, tokenizer.encode_chat, None)  # type: ignore[attr-defined]
            else:
                begin = [] if tokenizer.bos is None else [tokenizer.bos]
                for conversation in some:
                    yield _example(begin, _plainly(conversation), tokenizer.encode, tokenizer.eos)

    return encode


def _example(begin: list[int], segments: list[Segment], encode: Callable[[str], list[int]], end: int | None) -> Example:
    ids, mask, size = list(begin), bytearray(len(begin)), 0
    for text, counts in segments:
        new = encode(text) + ([end] if counts and end is not None else []) if text or counts else []
        ids += new
        mask += bytes([counts]) * len(new)
        size += len(text.encode()) * counts
    return Example(ids, bytes(mask), size)


def _as_text(parse: Callable[[str], list[Conversation]]) -> Callable[[str], str]:
    return lambda text: "".join(segment for c in parse(text) for segment, _ in _plainly(c))


ENCODERS = {
    "text": Encoder(_documents, str, masks=False),
    "instructions": Encoder(_conversations(_instruction), _as_text(_instruction), masks=True),
    "preferences": Encoder(_conversations(_preference), _as_text(_preference), masks=True, examples=2),
}
