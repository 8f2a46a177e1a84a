"""Several checkpoints on the same documents or examples, and the intervals of their differences."""

import dataclasses
import json
import math
import re
import shutil
import types

import jax
import numpy as np
import pytest

from llm_jax import checkpoints, configuration, evaluate, intervals, tokenizers
from llm_jax.data.corpus import Split
from llm_jax.data.rows import Packed, Pairs, Rows
from llm_jax.errors import UserError
from llm_jax.evaluation import held_out as held_out_lib
from llm_jax.evaluation import paired
from llm_jax.evaluation.paired import Units
from llm_jax.tokenizers.byte import ByteTokenizer

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_intervals_cover_the_truth_as_often_as_they_say():
    draw, hits = np.random.default_rng(0), np.zeros(2)
    for _ in range(400):
        hard = draw.random(60)
        right, reference = (draw.random(60) < 0.9 * (1 - hard) + shift for shift in (0.1, 0.0))
        difference, low, high = intervals.difference_of_proportions(right, reference)
        assert difference == np.mean(right) - np.mean(reference) and low <= difference <= high
        sizes = draw.gamma(2.0, 100.0, 25)
        value, lower, upper = intervals.ratio(sizes * (0.2 + draw.normal(0, 0.3, 25)), sizes)
        assert lower < value < upper
        hits += low <= 0.1 <= high, lower <= 0.2 <= upper
    assert ((hits / 400 > 0.92) & (hits / 400 < 0.985)).all()


@pytest.mark.parametrize(("sigma", "count"), [(0.5, 10), (1.5, 10), (1.5, 30)])
def test_the_interval_of_a_ratio_covers_where_sizes_differ_much(sigma, count):
    draw, hits = np.random.default_rng(0), []
    while len(hits) < 1000:
        sizes = draw.lognormal(8, sigma, count)
        _, low, high = intervals.ratio(sizes * (0.1 + draw.normal(0, 0.05, count)), sizes)
        assert math.isnan(low) == math.isnan(high) == (intervals.effective_count(sizes) < 5)
        if not math.isnan(low):
            hits.append(low <= 0.1 <= high)
    assert 0.93 < np.mean(hits) < 0.975


def test_a_document_that_dominates_leaves_no_interval_and_valid_json(monkeypatch, capsys, tiny):
    sizes = np.array([1000.0, *[1.0] * 30])
    assert intervals.effective_count(np.ones(7)) == 7 and intervals.effective_count(sizes) < 2
    units = iter([Units(factor * sizes, sizes, sizes > 0) for factor in (2, 3, 2, 3)])
    monkeypatch.setattr(evaluate, "_measure", lambda *_, **options: {"units": next(units), "tokens": 9})
    several = [evaluate._HeldOut(name, None, tiny, tiny.data, True, 32) for name in "ab"]
    evaluate._compare_text(types.SimpleNamespace(json=True), several, None, {})
    row = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[1]
    assert row["difference"] == 1 and row["low"] is row["high"] is None
    evaluate._compare_text(types.SimpleNamespace(json=False, data=""), several, None, {})
    out = capsys.readouterr().out
    assert "+1.0000 (no interval)" in out and "31 documents correspond to fewer than 5 of equal size" in out
    assert "--data=PATH measures another text" in out


def test_the_interval_of_matched_pairs_is_that_of_the_paper():
    """Agresti and Min 2005: (b* - c*) / N* +- z sqrt(b* + c* - (b* - c*)^2 / N*) / N*, here b = 9, c = 3, N = 100."""
    right, reference = np.zeros((2, 100), bool)
    right[:9], reference[9:12] = True, True
    difference, low, high = intervals.difference_of_proportions(right, reference)
    half = 1.959964 * math.sqrt(13 - 36 / 102) / 102
    assert (difference, low, high) == pytest.approx((0.06, 6 / 102 - half, 6 / 102 + half), rel=1e-6)


def example_split(mask: bool) -> Split:
    """Documents of 5, 1, 9, 3 and 12 tokens."""
    offsets = np.cumsum([0, 5, 1, 9, 3, 12])
    tokens = np.arange(100, 130, dtype=np.uint16)
    return Split(tokens, offsets, 60, np.ones(30, np.uint8) if mask else None)


@pytest.mark.parametrize("rows", [
    Rows(example_split(False), 4), Rows(example_split(False), 8, 3), Packed(example_split(True), 10),
    Pairs(Split(np.arange(100, 120, dtype=np.uint16), np.cumsum([0, 5, 3, 9, 3]), 9, np.ones(20, np.uint8)), 7),
])  # fmt: skip
def test_every_target_counts_for_its_document(rows):
    """A "loss" that is the target: what a document has is the sum of its tokens after the first."""
    units = paired.bits_by_document(
        lambda params, batch: batch["targets"] * batch["mask"], None, rows, np.ones(len(rows.split.offsets) - 1), 2,
        DEVICE,
    )  # fmt: skip
    documents = np.split(rows.split.tokens.astype(int), rows.split.offsets[1:-1])
    sums = np.array([document[1:].sum() for document in documents])
    fits = np.array([len(document) - 1 <= rows.seq_len for document in documents])
    if isinstance(rows, Rows):
        np.testing.assert_allclose(units.values * math.log(2), sums, rtol=1e-6)
        assert units.targets == len(rows.split.tokens) - len(documents)
    else:
        pairs = fits.reshape(-1, 2).all(1).repeat(2) if isinstance(rows, Pairs) else fits
        assert (units.measured == (pairs & (sums > 0))).all() and not pairs.all()
        np.testing.assert_allclose(units.values * math.log(2), np.where(pairs, sums, 0), rtol=1e-6)


def test_only_units_that_all_measured_are_compared():
    first = Units(np.array([2.0, 4.0] * 4 + [9.0]), np.array([1.0, 2.0] * 4 + [3.0]), np.arange(9) < 8)
    second = Units(np.array([3.0, 5.0] * 4 + [1.0]), first.sizes, np.ones(9, bool))
    one, other = paired.compare([first, second], proportions=False)
    assert one == {"units": 8, "value": 2.0} and other["value"] == pytest.approx(8 / 3)
    assert other["difference"] == pytest.approx(2 / 3) and other["low"] < 2 / 3 < other["high"]
    with pytest.raises(UserError, match="no example was measured by all"):
        paired.compare([first, Units(first.values, first.sizes, ~first.measured)], proportions=False)


@pytest.fixture(scope="module")
def other(make, text_file, tmp_path_factory):
    """A model with random weights and a tokenizer of characters."""
    tokenizer = tokenizers.get("char").train([text_file.read_text()], 60)
    model, params = make(vocab_size=tokenizer.vocab_size)
    path = tmp_path_factory.mktemp("other") / "run"
    checkpoints.save(model, params, tokenizer, path)
    return path


def test_held_out_text_of_two_tokenizers(command, trained, other, text_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text()[:6000])
    flags = [f"--checkpoint={trained}", f"--checkpoint={other}", f"--data={text}", "--seq_len=32"]
    alone = [json.loads(command("evaluate", flag, *flags[2:], "--json").stdout) for flag in flags[:2]]
    first, second = json.loads(command("evaluate", *flags, "--json").stdout)
    assert [first["bits_per_byte"], second["bits_per_byte"]] == pytest.approx([a["bits_per_byte"] for a in alone])
    assert second["difference"] == pytest.approx(second["bits_per_byte"] - first["bits_per_byte"])
    assert second["low"] < second["difference"] < second["high"] < 0 and "difference" not in first
    table = command("evaluate", *flags).stdout.splitlines()
    for line, figures in zip(table[2:], alone, strict=False):  # tokens that are predicted, as of one checkpoint
        assert f" {figures['tokens']:,.0f} " in line
    assert re.search(r"documents measured by all; gzip -9 \d", table[0]) and len(table) == 4
    assert re.search(rf"{re.escape(str(other))} .* -\d\.\d{{4}} \(-\d\.\d{{4}} to -\d\.\d{{4}}\)$", table[3])
    for wrong, message in (
        (flags[:2], f"{other} records no training data; set --data=FILE"),
        ([*flags[:2], "--harness=piqa"], "--harness evaluates one --checkpoint"),
        ([flags[0], *flags], f"{flags[0]} is given 2 times; expected different checkpoints"),
    ):
        said = command("evaluate", *wrong, code=2).stderr
        assert message in said and said.count("\n") == 1


def test_checkpoints_with_other_training_data_are_not_compared():
    data = configuration.default("data")
    first = types.SimpleNamespace(name="a", data=data, is_whole_text=False, is_masked=False)
    second = types.SimpleNamespace(name="b", data=dataclasses.replace(data, source="x.txt"), is_masked=False)
    with pytest.raises(UserError, match=r"not measured on the same text \(data.source is 'stdlib' and 'x.txt'\)"):
        held_out_lib.check_same_text([first, second])


def test_a_task_of_two_models(command, trained, other, tmp_path):
    file = tmp_path / "t.jsonl"
    header = {"task": "t", "question": "{text}:", "choices": ["y", "n"]}
    lines = [header, *({"text": t, "answer": a} for t, a in zip("abcdef", "yynnyn", strict=True))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [f"--checkpoint={trained}", f"--checkpoint={other}", f"--task={file}", f"--output={tmp_path / 'out'}"]
    first, second = json.loads(command("evaluate", *flags, "--json").stdout)
    rights = []
    for number, name in enumerate((trained.name, other.name)):
        records = (tmp_path / "out" / f"{number}-{name}" / "t-zero_shot-0.jsonl").read_text().splitlines()[1:]
        rights.append(np.array([json.loads(record)["right"] for record in records]))
    expected = intervals.difference_of_proportions(rights[1], rights[0])
    assert (second["difference"], second["difference_low"], second["difference_high"]) == pytest.approx(expected)
    assert second["accuracy"] - first["accuracy"] == pytest.approx(second["difference"])
    table = command("evaluate", *flags).stdout.splitlines()
    assert len(table) == 3 and "difference from the first" in table[0] and f"{second['difference']:+.3f} (" in table[2]


def test_labelled_examples_of_two_models(command, trained, other, tmp_path):
    file, copy = tmp_path / "l.jsonl", tmp_path / "copy"
    file.write_text(
        "".join(json.dumps({"text": f"line {i}", "label": "no" if i % 3 else "return"}) + "\n" for i in range(12))
    )
    shutil.copytree(trained, copy)
    flags = [f"--data={file}", "--kind=labelled", "--seq_len=160", "--json"]
    alone = json.loads(command("evaluate", f"--checkpoint={trained}", *flags).stdout)
    names = [f"--checkpoint={path}" for path in (trained, copy, other)]
    first, same, third = json.loads(command("evaluate", *names, *flags).stdout)
    assert first["accuracy"] == same["accuracy"] == alone["accuracy"] and first["examples"] == 12
    assert same["difference"] == 0 and same["low"] < 0 < same["high"]
    assert third["difference"] == pytest.approx(third["accuracy"] - first["accuracy"])


def test_what_cannot_be_paired_is_refused_in_one_line(tiny, monkeypatch):
    masked = dataclasses.replace(tiny, loss=dataclasses.replace(tiny.loss, masked="tokens"))
    other = dataclasses.replace(tiny.data, validation_fraction=0.5)

    def held_out(config, data=tiny.data, is_whole_text=False):
        return evaluate._HeldOut("runs/x", None, config, data, is_whole_text, 32)

    for several, message in (
        ([held_out(tiny), held_out(masked)], r"predicts masked tokens \(loss.masked=tokens\)"),
        ([held_out(tiny), held_out(tiny, other)], r"\(data.validation_fraction is .* and 0.5\); give --data=FILE"),
        (
            [held_out(tiny, is_whole_text=True), held_out(tiny, dataclasses.replace(other, kind="labelled"), True)],
            r"\(data.kind is 'text' and 'labelled'\); give --kind, --format and --field",
        ),
    ):
        with pytest.raises(UserError, match=message):
            held_out_lib.check_same_text(several)
    held_out_lib.check_same_text([held_out(tiny, is_whole_text=True), held_out(tiny, other, True)])
    labels = dataclasses.replace(tiny.data, labelled=dataclasses.replace(tiny.data.labelled, label_field="answer"))
    held_out_lib.check_same_text([held_out(tiny), held_out(tiny, labels)])
    held_out_lib.check_same_text([held_out(tiny, is_whole_text=True), held_out(tiny, labels, True)])
    sizes = iter((np.ones(3), np.ones(4)))
    measure = lambda *_, **options: {"units": Units(size := next(sizes), size, size > 0), "tokens": 9}  # noqa: E731
    monkeypatch.setattr(evaluate, "_measure", measure)
    with pytest.raises(UserError, match="cannot be paired: their tokenizers divide the data into different examples"):
        evaluate._compare_text(None, [held_out(tiny), held_out(tiny)], None, {})


def test_figures_that_are_not_finite_are_null_in_json():
    figures = evaluate._finite({"loss": math.nan, "perplexity": math.inf, "tokens": 3, "name": "a"})
    assert figures == {"loss": None, "perplexity": None, "tokens": 3, "name": "a"}


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("x.jsonl", (), "x.jsonl, which has no text file that would be split; omit the flag"),
        ("x.jsonl", ("--kind=labelled",), "where data.kind is labelled: each record is an example; omit the flag"),
        ("x.txt", ("--kind=preferences",), "where data.kind is preferences"),
    ],
)
def test_whole_file_is_refused_where_no_text_file_is_cut(command, trained, tmp_path, name, flags, message):
    path = tmp_path / name
    path.write_text('{"text": "the model reads a token", "label": "a"}\n')
    done = command("evaluate", f"--checkpoint={trained}", f"--data={path}", "--whole_file", *flags, code=2)
    assert message in done.stderr and "--whole_file has no effect" in done.stderr


def test_unknown_tokens_of_the_evaluated_text_are_noted(command, trained, tmp_path, monkeypatch):
    """Bits per byte are too low where the vocabulary lacks a part of the text."""
    path = tmp_path / "x.txt"
    path.write_text("the model reads a token\n\n" * 20)
    flags = (f"--checkpoint={trained}", f"--data={path}")
    assert "unknown to the tokenizer" not in command("evaluate", *flags).stderr
    monkeypatch.setattr(ByteTokenizer, "unk", ByteTokenizer().encode("e")[0])
    done = command("evaluate", *flags, "--json")
    assert re.search(rf"^evaluating {trained} on {path}: \d{{3}} tokens$", done.stderr, re.MULTILINE)
    assert "% of the held-out tokens are unknown to the tokenizer; bits per byte are too low" in done.stderr
    assert json.loads(done.stdout)["tokens"] > 0  # the note is not part of the JSON
