import resource

import pytest

from llm_jax.errors import UserError
from llm_jax.tokenizers import chat_template

TEMPLATE = """{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}
<|{{ m.role }}|>{{ m.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
HI = [{"role": "user", "content": "Hi {{ 7 * 7 }}"}]


def test_messages_are_rendered_as_text():
    special = {"chat_template": TEMPLATE, "eos_token": "</s>"}
    assert chat_template.render(special, HI) == "<|user|>Hi {{ 7 * 7 }}</s>\n<|assistant|>"
    assert chat_template.render(special, HI, answer=False) == "<|user|>Hi {{ 7 * 7 }}</s>\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("", "has no chat template"),
        ("{% for", "the chat template fails .TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails .SecurityError"),
        ("{{ messages.append(1) }}", "fails .SecurityError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "fails .OverflowError"),
        ("{{ messages + 1 }}", "fails .TypeError"),
        ("{{ 1 / 0 }}", "fails .ZeroDivisionError"),
        ("{{ '{a}'.format() }}", "fails .KeyError"),
        ("{{ (" + "(" * 4000, "fails ."),
        ("{{ ('a' * 2000000000) | length }}", "fails .MemoryError|too much time or memory"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too much time"),
    ],
)
def test_templates_that_fail_or_access_the_system_are_one_line_errors(template, message, monkeypatch):
    if "too much time" in message:  # the others end by themselves, however busy the machine is
        monkeypatch.setattr(chat_template, "_SECONDS", 1)
    with pytest.raises(UserError, match=message):
        chat_template.render({"chat_template": template}, HI)


def test_the_time_limit_counts_for_each_conversation_and_errors_are_its_own(monkeypatch):
    monkeypatch.setattr(chat_template, "_SECONDS", 1)
    template = (
        "{% for i in range(messages[0].content) %}{% for j in range(70000) %}{% endfor %}{% endfor %}"
        "{{ messages[0].content + 0 }}"
    )
    counts = [20] * 40 + ["x", 1]  # together they take more than a second
    jobs = [chat_template.job([{"role": "user", "content": count}], False) for count in counts]
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    *slow, wrong, last = chat_template.render_each({"chat_template": template}, jobs)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began > 1
    assert {text.text for text in slow} == {"20"} and last.text == "1"
    assert "the chat template fails (TypeError" in str(wrong)


def test_a_job_that_extends_another_renders_the_whole_conversation():
    jobs = [
        chat_template.job([{"role": "user", "content": text}], False, extends=extends)
        for text, extends in (("Hi", None), ("Ho", 0), ("Hi you", 0), ("Hi", 2), ("Hi you two", 2))
    ]
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    rendered = chat_template.render_all({"chat_template": template}, jobs)
    assert [r.text for r in rendered] == ["Hi", "Ho", "Hi you", "Hi", "Hi you two"]
    assert [r.answers for r in rendered] == [[(0, len(r.text))] for r in rendered]


def test_templates_may_use_break_and_continue():
    template = "{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert chat_template.render({"chat_template": template}, HI) == "012"


def test_the_message_of_a_template_error_is_shown():
    with pytest.raises(UserError, match="refuses these messages: no robots"):
        chat_template.render({"chat_template": TEMPLATE}, [{"role": "robot", "content": ""}])


@pytest.mark.parametrize(
    "special", [{}, {"eos_token": "b"}, {"add_bos_token": True, "bos_token": "a", "chat_template": ""}]
)
def test_a_tokenizer_with_any_special_tokens_is_loaded_as_it_was_saved(tmp_path, special):
    import tokenizers as library

    from llm_jax import tokenizers
    from llm_jax.tokenizers.hub import HubTokenizer

    model = library.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    made = HubTokenizer(library.Tokenizer(model).to_str(), special)
    tokenizers.save(made, tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert (loaded.bos, loaded.eos) == (made.bos, made.eos)
