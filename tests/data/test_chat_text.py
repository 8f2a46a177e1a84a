"""Ranges of the answers in rendered conversations: from windows, compared with renderings of the whole conversation."""

import pytest

from llm_jax.data import chat_text
from llm_jax.data.chat_text import ChatText, Conversation, templated_texts
from llm_jax.errors import UserError
from llm_jax.tokenizers import chat_template
from tests.data.test_examples import Chatting, examples
from tests.tokenizers.chat_cases import CALL, TEMPLATES
from tests.tokenizers.test_chat_golden import THINKING


@pytest.mark.parametrize("names", [("prompt", "completion"), ("question", "answer"), ("query", "response")])
def test_prompt_and_answer_have_other_names(names):
    record = dict(zip(names, ("ask ", "yes"), strict=True))
    assert examples(record | {"context": ""}) == examples({"prompt": "ask ", "answer": "yes"})
    if names[0] != "prompt":
        for other in ({"context": "a text"}, {"query": "a", "response": "b", "question": "c", "answer": "d"}):
            with pytest.raises(UserError, match="'prompt' and 'answer' .or 'completion'.; .*'response'$"):
                examples({**record, **other})


@pytest.mark.parametrize(
    ("kind", "record", "other"),
    [
        ("instructions", {"text": "a", "label": 0}, "labelled"),
        ("instructions", {"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences"),
        ("preferences", {"messages": [{"role": "user", "content": "a"}]}, "instructions"),
    ],
)
def test_records_of_another_kind_suggest_it(kind, record, other):
    with pytest.raises(UserError, match=f"has {', '.join(record)}; expected .*; did you mean data.kind={other}"):
        examples(record, kind)


END = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
UNIFORM = {
    "chatml": TEMPLATES["chatml"],
    "mistral": TEMPLATES["mistral"],
    "stripped": "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>\n{% endfor %}" + END,
}
BY_PLACE = {  # templates that render a message differently by its place
    "thinking": THINKING,
    "numbered": "{% for m in messages %}<|{{ m.role }}|>{{ loop.index }} {{ m.content }}</s>{% endfor %}" + END,
    "every fourth": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>"
    "{% if loop.index % 8 == 0 %}\n{% endif %}{% endfor %}" + END,
    "footer": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if messages | length > 6 and messages[-1].role == 'assistant' %}!{% endif %}" + END,
    "begin": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if messages | length > 6 %} {% endif %}{% endif %}",
    "long": "{% for m in messages %}{% if messages | length > 6 and loop.first %}long: {% endif %}<|{{ m.role }}|>"
    "{{ m.content }}</s>{% endfor %}" + END,
}  # fmt: skip


def conversation(turns, roles=("user", "assistant"), first=0, **more):
    messages = [{"role": roles[i % len(roles)], "content": f" {i} yes no\n"} for i in range(turns)]
    return Conversation(messages, first, False, more.get("tools"), None, "'x'")


@pytest.fixture
def requested(monkeypatch):
    """The jobs that were rendered."""
    jobs: list = []
    original = chat_template.render_each
    monkeypatch.setattr(chat_template, "render_each", lambda s, j: original(s, (jobs.extend(j), j)[1]))
    return jobs


@pytest.mark.parametrize("name", [*UNIFORM, *BY_PLACE])
def test_windows_find_what_whole_prefixes_find(name):
    special = {"chat_template": (UNIFORM | BY_PLACE)[name], "bos_token": "<s>", "eos_token": "</s>"}
    conversations = [conversation(n) for n in (2, 4, 7, 18)] + [conversation(12, first=5)]
    found = templated_texts(special, conversations)
    cut = [c._replace(messages=c.messages[: c.answers()[-1] + 1]) for c in conversations]
    wholes = chat_template.render_all(special, [chat_template.job(c.messages, False) for c in cut])
    assert found == chat_text._by_prefixes(special, [(c, whole.text) for c, whole in zip(cut, wholes, strict=True)])
    if name in UNIFORM:
        assert [len(texts) for texts in found] == [1] * len(found)


@pytest.mark.parametrize("name", UNIFORM)
def test_the_work_grows_with_the_number_of_messages_alone(requested, name):
    special = {"chat_template": UNIFORM[name], "bos_token": "<s>", "eos_token": "</s>"}
    (texts,) = templated_texts(special, [conversation(200)])
    assert texts == [ChatText(texts[0].text, texts[0].answers)] and len(texts[0].answers) == 100
    assert sum(len(job["messages"]) for job in requested) < 12 * 200


def test_calls_are_checked_in_windows(requested):
    c = conversation(160, ("user", "assistant", "tool", "assistant"))
    for message in c.messages[1::4]:
        message["tool_calls"] = CALL
    tools = [{"type": "function", "function": {"name": "clock"}}]
    (texts,) = templated_texts({"chat_template": TEMPLATES["tools"]}, [c._replace(tools=tools)])
    assert texts.count("<call>") == 0 and texts[0].text.count("<call>") == 40 and len(texts[0].answers) == 80
    assert sum(len(job["messages"]) for job in requested) < 20 * 160


def test_a_system_text_beside_a_prompt_is_its_first_message():
    record = {"system": "Be brief.", "prompt": "2+2?", "answer": "4"}
    assert examples(record) == [("^system: Be brief.\n\nuser: 2+2?\n\nassistant: 4§", "4§")]
    pair = {"system": "Be brief.", "prompt": "2+2?", "chosen": "4", "rejected": "5"}
    texts = examples(pair, "preferences", Chatting())
    assert texts[1] == ("<|system|>Be brief.</s><|user|>2+2?</s><|assistant|>5</s>", "5</s>")
