import dataclasses
import json
from typing import ClassVar

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.data import rows
from llm_jax.data.corpus import Corpus, Source, Split
from llm_jax.data.encode import ENCODERS
from llm_jax.data.packing import best_fit
from llm_jax.data.rows import Mixed, Packed, Pairs, Rows, Shuffled
from llm_jax.errors import UserError
from llm_jax.schema import DataConfig
from tests.data.configs import data_config
from tests.tokenizers.test_chat_golden import THINKING, with_template

BYTE = tokenizers.get("byte").train([], 0)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Chatting(type(BYTE)):  # type: ignore[misc]
    """Bytes with a chat template, whose "<|" and so on are ordinary text here."""

    special: ClassVar = {"chat_template": TEMPLATE}
    encode_chat = type(BYTE).encode

    def chat_offsets(self, text):
        return [(i, i + 1) for i, c in enumerate(text) for _ in c.encode()]


def examples(record, kind="instructions", tokenizer=BYTE):
    """(everything, what counts) as text, of each example of a record; § is EOS and ^ is BOS."""
    found = []
    for ids, mask, size, _ in ENCODERS[kind].encode(tokenizer, [json.dumps(record)]):
        show = [{1: "^", 2: "§"}.get(i) or bytes([i - 3]).decode("latin1") for i in ids]
        counted = [c for c, m in zip(show, mask, strict=True) if m]
        assert size == len("".join(counted).replace("§", ""))
        found.append(("".join(show), "".join(counted)))
    return found


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "5"},
]


def test_only_answers_are_targets():
    assert examples({"prompt": "ask ", "answer": "yes", "x": 1}) == [("^ask yes§", "yes§")]
    assert examples({"messages": TALK}) == [
        ("^system: Be brief.\n\nuser: 2+2?\n\nassistant: 4§user: more\n\nassistant: 5§", "4§5§")
    ]
    assert examples({"prompt": TALK[:2], "answer": "4"}) == [
        ("^system: Be brief.\n\nuser: 2+2?\n\nassistant: 4§", "4§")
    ]


def test_records_of_sharegpt_alpaca_and_trl_are_conversations():
    turns = [("system", "Be brief."), ("human", "2+2?"), ("gpt", "4"), ("user", "more"), ("assistant", "5")]
    shared = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert examples(shared) == examples({"messages": TALK})
    assert examples({"conversations": TALK}) == examples({"messages": TALK})
    alpaca = {"instruction": "Add.", "input": "2+2", "output": "4"}
    expected = [("^user: Add.\n\n2+2\n\nassistant: 4§", "4§")]
    assert examples(alpaca) == expected
    assert examples(alpaca | {"input": ""}) == [("^user: Add.\n\nassistant: 4§", "4§")]
    assert examples(alpaca, tokenizer=Chatting()) == [("<|user|>Add.\n\n2+2</s><|assistant|>4</s>", "4</s>")]
    assert examples({"prompt": "ask ", "completion": "yes"}) == [("^ask yes§", "yes§")]


def test_system_and_history_beside_the_turns_are_part_of_the_conversation():
    alpaca = {"instruction": "more", "input": "", "output": "5", "system": "Be brief.", "history": [["2+2?", "4"]]}
    assert examples(alpaca) == examples({"messages": TALK})
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    shared = {"system": "Be brief.", "conversations": turns}
    assert examples(shared) == examples({"messages": TALK[:3]})
    with pytest.raises(UserError, match="expected 'history' as pairs of a question and its answer"):
        examples(alpaca | {"history": ["2+2?"]})


def test_lists_that_tables_hold_as_json_text_are_lists():
    assert examples({"messages": json.dumps(TALK)}) == examples({"messages": TALK})
    assert examples({"messages": TALK, "tools": "[]"}) == examples({"messages": TALK})
    for record in ({"messages": "hello"}, {"messages": TALK, "tools": "none"}):
        with pytest.raises(UserError, match=r"'(messages|tools)' is not a list"):
            examples(record)


@pytest.mark.parametrize("flag", ["weight", "train", "loss"])
@pytest.mark.parametrize("marks", [False, True])
def test_messages_can_be_excluded_from_the_loss(flag, marks):
    class Marking(Chatting):
        special: ClassVar = {
            "chat_template": "{% for m in messages %}<|{{ m.role }}|>"
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
            "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        }

    tokenizer = Marking() if marks else Chatting()
    three = [*TALK, {"role": "user", "content": "?"}, {"role": "assistant", "content": "6"}]
    ((whole, every),) = examples({"messages": three}, tokenizer=tokenizer)
    assert every == "4</s>5</s>6</s>"
    for index, counted in ((2, "5</s>6</s>"), (4, "4</s>6</s>")):
        left_out = [m | ({flag: 0} if i == index else {flag: 1}) for i, m in enumerate(three)]
        assert examples({"messages": left_out}, tokenizer=tokenizer) == [(whole, counted)]
    shared = [{"from": m["role"], "value": m["content"], flag: int(i != 2)} for i, m in enumerate(three)]
    assert examples({"conversations": shared}, tokenizer=tokenizer) == [(whole, "5</s>6</s>")]
    assert examples({"messages": [TALK[1], TALK[2] | {flag: False}, *TALK[3:]]}) == [
        ("^user: 2+2?\n\nassistant: 4\n\nuser: more\n\nassistant: 5§", "5§")
    ]


def test_a_chat_template_writes_the_conversation():
    assert examples({"prompt": "ask", "answer": "yes"}, tokenizer=Chatting()) == [
        ("<|user|>ask</s><|assistant|>yes</s>", "yes</s>")
    ]
    assert examples({"messages": [*TALK, {"role": "user", "content": "?"}]}, tokenizer=Chatting()) == [
        (
            "<|system|>Be brief.</s><|user|>2+2?</s><|assistant|>4</s><|user|>more</s><|assistant|>5</s>",
            "4</s>5</s>",
        )
    ]


def test_a_template_that_changes_earlier_messages_is_rejected():
    class Forgetful(Chatting):
        special: ClassVar = {"chat_template": "{{ messages[-1].content }}"}

    with pytest.raises(UserError, match="renders earlier messages differently once an answer follows"):
        examples({"messages": TALK}, tokenizer=Forgetful())


def test_preferences_are_two_examples_of_one_prompt():
    record = {"prompt": "ask ", "chosen": "yes", "rejected": "no"}
    assert examples(record, "preferences") == [("^ask yes§", "yes§"), ("^ask no§", "no§")]
    other = [*TALK[:-1], {"role": "assistant", "content": "6"}]
    assert [c for _, c in examples({"chosen": TALK, "rejected": other}, "preferences")] == ["5§", "6§"]
    assert [c for _, c in examples({"chosen": TALK, "rejected": other}, "preferences", Chatting())] == [
        "5</s>",
        "6</s>",
    ]


def test_a_prompt_beside_whole_conversations_is_not_repeated():
    pair = {"chosen": TALK[1:3], "rejected": [TALK[1], {"role": "assistant", "content": "5"}]}
    expected = examples(pair, "preferences")
    assert expected[0] == ("^user: 2+2?\n\nassistant: 4§", "4§")
    for prompt in ("2+2?", [TALK[1]]):
        assert examples({"prompt": prompt} | pair, "preferences") == expected
    turns = {"prompt": [TALK[1]], "chosen": TALK[2:], "rejected": [*TALK[2:4], TALK[2]]}
    assert examples(turns, "preferences")[0][0].startswith("^user: 2+2?")  # it is not in them


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("instructions", {"prompt": "a", "completion": "b", "label": False}, "'label' is False: a rejected answer"),
        ("instructions", {"prompt": "a", "completion": "b", "label": 0}, "'label' is 0: a rejected answer"),
        ("instructions", {"prompt": "a", "completion": "b", "label": "false"}, "'label' is 'false': a rejected answer"),
        ("preferences", {"prompt": "3?", "chosen": TALK[1:3], "rejected": [TALK[1], TALK[4]]}, "'prompt' is not that"),
        ("preferences", {"prompt": "2+2?", "chosen": TALK[1:3], "rejected": TALK[3:5]}, "'prompt' is not that"),
        ("instructions", {"text": "a"}, "has text; expected the fields 'messages'; .*; did you mean data.kind=text"),
        ("instructions", {"prompt": "a", "answer": None}, "; 'prompt' and 'answer' .*'response'$"),
        ("instructions", {"messages": TALK[:2]}, "one with the role 'assistant'; the roles are 'system', 'user'"),
        ("instructions", {"conversations": [{"from": "human", "value": "a"}]}, "'assistant'; the roles are 'user'$"),
        ("instructions", {"messages": [*TALK, {"role": "user"}]}, "and message 5 is \"{'role': 'user'}\""),
        ("instructions", {"conversations": [{"from": "gpt", "text": "a"}]}, "messages with 'role' and 'content'"),
        ("instructions", {"instruction": "a", "output": None}, "expected text in 'instruction' and 'output'"),
        ("instructions", {"prompt": 5, "answer": "a"}, "messages with 'role' and 'content', or text, not int"),
        ("instructions", {"messages": [TALK[2] | {"weight": 0.5}]}, "'weight' of a message is 0.5; expected 0 or 1"),
        ("instructions", {"messages": [TALK[2] | {"weight": 0}]}, "the loss counts no message of the assistant"),
        ("instructions", [1], "is not a record; this data.kind reads JSON lines"),
        ("preferences", {"prompt": "a", "chosen": "b"}, "expected 'chosen' and 'rejected'"),
        ("preferences", {"chosen": TALK, "rejected": TALK}, "are the same answer"),
    ],
)
def test_records_of_another_form_are_named(kind, record, message):
    with pytest.raises(UserError, match=message):
        examples(record, kind)


@hypothesis.given(st.lists(st.integers(0, 20), max_size=60), st.integers(1, 16))
def test_best_fit_places_every_example_that_fits_once_and_cuts_none(lengths, capacity):
    found = best_fit(np.array(lengths, np.int64), capacity)
    assert sorted(found.examples) == [i for i, n in enumerate(lengths) if 0 < n <= capacity]
    used = [sum(lengths[i] for i in found.examples[a:b]) for a, b in zip(found.starts, found.starts[1:], strict=False)]
    assert all(0 < n <= capacity for n in used)
    # Of any two rows that were open together, the later has only what did not fit the earlier:
    assert len(used) <= 1 or sum(used) > len(used) * capacity / 2


def test_best_fit_takes_the_least_room_that_is_enough():
    found = best_fit(np.array([6, 5, 4, 3, 2]), 10)
    rows_of = [sorted(found.examples[a:b].tolist()) for a, b in zip(found.starts, found.starts[1:], strict=False)]
    assert sorted(rows_of) == [[0, 2], [1, 3, 4]]


def split(*lengths: int, directory=None) -> Split:
    """Examples whose token k is 100 * example + k, of which the second half counts."""
    tokens = np.concatenate([[100 * (i + 1) + k for k in range(n)] for i, n in enumerate(lengths)]).astype(np.uint16)
    mask = np.concatenate([[k >= n // 2 for k in range(n)] for n in lengths]).astype(np.uint8)
    return Split(tokens, np.cumsum([0, *lengths]), int(sum(lengths)), mask, directory)


def test_packed_rows_contain_whole_examples_as_separate_segments(tmp_path, capsys):
    made = split(5, 9, 4, 3, 20, directory=tmp_path / "side")
    found = Packed(made, 8)
    assert "1 of 5 examples do not fit train.seq_len=8: left out" in capsys.readouterr().err
    assert len(found) == found.num_full == 3 and (tmp_path / "side" / "rows-8").exists()
    seen = {}
    for i in range(len(found)):
        row = found[i]
        assert set(row) == {"inputs", "targets", "positions", "segments", "mask"}
        assert all(v.dtype == np.int32 and v.shape == (8,) for v in row.values())
        for segment in range(1, row["segments"].max() + 1):
            inside = row["segments"] == segment
            example = int(row["inputs"][inside][0]) // 100
            n = int(np.diff(made.offsets)[example - 1])
            np.testing.assert_array_equal(row["inputs"][inside], 100 * example + np.arange(n - 1))
            np.testing.assert_array_equal(row["targets"][inside], 100 * example + np.arange(1, n))
            np.testing.assert_array_equal(row["positions"][inside], np.arange(n - 1))
            np.testing.assert_array_equal(row["mask"][inside], np.arange(1, n) >= n // 2)
            seen[example] = n
        assert not row["mask"][row["segments"] == 0].any()
    assert seen == {1: 5, 2: 9, 3: 4, 4: 3}
    assert not found[len(found) + 5]["segments"].any()
    again = Packed(made, 8)
    assert all((again[i]["inputs"] == found[i]["inputs"]).all() for i in range(3))


def test_examples_that_are_all_too_long_are_refused():
    with pytest.raises(UserError, match="none of the 2 examples fits train.seq_len=3; the shortest takes 4; raise"):
        Packed(split(5, 9), 3)
    with pytest.raises(UserError, match="none of the 1 pairs fits train.seq_len=5"):
        Pairs(split(5, 9), 5)


def test_both_answers_of_a_pair_are_in_the_same_batch(capsys):
    made = split(3, 4, 5, 5, 9, 3, 4, 4)
    found = Pairs(made, 6)
    assert len(found) == 6 and "1 of 4 pairs" in capsys.readouterr().err
    stream = Shuffled(found, 0)
    pairs = set()
    for i in range(0, 6, 2):
        chosen, rejected = (int(stream[i + k]["inputs"][0]) // 100 for k in range(2))
        assert chosen % 2 == 1 and rejected == chosen + 1
        pairs.add(chosen)
    assert pairs == {1, 3, 7}
    np.testing.assert_array_equal(found[0]["mask"], [1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(found[1]["segments"], [1, 1, 1, 0, 0, 0])


def text_rows(first: int, count: int, seq_len: int = 4) -> Rows:
    tokens = (first + np.arange(count * seq_len + 1)).astype(np.uint16)
    return Rows(Split(tokens, np.array([0, len(tokens)]), len(tokens)), seq_len)


def test_a_mixture_keeps_its_weights_and_is_a_function_of_the_row():
    mixed = Mixed((Shuffled(text_rows(0, 50), 3), Shuffled(text_rows(1000, 20), 3)), (0.7, 0.3))
    which = [int(mixed[i]["inputs"][0] >= 1000) for i in range(400)]
    assert sum(which) == 120 and all(2 <= sum(which[i : i + 10]) <= 4 for i in range(0, 400, 10))
    again = Mixed((Shuffled(text_rows(0, 50), 3), Shuffled(text_rows(1000, 20), 3)), (0.7, 0.3))
    assert [mixed[i]["inputs"].tolist() for i in (7, 399)] == [again[i]["inputs"].tolist() for i in (7, 399)]
    first = [int(mixed[i]["inputs"][0]) for i in range(400) if not which[i]]
    assert len(set(first[:50])) == 50 and first[50:100] != first[:50]  # epochs of a source are its own


def made(tmp_path, source: str, **changes) -> tuple[DataConfig, Corpus]:
    config = data_config(source, tmp_path / "cache", validation_fraction=0.2, **changes)
    return config, Source(config).corpus(BYTE)


def two(tmp_path) -> list[str]:
    for name in ("a", "b"):
        lines = (json.dumps({"text": f"{name} " * (i % 40 + 1)}) for i in range(200))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]


def test_weights_choose_the_rows_and_change_nothing_else(tmp_path, tiny):
    a, b = two(tmp_path)
    config, corpus = made(tmp_path, f"{a}@3,{b}@1")
    plain, other = made(tmp_path, f"{a},{b}")
    assert corpus.sha256 == other.sha256 and list(corpus.parts) == [a, b]
    np.testing.assert_array_equal(corpus.train.tokens, other.train.tokens)
    for side in ("train", "validation"):
        joined = [getattr(corpus.parts[name], side) for name in (a, b)]
        whole = getattr(corpus, side)
        np.testing.assert_array_equal(np.concatenate([j.tokens for j in joined]), whole.tokens)
        assert sum(j.num_bytes for j in joined) == whole.num_bytes
        assert all(j.offsets[-1] - j.offsets[0] == len(j.tokens) for j in joined)
        assert not (joined[0].tokens == 3 + ord("b")).any() and not (joined[1].tokens == 3 + ord("a")).any()
    train = dataclasses.replace(tiny.train, seq_len=8)
    mixed = rows.training(dataclasses.replace(tiny, data=config, train=train), corpus)
    share = np.mean([(mixed[i]["inputs"] == 3 + ord("a")).any() for i in range(400)])
    assert isinstance(mixed, Mixed) and abs(share - 0.75) < 0.01
    assert isinstance(rows.training(dataclasses.replace(tiny, data=plain, train=train), other), Shuffled)
    every, parts = rows.held_out(config, corpus, 8)
    assert list(parts) == [a, b] and sum(p.split.num_bytes for p in parts.values()) == every.split.num_bytes


@pytest.mark.parametrize("source", ["a@1,b", "a@0,b@1", "a@1.2.3,b@1", "a,a"])
def test_invalid_weights_are_rejected(source, tmp_path):
    with pytest.raises(UserError, match="data.source="):
        made(tmp_path, source)


def test_a_batch_that_would_divide_a_pair_is_refused(tmp_path, tiny):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}", "chosen": "y", "rejected": "n"}) + "\n" for i in range(50))
    )
    config, corpus = made(tmp_path, str(tmp_path / "a.jsonl"), kind="preferences")
    whole = dataclasses.replace(tiny, data=config, train=dataclasses.replace(tiny.train, batch_size=3))
    with pytest.raises(UserError, match="'train.batch_size' is 3; data.kind=preferences has rows in groups of 2"):
        rows.training(whole, corpus)
    stream = rows.training(dataclasses.replace(tiny, data=config), corpus)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batch = rows.batch(stream, 3, 4, sharding)
    counted = np.where(np.asarray(batch["mask"]) == 1, batch["targets"], 0)
    assert [chr(row.max() - 3) for row in counted] == ["y", "n", "y", "n"]


def test_instructions_are_trained_on_end_to_end(tmp_path, command):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} and {i}: ", "answer": f"{i}{i}"}) + "\n" for i in range(200))
        + json.dumps({"prompt": "x" * 100, "answer": "y"})
    )
    flags = (f"--config.data.source={path}", "--config.data.kind=instructions", f"--config.data.cache_dir={tmp_path}")
    done = command("train", f"--workdir={tmp_path / 'run'}", *flags)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "do not fit train.seq_len=32: left out" in done.stderr and summary["validation_tokens"] > 0
    found = json.loads(command("evaluate", f"--checkpoint={tmp_path / 'run'}", "--json").stdout)
    assert found["loss"] == pytest.approx(summary["validation_loss"], rel=1e-5)
    asked = ("--json", f"--data={path}", "--seq_len=128")
    whole = json.loads(command("evaluate", f"--checkpoint={tmp_path / 'run'}", *asked).stdout)
    text = json.loads(
        command("evaluate", f"--checkpoint={tmp_path / 'run'}", *asked, "--kind=text", "--field=answer").stdout
    )
    assert whole["tokens"] > found["tokens"] and text["tokens"] == whole["tokens"]  # EOS after every answer
    assert "not given" in command("evaluate", f"--checkpoint={tmp_path / 'run'}", "--kind=text", code=2).stderr
    assert "are not split" in command("evaluate", f"--checkpoint={tmp_path / 'run'}", "--stride=8", code=2).stderr


def test_preferences_are_trained_on_by_dpo(tmp_path, command, trained):
    path = tmp_path / "a.jsonl"
    records = (json.dumps({"prompt": f"{i}: ", "chosen": "yes", "rejected": "no!"}) for i in range(100))
    path.write_text("\n".join(records))
    flags = (f"--config.data.source={path}", f"--config.data.cache_dir={tmp_path}", f"--config.init_from={trained}")
    kinds = ("--config.data.kind=preferences", "--config.loss.kind=dpo")
    printed = command("train", f"--workdir={tmp_path / 'run'}", *flags, *kinds).stdout
    assert "chosen answer preferred 100.0%, mean margin" in printed
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4) and losses[-1] < losses[0]  # equation 7 at the reference
    for wrong in ((flags[2], kinds[1]), (*flags, kinds[0])):  # the one without the other
        said = command("train", f"--workdir={tmp_path / 'other'}", *wrong, code=2).stderr
        assert "use loss.kind=dpo with data.kind=preferences only" in said


def test_a_record_of_another_form_is_named_with_its_file(tmp_path):
    a, _ = two(tmp_path)
    with pytest.raises(UserError, match=r"a.jsonl: the record '.*' has text; expected the fields 'messages'"):
        made(tmp_path, a, kind="instructions")


def test_held_out_figures_are_given_by_source(tmp_path, command):
    a, b = two(tmp_path)
    command("train", f"--workdir={tmp_path / 'run'}", f"--config.data.source={a}@0.5,{b}@0.5")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    tokens = [summary[f"validation_tokens/{name}"] for name in (a, b)]
    assert sum(tokens) == summary["validation_tokens"]
    assert all(0 < summary[f"validation_bits_per_byte/{name}"] < 9 for name in (a, b))


def test_held_out_rows_by_source_with_several_examples_per_conversation(tmp_path):
    """With a template that takes the thinking out of earlier answers, every answer is an example of its own."""
    tokenizer = with_template("bytelevel", THINKING)
    for name, turns in (("a", 3), ("b", 1)):
        talk = [{"role": r, "content": name * 3} for r in ("user", "assistant")] * turns
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(60)))
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    config = data_config(f"{a},{b}", tmp_path / "cache", validation_fraction=0.2, kind="instructions")
    corpus = Source(config).corpus(tokenizer)
    for side in ("train", "validation"):
        whole, parts = getattr(corpus, side), [getattr(corpus.parts[name], side) for name in (a, b)]
        np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
        texts = [tokenizer.decode(part.tokens.tolist()) for part in parts]
        assert "bbb" not in texts[0] and "aaa" not in texts[1] and "aaa" in texts[0] and "bbb" in texts[1]
    assert len(corpus.train.offsets) + len(corpus.validation.offsets) - 2 == 60 * 3 + 60
