"""Rendered chats, their ids and the tokens that count equal those of transformers (make_chat_golden.py)."""

import json
import pathlib

import pytest

import llm_jax
from llm_jax import tokenizers
from llm_jax.data.chat_text import ChatText
from llm_jax.data.encode import ENCODERS, templated_example
from llm_jax.errors import UserError
from llm_jax.tokenizers import chat_template
from tests.tokenizers import forms
from tests.tokenizers.chat_cases import CALL, CHATML, CONVERSATIONS, TEMPLATES, USER, YES

GOLDEN = json.loads(pathlib.Path(__file__).with_name("chat_golden.json").read_text())["cases"]
KEYS = sorted({(case["form"], case["template"]) for case in GOLDEN})


def with_template(name: str, template: str):
    """The tokenizer of a form with a chat template."""
    original = forms.form(name)
    config = json.dumps(original.special | {"chat_template": template}).encode()
    return tokenizers.from_files(original.files() | {"tokenizer_config.json": config})


def encode(tokenizer, *records, kind="instructions"):
    return list(ENCODERS[kind].encode(tokenizer, [json.dumps(record) for record in records]))


@pytest.mark.parametrize(("form", "template"), KEYS)
def test_chats_have_the_text_and_the_ids_of_transformers(form, template):
    tokenizer = with_template(form, TEMPLATES[template])
    cases = [case for case in GOLDEN if (case["form"], case["template"]) == (form, template)]
    records = [CONVERSATIONS[case["conversation"]] for case in cases]
    jobs = [chat_template.job(r["messages"], False, r.get("tools"), r.get("documents")) for r in records]
    rendered = chat_template.render_all(tokenizer.special, jobs)
    assert [r.text for r in rendered] == [case["text"] for case in cases]
    for case, example in zip(cases, encode(tokenizer, *records), strict=True):
        assert list(example.ids) == case["ids"], case["conversation"]
        if case["mask"]:
            assert list(example.mask) == case["mask"], case["conversation"]
        assert example.ends_document


def test_a_chat_template_is_applied_from_python_as_by_transformers():
    case = next(c for c in GOLDEN if c["template"] == "chatml" and c["conversation"] == "two")
    tokenizer, messages = with_template(case["form"], CHATML), CONVERSATIONS["two"]["messages"]
    assert llm_jax.apply_chat_template(tokenizer, messages) == case["ids"]
    begun = llm_jax.apply_chat_template(tokenizer, messages, add_generation_prompt=True)
    assert begun[: len(case["ids"])] == case["ids"] and len(begun) > len(case["ids"])
    with pytest.raises(UserError, match="a tokenizer of kind byte has no chat template"):
        llm_jax.apply_chat_template(tokenizers.get("byte").train([], 0), messages)


def counted(tokenizer, example) -> str:
    """The text of the tokens that count."""
    return "".join(tokenizer.piece(i) for i, m in zip(example.ids, example.mask, strict=True) if m)


@pytest.mark.parametrize("form", ["model", "prepend", "metaspace", "gguf", "bytelevel"])
def test_answers_count_and_are_tokenized_with_what_comes_before_them(form):
    tokenizer = with_template(form, TEMPLATES["zephyr"]) if form != "gguf" else None
    if tokenizer is None:
        original = forms.form("model")
        metadata = original.to_gguf(original.vocab_size) | {"tokenizer.chat_template": TEMPLATES["zephyr"]}
        tokenizer = tokenizers.from_gguf(metadata)
    (example,) = encode(tokenizer, CONVERSATIONS["two"])
    text = chat_template.render(tokenizer.special, CONVERSATIONS["two"]["messages"], answer=False)
    assert list(example.ids) == tokenizer.encode_chat(text)
    end = tokenizer.special["eos_token"]
    offsets = tokenizer.chat_offsets(text)
    chars = {c for (a, b), m in zip(offsets, example.mask, strict=True) if m for c in range(a, b)}
    assert "".join(text[c] for c in sorted(chars)) == f"yes no maybe{end}\n😀 on{end}\n"
    assert example.size == len(f"yes no maybe{end}\n😀 on{end}\n".encode())


@pytest.mark.parametrize("form", forms.SENTENCEPIECE)
def test_a_prompt_and_its_answer_without_a_template_are_tokenized_together(form):
    tokenizer = forms.form(form)
    (example,) = encode(tokenizer, {"prompt": "hello\n", "answer": "yes"})
    whole = tokenizer.encode("hello\nyes")
    assert list(example.ids) == [tokenizer.bos, *whole, tokenizer.eos]
    assert list(example.mask) == [0, *(0 for _ in tokenizer.encode("hello\n")), *(1,) * (len(whole) - len(tokenizer.encode("hello\n"))), 1]  # fmt: skip  # noqa: E501
    chosen, rejected = encode(tokenizer, {"prompt": "hello\n", "chosen": "yes", "rejected": "no"}, kind="preferences")
    assert list(chosen.ids) == list(example.ids) and rejected.ids[:3] == chosen.ids[:3]


class _FixedOffsets:
    """A tokenizer whose tokens cover these ranges of characters of any text."""

    offsets = ((0, 2), (2, 5), (5, 5), (5, 8), (8, 9))

    def encode_chat(self, text):
        return list(range(len(self.offsets)))

    def chat_offsets(self, text):
        return list(self.offsets)


def test_tokens_that_overlap_an_answer_count():
    for span, mask in (((3, 7), [0, 1, 1, 1, 0]), ((2, 5), [0, 1, 0, 0, 0]), ((6, 9), [0, 0, 0, 1, 1])):
        example = templated_example(_FixedOffsets(), ChatText("abcdefghi", [span]))
        assert list(example.mask) == mask and example.size == span[1] - span[0]


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%+ generation %}", "{%generation%}"])
def test_generation_tags_of_every_form_mark_the_answers(tag):
    template = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}so "
    template += tag + "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    (example,) = encode(with_template("bytelevel", template), CONVERSATIONS["one"])
    assert counted(with_template("bytelevel", template), example).replace("Ġ", " ").strip() == "yes no maybe"


def test_generation_blocks_count_for_preferences_from_the_answers_on():
    tokenizer = with_template("bytelevel", TEMPLATES["generation"])
    record = {"prompt": CONVERSATIONS["two"]["messages"][:3], "chosen": "yes", "rejected": "no"}
    chosen, rejected = encode(tokenizer, record, kind="preferences")
    assert counted(tokenizer, chosen) == "Ċyes<|im_end|>" and counted(tokenizer, rejected) == "Ċno<|im_end|>"


# Takes the thinking out of all answers but the last, as Qwen 3's template does.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_every_answer_is_trained_as_it_is_rendered_when_it_is_the_last():
    tokenizer = with_template("bytelevel", THINKING)
    messages = CONVERSATIONS["two"]["messages"]
    first, second = encode(tokenizer, {"messages": messages})
    for example, count in ((first, 2), (second, 4)):
        text = chat_template.render(tokenizer.special, messages[:count], answer=False)
        assert list(example.ids) == tokenizer.encode_chat(text)
    assert counted(tokenizer, first) == "<think>ĊĊ</think>ĊĊyesĠnoĠmaybe<|im_end|>Ċ"
    assert counted(tokenizer, second).startswith("<think>ĊĊ</think>ĊĊ") and "yes" not in counted(tokenizer, second)
    assert [first.ends_document, second.ends_document] == [False, True]


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (CHATML, CONVERSATIONS["called"], "does not show 'tools'"),
        (CHATML, {"messages": [USER, YES | {"tool_calls": CALL, "content": ""}]}, "does not show 'tool_calls'"),
        (CHATML, {"messages": [USER, YES | {"reasoning_content": "x"}]}, "does not show 'reasoning_content'"),
        (CHATML, {"messages": [USER, YES], "documents": [{"text": "b"}]}, "does not show 'documents'"),
        (CHATML, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, YES]}, "content in parts"),
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
            {"messages": [USER, YES | {"content": [{"type": "text", "text": "a"}]}]},
            "cannot show a content in parts; give text .the chat template fails .TypeError",
        ),
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
            {"messages": [USER, YES | {"content": None, "tool_calls": CALL}]},
            "the record '.*': the chat template fails .TypeError",
        ),
        ("", {"messages": [USER, YES | {"tool_calls": CALL}]}, "'tool_calls' needs a chat template"),
        ("", {"messages": [USER, YES | {"reasoning_content": "x"}]}, "'reasoning_content' needs a chat template"),
        ("", {"messages": [USER, YES], "tools": [{}]}, "has tools or documents, which need a chat template"),
        ("", {"messages": [{"role": "user", "content": [{"type": "image"}]}, YES]}, "a part of a message is not text"),
        (CHATML, {"messages": [USER, {"role": "assistant", "content": None}]}, "expected messages with"),
        (CHATML, {"messages": [USER, YES], "tools": "clock"}, "'tools' is not a list"),
        (CHATML, {"messages": []}, "and one with the role 'assistant'; it has no messages"),
    ],
)
def test_what_no_template_can_show_is_refused(template, record, message):
    with pytest.raises(UserError, match=message) as error:
        encode(with_template("bytelevel", template or None), record)
    assert "\n" not in str(error.value)


def test_a_call_that_the_template_shows_counts():
    tokenizer = with_template("bytelevel", TEMPLATES["tools"])
    (example,) = encode(tokenizer, CONVERSATIONS["called"])
    text = "".join(tokenizer.decode([i]) for i, m in zip(example.ids, example.mask, strict=True) if m)
    assert '"name": "clock"' in counted(tokenizer, example).replace("Ġ", " ") and text.endswith("yes no maybe\n")


def test_content_in_parts_of_text_without_a_template_is_text():
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "the cat?"}]
    plain, joined = (
        encode(forms.form("bytelevel"), {"messages": [USER | {"content": c}, YES]}) for c in (parts, USER["content"])
    )
    assert plain == joined
