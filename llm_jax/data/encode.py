"""Documents as examples: token ids, and which of them are targets of the loss, by `data.kind`.

"text": a document is an example, and every token after the first is a target.

"instructions": a record has `messages`, each with a `role` and a `content`, or a `prompt` and an `answer` (or
`completion`); or it is a record of ShareGPT (`conversations` with `from` and `value`) or of Alpaca (`instruction`,
`input`, `output`). The targets are the messages of the assistant.

"preferences": a record has `chosen` and `rejected`, two answers to its `prompt`, and gives two examples in this order.
Prompt and answers are text or lists of messages; without a prompt, it is the messages that both answers begin with.
The targets are the answers.

The chat template of the tokenizer renders conversations. Without one, the answer follows the prompt directly, messages
are "role: content" with an empty line after each, and EOS follows every message of the assistant.

"labelled" is in `labelled.py`.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llm_jax import tokenizers
from llm_jax.errors import UserError
from llm_jax.tokenizers import Tokenizer, chat

_BATCH = 256  # records whose conversations are rendered together


class TokenizedExample(NamedTuple):
    """A sequence that is trained on independently of others.

    Attributes:
      ids: token ids.
      mask: a byte for each token, 1 where it is a target; empty if all are.
      size: bytes in UTF-8 of the text of the targets.
    """

    ids: Sequence[int]
    mask: bytes
    size: int


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How the texts of documents become examples.

    Attributes:
      encode: (tokenizer, texts) -> `examples` examples of each text, in the order of the texts.
      plain: document -> the text that a tokenizer is trained on.
      masks: whether only some tokens are targets.
      examples: number of examples of a document.
    """

    encode: Callable[[Tokenizer, Iterable[str]], Iterator[TokenizedExample]]
    plain: Callable[[str], str]
    masks: bool
    examples: int = 1


class Conversation(NamedTuple):
    """Messages, of which those of the assistant from `first` on are targets; `bare`: a prompt and its answer."""

    messages: list[dict[str, str]]
    first: int
    bare: bool


Segment = tuple[str, bool]  # text, and whether its tokens are targets


def _documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[TokenizedExample]:
    for text in texts:
        yield TokenizedExample(tokenizers.document(tokenizer, text), b"", len(text.encode()))


# ---------------------------------------------------------------- records to conversations


def _instruction(text: str) -> list[Conversation]:
    record = _record(text)
    if "messages" in record:
        return [Conversation(_messages(text, record["messages"], "assistant"), 0, False)]
    if "conversations" in record:
        return [Conversation(_messages(text, _from_sharegpt(record["conversations"]), "assistant"), 0, False)]
    if "instruction" in record and "output" in record:
        _need(text, record, ("instruction", "output"), "text in 'instruction' and 'output'")
        question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
        messages = _messages(text, question, "user") + _messages(text, record["output"], "assistant")
        return [Conversation(messages, 1, False)]
    if "completion" in record and "answer" not in record:
        record["answer"] = record["completion"]
    _need(text, record, ("prompt", "answer"), "'messages', or 'prompt' and 'answer'")
    prompt, answer = _messages(text, record["prompt"], "user"), _messages(text, record["answer"], "assistant")
    return [Conversation(prompt + answer, len(prompt), isinstance(record["prompt"], str))]


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
    return [Conversation(prompt + answer, len(prompt) + shared, bare) for answer in answers]


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


def _messages(text: str, value: Any, role: str) -> list[dict[str, str]]:
    """The messages of a list, or one message of `role` with a text."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    valid = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not valid or (role == "assistant" and not any(m["role"] == "assistant" for m in value)):
        expected = "one by the assistant" if role == "assistant" else "text"
        raise UserError(f"the record {_head(text)}: expected messages with 'role' and 'content', and {expected}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


# ---------------------------------------------------------------- conversations to examples


def _is_target(conversation: Conversation, index: int) -> bool:
    return index >= conversation.first and conversation.messages[index]["role"] == "assistant"


def _plain_segments(conversation: Conversation) -> list[Segment]:
    if conversation.bare:
        return [(m["content"], _is_target(conversation, i)) for i, m in enumerate(conversation.messages)]
    segments: list[Segment] = []
    for i, message in enumerate(conversation.messages):
        target = _is_target(conversation, i)
        segments += [(f"{message['role']}: ", False), (message["content"], target), ("" if target else "\n\n", False)]
    return segments


def _template_segments(special: Any, conversations: Sequence[Conversation]) -> list[list[Segment]]:
    """The text that a message of the assistant adds to the rendered messages before it is a target."""
    answers = [[i for i in range(len(c.messages)) if _is_target(c, i)] for c in conversations]
    turns = [(c, i) for c, ends in zip(conversations, answers, strict=True) for i in ends]
    before = chat.render_all(special, [c.messages[:i] for c, i in turns], answer=True)
    after = chat.render_all(special, [c.messages[: i + 1] for c, i in turns], answer=False)
    rendered = zip(before, after, strict=True)
    conversations_segments = []
    for ends in answers:
        segments: list[Segment] = []
        done = ""
        for prompt, answered in itertools.islice(rendered, len(ends)):
            if not (prompt.startswith(done) and answered.startswith(prompt)):
                raise UserError(
                    "the chat template renders earlier messages in another way when the conversation continues, so "
                    "that the tokens of the answers are not known; leave all but the last answer out"
                )
            segments += [(prompt[len(done) :], False), (answered[len(prompt) :], True)]
            done = answered
        conversations_segments.append(segments)
    return conversations_segments


def _conversations(parse: Callable[[str], list[Conversation]]) -> Callable[..., Iterator[TokenizedExample]]:
    def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[TokenizedExample]:
        special = getattr(tokenizer, "special", {})
        texts = iter(texts)
        while conversations := [c for text in itertools.islice(texts, _BATCH) for c in parse(text)]:
            if special.get("chat_template"):
                for segments in _template_segments(special, conversations):
                    yield _example([], segments, tokenizer.encode_chat, None)  # type: ignore[attr-defined]
            else:
                begin = [] if tokenizer.bos is None else [tokenizer.bos]
                for conversation in conversations:
                    yield _example(begin, _plain_segments(conversation), tokenizer.encode, tokenizer.eos)

    return encode


def _example(
    begin: list[int], segments: list[Segment], encode: Callable[[str], list[int]], end: int | None
) -> TokenizedExample:
    ids, mask, size = list(begin), bytearray(len(begin)), 0
    for text, target in segments:
        new = encode(text) + ([end] if target and end is not None else []) if text or target else []
        ids += new
        mask += bytes([target]) * len(new)
        size += len(text.encode()) * target
    return TokenizedExample(ids, bytes(mask), size)


def _as_text(parse: Callable[[str], list[Conversation]]) -> Callable[[str], str]:
    return lambda text: "".join(segment for c in parse(text) for segment, _ in _plain_segments(c))


ENCODERS = {
    "text": Encoder(_documents, str, masks=False),
    "instructions": Encoder(_conversations(_instruction), _as_text(_instruction), masks=True),
    "preferences": Encoder(_conversations(_preference), _as_text(_preference), masks=True, examples=2),
}
