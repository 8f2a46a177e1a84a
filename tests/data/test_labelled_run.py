"""A run on labelled data: trained, evaluated, shown, and used to calibrate quantization."""

import json

import pytest

from tests.data.test_labelled import write


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """300 examples whose label is their first word, and 30 others."""
    root = tmp_path_factory.mktemp("labelled")
    text = lambda i: f"{'good' if i % 2 else 'bad'} film {i}"  # noqa: E731
    for name, numbers in (("train", range(300)), ("other", range(1000, 1030))):
        write(root / f"{name}.jsonl", [{"review": text(i), "stars": 5 if i % 2 else 1} for i in numbers])
    return root


@pytest.fixture(scope="module")
def flags(files):
    options = {
        "source": files / "train.jsonl", "kind": "labelled", "cache_dir": files / "cache",
        "labelled.text_field": "review", "labelled.label_field": "stars", "labelled.thresholds": "(3.0,)",
        "labelled.choices": "('negative','positive')", "labelled.question": "", "labelled.template": "{text}:",
        "labelled.test_size": 60,
    }  # fmt: skip
    return [f"--config.data.{name}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def run(files, flags, command):
    """A run that has learned the labels."""
    settings = ("--config.train.steps=60", "--config.eval.every=0", "--config.checkpoint.every=0")
    done = command("train", f"--workdir={files / 'run'}", *flags, *settings)
    return files / "run", done.stdout


def test_a_run_on_labelled_data_learns_and_is_evaluated(run, files, command):
    workdir, printed = run
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["test_count"] == 60 and summary["test_accuracy"] == summary["test_right"] / 60 > 0.9
    assert 0 <= summary["test_low"] < summary["test_accuracy"] <= summary["test_high"] <= 1
    assert f"test: {summary['test_accuracy']:.1%} of 60 correct, 95 % interval" in printed
    again = json.loads(command("evaluate", f"--checkpoint={workdir}", "--json").stdout)
    assert (again["right"], again["count"]) == (summary["test_right"], 60)
    other = command("evaluate", f"--checkpoint={workdir}", f"--data={files / 'other.jsonl'}", "--json").stdout
    assert json.loads(other)["count"] == 30 and json.loads(other)["accuracy"] > 0.9


def test_rows_of_labelled_data_are_shown(files, flags, command):
    shown = command("show", "rows", "--config=tests/tiny.py", *flags, "--rows=1").stdout.splitlines()
    assert shown[0].startswith("row 0: ") and "in 1 segment, 10 counted targets" in shown[0]
    assert shown[2].startswith("- <bos>") and " film " in shown[2] and shown[2].endswith(":")
    assert shown[3] in ("+  negative<eos>", "+  positive<eos>")


def test_labelled_data_calibrates_quantization(run, files, command):
    quantized = files / "quantized"
    flags = (f"--checkpoint={run[0]}", f"--output={quantized}", "--scheme=int8", "--method=gptq", "--sequences=4")
    assert "calibrating on 4 sequences of 32 tokens" in command("quantize", *flags).stdout
    found = json.loads(command("evaluate", f"--checkpoint={quantized}", "--json").stdout)
    assert found["count"] == 60 and found["accuracy"] > 0.9
