"""Runs on very little text: nothing held out, a document of a few words, files without a last newline."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest

import llm_jax
from llm_jax import bars, configuration
from llm_jax.data.kinds import open_source
from llm_jax.errors import UserError
from llm_jax.evaluation import held_out as held_out_lib
from llm_jax.training import inputs, trackers, trainer
from llm_jax.training import start as start_lib
from tests.conftest import ROOT
from tests.data.configs import data_config
from tests.tokenizers.chat_cases import TEMPLATES
from tests.tokenizers.test_chat_golden import with_template
from tests.training.test_trackers import Recorder

WORDS = ("the model reads a token and then the token after it returns one line of text " * 13).split()[:200]


def records(*rows):
    return "\n".join(json.dumps(row) for row in rows)  # no newline at the end


FILES = {
    "text": ("words.txt", " ".join(WORDS)),
    "short": ("short.txt", " ".join(WORDS)[:120]),
    "lines": ("text.jsonl", records(*({"text": " ".join(WORDS[i : i + 20])} for i in range(0, 200, 20)))),
    "instructions": ("i.jsonl", records(*({"prompt": f"say {w}", "answer": w} for w in sorted(set(WORDS))))),
    "preferences": (
        "p.jsonl",
        records(*({"prompt": "say", "chosen": w, "rejected": f"{w}x"} for w in sorted(set(WORDS)))),
    ),
    "labelled": ("l.csv", "text,label\n" + "\n".join(f"say {w},{len(w) % 2}" for w in sorted(set(WORDS)))),
}


@pytest.fixture
def config_of(tmp_path):
    """config_of(name of FILES, **changes) -> a checked configuration of a tiny run on this file."""

    def make(name, **changes):
        file, text = FILES[name]
        (tmp_path / file).write_text(text)
        kind = name if name in ("instructions", "preferences", "labelled") else "text"
        options = {"data.source": str(tmp_path / file), "data.cache_dir": str(tmp_path / "cache"), "data.kind": kind}
        options |= {"data.labelled.test_size": 0.0, "data.labelled.validation_size": 0.0, "train.seq_len": 100}
        options |= {"train.steps": 2, "optim.warmup_steps": 0, "eval.every": 1}
        return configuration.load(
            ROOT / "tests" / "tiny.py", options | {k.replace("__", "."): v for k, v in changes.items()}
        )

    return make


def test_a_batch_that_cannot_fit_is_refused_before_its_rows_are_built(config_of):
    """Building its rows would take minutes, during which a signal waits for the end of the step."""
    config = config_of("text", train__batch_size=10**9, train__grad_accumulation=10**3)
    message = (
        "train.batch_size=1000000000 rows of train.seq_len=100 tokens with model.width=[0-9]+ and .* need more than "
    )
    with pytest.raises(UserError, match=message):
        trainer.check(config)
    with pytest.raises(UserError, match="need more than .* GiB"):  # the scores of its attention
        trainer.check(config_of("text", data__source="no such text", train__seq_len=10**6))


def test_a_workdir_that_cannot_be_written_is_refused_before_the_data_is_read(config_of, tmp_path):
    config = config_of("text", data__source="no such text")
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot be written to \(.*file is not a directory\)"):
            trainer.train(config, workdir, verbose=False)
    with pytest.raises(UserError, match=r"cannot be written to \(/proc: No such file"):  # though root has permission
        trainer.train(config, "/proc/a/b", verbose=False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_every_kind_of_data_is_read_to_its_last_byte(name, fraction, config_of):
    """With nothing held out, all of the file is trained on; otherwise something is held out, of however little."""
    config = config_of(name, data__validation_fraction=fraction, train__seq_len=32 if name == "short" else 100)
    data = inputs.load(config)
    corpus = open_source(config.data).corpus(data.tokenizer)
    assert (len(corpus.validation.tokens) == 0) == (fraction == 0) == (data.held_out is None)
    text = data.tokenizer.decode(corpus.train.tokens.tolist()) + data.tokenizer.decode(
        corpus.validation.tokens.tolist()
    )
    if name in ("text", "short"):
        assert sorted(text) == sorted(FILES[name][1])
    else:
        assert all(word in text for word in set(WORDS))
    description = inputs.describe(config, data)
    assert ("nothing held out" in description) == (fraction == 0)
    share = data.num_tokens[1] / sum(data.num_tokens)
    assert ("not data.validation_fraction=0.1: documents" in description) == (
        config.data.kind == "text" and share > 0.2
    )
    if name == "preferences" and fraction == 0:  # a row for each answer
        rows = 2 * len(set(WORDS))
        assert f"an epoch has {rows} rows of 100 tokens; train.steps=2 with train.batch_size=" in description
        assert f" is {2 * config.train.batch_size / rows:,.2f} epochs" in description


@pytest.mark.parametrize("size", [12, 60])
def test_a_note_says_how_much_of_the_held_out_text_is_unknown(size, config_of):
    """With 12 ids, the vocabulary lacks most characters of the text, and bits per byte would look good."""
    config = config_of("text", data__validation_fraction=0.1, tokenizer__kind="char", tokenizer__vocab_size=size)
    data = inputs.load(config)
    held_out = data.held_out.split.tokens
    share = np.mean(held_out == data.tokenizer.unk)
    note = f"note: {share:.0%} of the held-out tokens are unknown to the tokenizer; bits per byte are too low"
    assert (note in inputs.describe(config, data)) == (share > 0.1) == (size == 12)
    assert held_out_lib.unknown_note(data.tokenizer, held_out[:0]) == ""


@pytest.mark.parametrize("kind", ["bytes", "chat"])
def test_empty_answers_are_counted(kind, config_of, monkeypatch):
    records_of = [{"prompt": f"say {i}", "answer": "" if i < 30 else "yes"} for i in range(40)]
    monkeypatch.setitem(FILES, "instructions", ("i.jsonl", records(*records_of)))
    config = config_of("instructions", data__validation_fraction=0.0)
    start = start_lib.find(config)
    if kind == "chat":
        tokenizer = with_template("bytelevel", TEMPLATES["chatml"])
        config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, kind=tokenizer.kind))
        start = dataclasses.replace(start, config=config)
        monkeypatch.setattr(start_lib.Start, "tokenizer", tokenizer)
    data = inputs.load(config, start)
    assert data.empty_answers == 30
    assert "note: 30 training examples have an empty answer" in inputs.describe(config, data)


def test_a_run_without_held_out_text(config_of, tmp_path, capsys, command):
    config = config_of("text", data__validation_fraction=0.0)
    summary = llm_jax.train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "nothing held out (data.validation_fraction=0)" in said
    assert "held-out: no text (data.validation_fraction=0); the model was trained on all text" in said
    assert summary["steps"] == 2 and summary["compressed_bits_per_byte"] == {}
    assert not [name for name in summary if name.startswith("validation")]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and "validation_loss" not in lines[1]
    refused = command("evaluate", f"--checkpoint={tmp_path / 'run'}", code=2).stderr
    assert "has no held-out data (data.validation_fraction=0); set --data=FILE" in refused and refused.count("\n") == 1


def test_prompts_that_are_not_set_are_the_first_words_of_the_held_out_text(config_of):
    prompts = configuration.default("eval").prompts
    unset = config_of("text", eval__prompts=prompts)
    unset = dataclasses.replace(unset, explicit=unset.explicit - {"eval.prompts"})
    data = inputs.load(unset)
    text = data.tokenizer.decode(open_source(unset.data).corpus(data.tokenizer).validation.tokens.tolist())
    first, *others = data.config.eval.prompts
    assert text.startswith(first) and len(first.split()) == 4 and len(others) <= 1
    assert inputs.load(config_of("text", eval__prompts=prompts)).config.eval.prompts == prompts  # set, to the default
    assert inputs.load(config_of("text", eval__prompts=("a",))).config.eval.prompts == ("a",)
    everything = configuration.replace(unset, {"data.validation_fraction": 0.0})
    assert " ".join(WORDS).startswith(inputs.load(everything).config.eval.prompts[0])
    pairs = config_of("instructions", eval__prompts=prompts)
    pairs = dataclasses.replace(pairs, explicit=pairs.explicit - {"eval.prompts"})
    assert inputs.load(pairs).config.eval.prompts == ()


def test_the_best_checkpoints_need_held_out_text(config_of):
    with pytest.raises(UserError, match="checkpoint.keep_best=2 compares held-out losses, but no text is held out"):
        inputs.load(config_of("text", data__validation_fraction=0.0, checkpoint__keep_best=2))


def test_one_document_cannot_be_divided(config_of, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "only.txt").write_text("one document")
    with pytest.raises(UserError, match=r"the corpus is one document \(only.txt\).*set data.validation_fraction=0"):
        inputs.load(config_of("text", data__source=str(tmp_path / "folder")))
    with pytest.raises(UserError, match="'data.validation_fraction' is 1.0; expected 0 or a number below 1"):
        inputs.load(config_of("text", data__validation_fraction=1.0))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["text", "instructions", "preferences"])
def test_a_source_of_a_mixture_whose_documents_are_all_held_out_is_named(name, weighted, config_of, tmp_path):
    """Without weights the other source is trained on alone."""
    config = config_of(name, data__validation_fraction=0.5)
    (tmp_path / "one").mkdir()
    line = {"text": '{"text": "a b"}', "instructions": records({"prompt": "a", "answer": "b"})}
    line |= {"preferences": records({"prompt": "a", "chosen": "b", "rejected": "c"})}
    (tmp_path / "one" / "one.jsonl").write_text(line[name])
    weights = ("@0.7", "@0.3") if weighted else ("", "")
    sources = (tmp_path / FILES[name][0], tmp_path / "one")
    messages = []
    for fraction in (0.02, 0.5, 0.97):  # the order of the hashes decides which documents are held out
        source = ",".join(f"{path}{weight}" for path, weight in zip(sources, weights, strict=True))
        changes = {"data.source": source, "data.validation_fraction": fraction, "train.seq_len": 8}
        try:
            rows = inputs.load(configuration.replace(config, changes)).train
            assert all(rows[i]["mask"].any() for i in range(4))
        except UserError as error:
            messages.append(str(error))
    unit = {"text": "documents", "instructions": "examples", "preferences": "pairs"}[name]
    expected = f"data.source: {sources[1]}: all of its {unit} are held out; add {unit}, or set "
    assert (expected + "data.validation_fraction=0" in messages) == weighted, messages


def test_headers_of_compressed_formats_do_not_count(tmp_path):
    """14 bytes that do not repeat take no more than 9 bits each; with headers gzip has 19 and xz 42 bits per byte."""
    (tmp_path / "a.txt").write_text("qwertyuiopasdf")
    figures = open_source(data_config(tmp_path / "a.txt", tmp_path / "cache"), whole=True).compressed_bits_per_byte()
    assert 8 < figures["gzip -9"] < 9.5 and 8 < figures["xz -9"] < 13


def test_the_last_evaluation_has_its_own_number_of_rows(config_of):
    """A line says how many rows it has, unless all evaluations have all; without one of its own, it has eval.rows."""
    changes = {"data__validation_fraction": 0.4, "train__seq_len": 32}

    def evaluator(rows, final):
        prepared = trainer.prepare(config_of("lines", **changes, eval__rows=rows, eval__final_rows=final))
        return prepared, trainer.Evaluator(prepared.setup, prepared.data, {})

    for rows, final, message in (
        (0, 0, ""),
        (1, 0, "held-out rows$"),
        (99, 0, ""),
        (2, 2, r": 2 of .* \(eval.final_rows=2\)$"),
        (0, 2, ": 2 of"),
        (2, -1, ": 2 of"),
    ):
        note = evaluator(rows, final)[1].final_note()
        assert re.search(message, note) and bool(message) == bool(note)
    prepared, few = evaluator(1, 3)
    state, counted = prepared.setup.init(), [int(prepared.data.held_out[i]["mask"].sum()) for i in range(3)]
    assert few.evaluate(state, final=False)["validation_tokens"] == counted[0]
    assert few.evaluate(state, final=True)["validation_tokens"] == sum(counted)


def test_the_final_evaluation_has_scalars_of_its_own(config_of, tmp_path, monkeypatch):
    """Those of the periodic evaluations do not jump at the last step, unless it is over the same rows."""
    for rows, expected in ((2, [1]), (0, [1, 2])):
        recorder = Recorder()
        monkeypatch.setattr(trackers, "open_all", lambda *arguments, r=recorder: trackers.Trackers({"wandb": r}))
        rows_of_each = {"eval__rows": rows, "eval__final_rows": 0}
        config = config_of("lines", data__validation_fraction=0.4, train__seq_len=32, **rows_of_each)
        summary = trainer.train(config, tmp_path / f"run{rows}", verbose=False)
        scalars = [call[1:] for call in recorder.calls if call[0] == "scalars"]
        assert [step for step, values in scalars if "validation_loss" in values] == expected
        final = {name: values for _, line in scalars for name, values in line.items() if name.startswith("final/")}
        assert final["final/validation_loss"] == summary["validation_loss"] and scalars[-1][0] == 2
        assert final["final/validation_rows"] == summary["validation_rows"] > 2
        lines = [json.loads(text) for text in (tmp_path / f"run{rows}" / "metrics.jsonl").read_text().splitlines()]
        counts = [line["validation_rows"] for line in lines if "validation_loss" in line]
        assert counts == [rows or summary["validation_rows"], summary["validation_rows"]]


def test_a_quiet_run_prints_nothing(config_of, tmp_path, capsys):
    """No skipped step or profile either. A spike factor below 1 makes steps after the first 20 bad ones."""
    changes = {"train__on_bad_step": "skip", "train__spike_factor": 0.99, "train__steps": 22, "eval__every": 0}
    changes |= {"optim__schedule": "constant", "optim__lr": 0.0}
    llm_jax.train(config_of("text", **changes), tmp_path / "quiet", profile=True, verbose=False)
    assert capsys.readouterr() == ("", "") and (tmp_path / "quiet" / "profile").is_dir()
    lines = [json.loads(line) for line in (tmp_path / "quiet" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("bad") for line in lines)


def test_bars_show_in_a_terminal_and_can_be_switched_off():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    files = [Terminal(), Terminal(), io.StringIO()]
    list(bars.bar([1, 2], file=files[0]))
    with bars.off():
        list(bars.bar([1, 2], file=files[1]))
    list(bars.bar([1, 2], file=files[2]))
    assert [bool(file.getvalue()) for file in files] == [True, False, False]
