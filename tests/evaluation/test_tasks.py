"""Templates, task files, scoring by likelihood and by generation, and resuming from records."""

import dataclasses
import decimal
import json
import shutil

import numpy as np
import pytest
from scipy import stats

from llm_jax import intervals, tokenizers
from llm_jax.decoding import score
from llm_jax.decoding.complete import complete
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.evaluation import answers, builtin, prompts, tasks, templates
from llm_jax.evaluation.prompts import PromptConfig
from llm_jax.evaluation.tasks import Task
from llm_jax.evaluation.templates import STYLES, Example, Template
from llm_jax.tokenizers.byte import ByteTokenizer
from tests.data.test_labelled import TEMPLATE as TEMPLATE_OF_CHATS
from tests.data.test_labelled import chat_tokenizer
from tests.tokenizers import forms

BYTES = ByteTokenizer()
TEMPLATE = Template("Q: {text}\nA:")
SHOTS = tuple(Example({"text": f"shot {i}"}, "yn"[i % 2], (), f"because {i}") for i in range(6))
ASKED = Example({"text": "asked"}, "y", ("y", "n"))


def text_of(style, shots=SHOTS[:2]):
    return templates.build(TEMPLATE, STYLES[style], ASKED, shots, "letters").plain()


def test_styles_are_what_their_papers_show():
    assert text_of("zero_shot", ()) == "Q: asked\nA:"
    assert text_of("few_shot") == "Q: shot 0\nA: y\n\nQ: shot 1\nA: n\n\nQ: asked\nA:"
    assert text_of("expert", ()) == "You are a world-leading expert in letters.\n\nQ: asked\nA:"
    assert text_of("cot_zero_shot", ()) == "Q: asked\nA:\nLet's think step by step."
    assert text_of("cot_few_shot", SHOTS[:1]) == (
        "Give detailed explanations for the answer.\n\n"
        "Q: shot 0\nA:\nExplanation: because 0\nTherefore, the answer is y\n\nQ: asked\nA:\nExplanation:"
    )


def test_a_prompt_is_turns_of_a_chat():
    prompt = templates.build(TEMPLATE, STYLES["few_shot"], ASKED, SHOTS[:1])
    assert prompt.messages() == [
        {"role": "user", "content": "Q: shot 0\nA:"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "Q: asked\nA:"},
    ]


def test_shots_are_chosen_by_seed_and_balanced_where_asked():
    pool = [Example({"text": str(i)}, "y" if i else "n") for i in range(5)]
    assert templates.choose_shots(pool, 3, 0, "first") == pool[:3]
    orders = {tuple(e.fields["text"] for e in templates.choose_shots(pool, 3, seed)) for seed in range(20)}
    assert len(orders) > 10 and templates.choose_shots(pool, 3, 1) == templates.choose_shots(pool, 3, 1)
    for seed in range(10):
        assert sorted(e.answer for e in templates.choose_shots(pool, 2, seed, "balanced")) == ["n", "y"]
    with pytest.raises(UserError, match="--shots=6"):
        templates.choose_shots(pool, 6, 0)


def judge(metric, prediction, answer, normalization="none"):
    example = Example({"text": "a"}, answer)
    task = Task("t", (TEMPLATE,), (example,), metric=metric, normalization=normalization)
    task.check()
    return task.is_correct(prediction, example)


@pytest.mark.parametrize(
    ("metric", "prediction", "right", "expected"),
    [
        ("exact", " Paris.", "paris", True), ("exact", "Paris, France", "Paris", False),
        ("starts", "a b c d", "a b c", True), ("starts", "a b cd", "a b c", False), ("starts", "", "a", False),
        ("contains", "so it is a B!", "b", True), ("contains", "abc", "b", False),
    ],
)  # fmt: skip
def test_metrics_of_words_ignore_case_and_punctuation(metric, prediction, right, expected):
    assert judge(metric, prediction, right, "words") is expected


@pytest.mark.parametrize(
    ("metric", "prediction", "right", "expected"),
    [
        ("exact", " Paris\n", "Paris", True), ("exact", "paris", "Paris", False), ("exact", "C", "C++", False),
        ("exact", "", "+", False), ("exact", "-", "+", False), ("exact", "-5", "5", False),
        ("exact", "a.b", "ab", False),
        ("starts", "C++, of course", "C++", True), ("starts", "C++", "C", False), ("starts", "c++", "C++", False),
        ("starts", "so C", "C", False), ("starts", "C", "C", True), ("starts", " C.", "C", True),
        ("contains", "it is C++.", "C++", True), ("contains", "it is C++.", "C", False), ("contains", "(C)", "C", True),
        ("contains", "the -5 of", "5", False), ("contains", "x.5", "5", False), ("contains", "", "5", False),
    ],
)  # fmt: skip
def test_metrics_compare_what_is_written(metric, prediction, right, expected):
    assert judge(metric, prediction, right) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 1,200 now", 1200), ("3 and 4", 4), ("none", None), ("", None), ("-7", -7), ("\u22127", -7), ("+7", 7),
        ("1\u202f200\u202f000", 1200000), ("1\u00a0200", 1200), ("1'200", 1200), ("1_000", 1000), ("1,2,3", 3),
        ("$1,200.50", "1200.50"), ("-$5", -5), ("\u2212 \u20ac5", -5), ("45%", 45), ("45 %", 45), ("7.", 7),
        (".5", "0.5"),
        ("10-12", 12), ("20 - 5 = 15", 15), ("1e3", 1000), ("2.50", "2.5"), ("9" * 400, int("9" * 400)),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text, expected):
    assert tasks.number(text) == (None if expected is None else decimal.Decimal(expected))
    if expected is not None:
        assert judge("number", text, str(expected)) and not judge("number", "", text)
        assert not judge("number", text + "1", text)


@pytest.mark.parametrize(
    ("answers", "options", "message"),
    [
        (("+", "-"), {"normalization": "words"}, "example 1 is '+', which is empty with normalization 'words'"),
        (
            ("Yes", "yes!"),
            {"normalization": "words"},
            "example 2 is 'yes!', which is the same as 'Yes' with normalization",
        ),
        (("", "a"), {}, "example 1 is '', which is empty with normalization 'none'"),
        (("5", "many"), {"metric": "number"}, "the answer of example 2 is 'many'; expected a number"),
        (("5", "6"), {"metric": "number", "normalization": "words"}, "requires normalization 'none'"),
        (("5", "6"), {"normalization": "lower"}, "normalization is 'lower'; expected one of none, words"),
    ],
)
def test_a_task_whose_answers_the_metric_cannot_tell_apart_is_refused(answers, options, message):
    examples = tuple(Example({"text": "a"}, answer) for answer in answers)
    with pytest.raises(UserError) as error:
        Task("t", (TEMPLATE,), examples, **options).check()
    assert message in str(error.value)
    twice = tuple(Example({"text": "a"}, answer) for answer in ("a", "b", "a"))
    Task("t", (TEMPLATE,), twice, normalization="words").check()


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


HEADER = {"task": "t", "question": "Q: {text}\nA:", "choices": ["y", "n"], "stop": ["\n"], "max_new_tokens": 4}


def test_a_file_is_a_task(tmp_path):
    task = tasks.read(
        write(tmp_path / "t.jsonl", HEADER, {"text": "s", "answer": "n", "shot": True}, "", {"text": 3, "answer": "y"})
    )
    assert task.scoring == "likelihood" and task.shots[0].answer == "n" and task.max_new_tokens == 4
    assert task.examples == (Example({"text": "3"}, "y", ("y", "n")),)
    plain = tasks.read(write(tmp_path / "p.jsonl", {"question": "2 + 2 =", "answer": 4}))
    assert (plain.name, plain.scoring, plain.templates[0].ask(plain.examples[0])) == ("p", "generate", "2 + 2 =\n")


@pytest.mark.parametrize("form", ["plain", "bom", "crlf", "blank"])
def test_a_file_of_json_lines_is_read_in_every_form(tmp_path, form):
    question = "one\u2028two\x85three\u2029four?\n"
    lines = [json.dumps({"question": question, "answer": str(i)}, ensure_ascii=False) for i in range(3)]
    text = {"bom": "\ufeff"}.get(form, "") + {"crlf": "\r\n"}.get(form, "\n").join(lines)
    (tmp_path / "t.jsonl").write_bytes((text + ("\n\n \r\n" if form == "blank" else "")).encode())
    task = tasks.read(tmp_path / "t.jsonl")
    assert [task.templates[0].ask(e) for e in task.examples] == [question + "\n"] * 3


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "empty"), (["{"], "line 1: not JSON"), (["[1]"], "line 1: expected a JSON object"),
        ([HEADER, "nonsense"], "line 2: not JSON"), ([HEADER], "no examples to ask"),
        ([HEADER | {"questin": "x"}], "unknown key 'questin'; did you mean 'question'"),
        ([HEADER | {"max_new_tokens": "4"}], "of the wrong type"), ([HEADER | {"stop": [1]}], "list of texts"),
        ([HEADER, {"text": "x"}], "line 2: an example needs an 'answer'"),
        ([HEADER, {"text": "x", "answer": "z"}], "choices that include its answer"),
        ([HEADER, {"text": "x", "answer": ["y"]}], "expected a text or a number"),
        ([HEADER, {"word": "x", "answer": "y"}], "lacks the field 'text'"),
        ([HEADER | {"question": "{text"}, {"text": "x", "answer": "y"}], "not a format string"),
        ([HEADER | {"metric": "bleu"}, {"text": "x", "answer": "y"}], "metric is 'bleu'"),
        ([HEADER | {"normalization": 1}, {"text": "x", "answer": "y"}], "of the wrong type"),
        ([HEADER | {"choices": ["y", "y"]}, {"text": "x", "answer": "y"}], "two choices of example 1 are the same"),
        ([HEADER | {"scoring": "vote"}, {"text": "x", "answer": "y"}], "scoring is 'vote'"),
        ([HEADER | {"extract": "("}, {"text": "x", "answer": "y"}], "not a regular expression"),
        ([HEADER, {"text": "x", "answer": "y", "choices": "yn"}], "list of texts"),
    ],
)  # fmt: skip
def test_an_invalid_task_file_is_a_one_line_error(tmp_path, lines, says):
    with pytest.raises(UserError) as error:
        tasks.read(write(tmp_path / "t.jsonl", *lines))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def of(make):
    return (*make(scan_layers=False), BYTES)


def test_likelihood_takes_the_likeliest_choice(of):
    choices = ("yes", "n", "perhaps")
    examples = tuple(Example({"text": t}, "n", choices) for t in ("a", "bc", "def"))
    task = Task("t", (TEMPLATE,), examples, scoring="likelihood")
    for normalize, power in (("none", 0), ("tokens", 1), ("bytes", 1)):
        found = list(answers.records(of, task, PromptConfig(normalize=normalize), [2, 0], batch_size=4))
        assert [r["index"] for r in found] == [2, 0]
        for record in found:
            head = BYTES.encode(TEMPLATE.ask(examples[record["index"]]))
            scored = score.score(of[0], of[1], [([1, *head], BYTES.encode(" " + c)) for c in choices], 4)
            expected = [sum(s.log_probabilities) / (len(c) + 1) ** power for s, c in zip(scored, choices, strict=True)]
            np.testing.assert_allclose(record["scores"], expected, atol=1e-4)
            assert record["prediction"] == choices[int(np.argmax(expected))] and record["right"] == (
                record["prediction"] == "n"
            )


def last(text):
    """What r"(.)" finds last."""
    return next((c for c in reversed(text) if c != "\n"), "").strip()


def test_generation_reads_the_answer_and_reasoning_comes_before_it(of):
    model, params, tokenizer = of
    task = Task("t", (TEMPLATE,), (ASKED, ASKED), SHOTS, extract=r"(.)", stop=(), max_new_tokens=6, reasoning_tokens=5)
    (first, second) = answers.records(of, task, PromptConfig(), [0, 1], batch_size=2)

    def written(prompt, **options):  # twice, as the batches of two above, so that they share a program
        return complete(model, params, tokenizer, [prompt] * 2, DecodingOptions(temperature=0, **options))[0][0]

    assert first["prediction"] == last(written("Q: asked\nA:", max_new_tokens=6).text)
    assert {**first, "index": 1} == second
    reasoned, again = answers.records(of, task, PromptConfig("cot_zero_shot"), [0, 1], batch_size=2)
    assert {**reasoned, "index": 1} == again
    begun = "Q: asked\nA:\nLet's think step by step."
    thought = written(begun, max_new_tokens=5, stop=("\n\n",))
    whole = begun + thought.text.rstrip() + "\nTherefore, the answer is"
    assert reasoned["prediction"] == last(written(whole, max_new_tokens=6).text)
    assert reasoned["reasoning_tokens"] == len(thought.generated.ids)


def test_no_text_is_lost_between_prompt_and_answer():
    for prompt, answer in (("ab", " c"), ("ab ", "c"), ("ab", "c")):
        head, tail = prompts.encode_pair(BYTES, prompt, answer)
        assert BYTES.decode(head + tail) == prompt + answer and not BYTES.decode(head).endswith(" ") and tail


@pytest.mark.parametrize("form", [*forms.SENTENCEPIECE, "bytelevel"])
def test_prompt_and_answer_are_tokenized_whole(form):
    """Answers that continue a word, begin one after a space, or begin a line."""
    tokenizer = forms.form(form)
    for prompt, answer in (("the c", "at sat"), ("the cat", " sat"), ("hello\n", "yes"), ("the cat", "s")):
        head, tail = prompts.encode_pair(tokenizer, prompt, answer)
        assert [*head, *tail] == tokenizers.prompt(tokenizer, prompt + answer)
        assert len(tokenizer.decode(head)) <= len(prompt) and tail
    rendered = "<|im_start|>" if form == "bytelevel" else "</s>"
    head, tail = prompts.encode_pair(tokenizer, f"{rendered}the", " cat", rendered=True)
    assert [*head, *tail] == prompts.encode(tokenizer, f"{rendered}the cat", rendered=True)


def test_the_interval_is_wilsons():
    for right, n in ((0, 10), (3, 10), (10, 10), (50, 200)):
        expected = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
        np.testing.assert_allclose(intervals.wilson(right, n), expected, atol=1e-6)


def test_evaluation_resumes_from_its_records_and_rejects_those_of_other_settings(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = answers.AnswerLog(path, {"task": "a"})
    log.add({"index": 0, "right": True})
    with path.open("a") as file:
        file.write('{"index": 1, "ri')  # interrupted
    again = answers.AnswerLog(path, {"task": "a"})
    assert again.records == [{"index": 0, "right": True}]
    again.add({"index": 1, "right": False})
    assert len(answers.AnswerLog(path, {"task": "a"}).records) == 2
    with pytest.raises(UserError, match="records of another evaluation"):
        answers.AnswerLog(path, {"task": "b"})


@pytest.mark.parametrize("make_task", [builtin.arithmetic, builtin.copying])
def test_built_in_tasks_are_consistent(make_task):
    task = make_task(20)
    task.check()
    assert len(task.templates) == 10 and len(task.examples) == 20 and task.digest() == make_task(20).digest()
    for style in STYLES:
        for template in range(10):
            asked = prompts.prompts(task, PromptConfig(style, template), task.examples[:3])
            assert all(e.fields["text"] in p.plain() for e, p in zip(task.examples, asked, strict=False))
    assert all(task.is_correct(task.extract_answer(TEMPLATE.solve(e, e.answer)), e) for e in task.examples)
    assert not task.is_correct(task.extract_answer("nothing"), task.examples[0])


@pytest.mark.parametrize(
    "bad", [{"style": "zero"}, {"normalize": "words"}, {"template": 1}, {"shots": 7}, {"select": "best", "shots": 1}]
)
def test_prompt_options_that_a_task_does_not_support_are_rejected(bad):
    with pytest.raises(UserError, match=f"--{next(iter(bad))}"):
        PromptConfig(**bad).check(Task("t", (TEMPLATE,), (ASKED,), SHOTS))


def test_a_choice_begins_its_turn_as_answered_examples_do(make, monkeypatch):
    """Without the space that stands between a plain question and its answer."""
    asked, tokenizer, scored = [], chat_tokenizer(TEMPLATE_OF_CHATS), score.Scored([0.0], True)
    monkeypatch.setattr(score, "score", lambda model, params, pairs, size: asked.extend(pairs) or [scored] * len(pairs))
    examples = tuple(Example({"text": t}, t, ("good", "bad")) for t in ("good", "bad"))
    task = Task("t", (Template("Is it {text}?\nA:"),), examples[:1], examples[1:], scoring="likelihood")
    list(answers.records((*make(), tokenizer), task, PromptConfig("few_shot", shots=1, chat=True), [0]))
    texts = [tokenizer._tokenizer.decode([*head, *tail], skip_special_tokens=False) for head, tail in asked]
    begun = "<|start|>user: Is it bad?\nA:<|end|><|start|>assistant: bad<|end|><|start|>user: Is it good?\nA:<|end|>"
    assert texts == [f"{begun}<|start|>assistant: {said}" for said in ("good", "bad")]


def test_the_command_evaluates_a_task_file_and_resumes(trained, command, tmp_path):
    lines = [{"text": t, "answer": a} for t, a in zip("abcdef", "yynnyn", strict=True)]
    file = write(tmp_path / "t.jsonl", HEADER, *[{**line, "shot": True} for line in lines], *lines)
    flags = [f"--checkpoint={trained}", f"--task={file}", "--style=all", "--batch_size=4"]
    flags.append(f"--output={tmp_path / 'out'}")
    command("evaluate", *flags[:2], "--limit=2", "--batch_size=4", flags[-1])
    first = (tmp_path / "out" / "t-zero_shot-0.jsonl").read_text()
    done = json.loads(command("evaluate", *flags, "--json").stdout)
    assert [one["style"] for one in done] == list(STYLES) and {one["examples"] for one in done} == {6}
    assert (tmp_path / "out" / "t-zero_shot-0.jsonl").read_text().startswith(first)
    assert 0 <= done[0]["low"] <= done[0]["accuracy"] <= done[0]["high"] <= 1
    table = command("evaluate", *flags).stdout
    assert len(table.splitlines()) == 6 and "95 % interval" in table
    shutil.copytree(trained, tmp_path / "run")
    flags[0] = f"--checkpoint={tmp_path / 'run'}"
    other = (*flags[:2], flags[3], f"--output={tmp_path / 'other'}")
    command("evaluate", *other)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")  # the weights are others now, by the same name
    stale = command("evaluate", *other, code=2)
    assert "the records of another evaluation (weights differ)" in stale.stderr
    bad = command("evaluate", *flags[:1], "--task=nothing", code=2)
    assert "the task 'nothing' is unknown" in bad.stderr and bad.stderr.count("\n") == 1


def test_a_digest_changes_with_the_task():
    task = builtin.copying(5)
    assert task.digest() != dataclasses.replace(task, metric="exact").digest() != builtin.copying(6).digest()
