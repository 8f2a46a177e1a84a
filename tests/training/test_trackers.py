"""Experiment trackers: what is logged, redaction of secrets, failing trackers; estimates of `--dry_run`; pictures."""

import json
import re
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import bars, configuration
from llm_jax.errors import UserError
from llm_jax.model.capture import capture
from llm_jax.train import write_report
from llm_jax.training import bad_steps, estimate, measurements, trackers
from llm_jax.training.memory import Memory
from llm_jax.training.progress import Progress
from llm_jax.training.setup import setup


class Recorder:
    """A tracker that records the calls of its methods; the method `fail` raises an error."""

    def __init__(self, fail=""):
        self.calls, self.fail = [], fail

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.fail:
                raise ConnectionError("first line\nhttps://me:pass@host is gone")
            self.calls.append((name, *arguments))

        return call


def test_a_failing_tracker_is_removed_and_the_others_continue(capsys):
    good, bad = Recorder(), Recorder(fail="scalars")
    both = trackers.Trackers({"wandb": bad, "mlflow": good})
    both.text(1, "samples", "see https://me:pass@host")
    both.scalars(2, {"loss": 1.0})
    both.scalars(3, {"loss": 0.5})
    both.finish({"loss": 0.5, "steps": 3, "corpus": {"bytes": 7, "source": "a"}, "stopped": True, "none": None})
    both.close()
    both.close()
    assert [call[0] for call in bad.calls] == ["text"]
    assert good.calls[0] == ("text", 1, "samples", "see https://***@host")
    assert good.calls[1:3] == [("scalars", 2, {"loss": 1.0}), ("scalars", 3, {"loss": 0.5})]
    assert good.calls[3] == ("finish", {"loss": 0.5, "steps": 3, "corpus.bytes": 7}, ())
    assert [call[0] for call in good.calls].count("close") == 1
    note = capsys.readouterr().err
    assert note.count("note: report.to=wandb has failed (https://***@host is gone); the run continues") == 1
    assert not both


def test_secrets_are_redacted_before_a_tracker_begins(tmp_path, monkeypatch):
    received = {}

    def begin(workdir, config, start):
        received.update(config)
        raise RuntimeError("no access with api_key=abc123 to https://me:pass@host/x")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", begin)
    monkeypatch.setattr(trackers, "check", lambda names: None)
    config = {
        "data.source": "https://user:hunter2@host/a?token=abcdef&split=train",
        "eval.prompts": ("hf_abcdefghijklmnopqrst", "The token: is fine"),
        "data.options": "password = 'hunter2'",
        "init_from": "gs://bucket/run",
        "tokenizer.kind": "byte",
        "model.width": 64,
    }
    with pytest.raises(UserError) as error:
        trackers.open_all(("wandb",), tmp_path, config, 0)
    assert "api_key=*** to https://***@host" in str(error.value) and "abc123" not in str(error.value)
    assert received["data.source"] == "https://***@host/a?token=***&split=train"
    assert received["eval.prompts"][0] == "***" and "hunter2" not in json.dumps(received)
    assert {key: received[key] for key in ("init_from", "tokenizer.kind", "model.width")} == {
        key: config[key] for key in ("init_from", "tokenizer.kind", "model.width")
    }
    assert trackers.redact(configuration.flat(configuration.default())) == configuration.flat(configuration.default())


def fake_client(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, name, module)


def test_mlflow_receives_batches_of_limited_size_and_resumes_its_run(tmp_path, monkeypatch):
    calls = []

    class Client:
        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return "7"

        def create_run(self, experiment_id, run_name):
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run{len(calls)}"))

        def __getattr__(self, name):
            return lambda *arguments, **options: calls.append((name, arguments, options))

    entities = types.SimpleNamespace(Metric=lambda *a: a, Param=lambda *a: a)
    fake_client(monkeypatch, "mlflow", types.SimpleNamespace(MlflowClient=Client, entities=entities))
    fake_client(monkeypatch, "mlflow.entities", entities)
    first = trackers.MLflow(tmp_path, {f"key{i}": "x" * 900 for i in range(250)}, 0)
    batches = [options["params"] for name, _, options in calls if name == "log_batch"]
    assert [len(batch) for batch in batches] == [100, 100, 50] and len(batches[0][0][1]) == 500
    first.scalars(4, {f"norm/{i}": 1.0 for i in range(1001)} | {"loss/a?b": 2.0})
    metrics = [options["metrics"] for _, _, options in calls if "metrics" in options]
    assert [len(batch) for batch in metrics] == [1000, 2] and metrics[1][-1][0] == "loss/a_b" and metrics[0][0][3] == 4
    first.close()
    assert calls[-1][:2] == ("set_terminated", ("run0", "KILLED"))
    again = trackers.MLflow(tmp_path, {"key0": "y"}, 4)
    again.finish({"loss": 1.0}, [tmp_path / "report.html"])
    again.close()
    assert calls[-1][:2] == ("set_terminated", ("run0", "FINISHED"))
    assert calls[-2][:2] == ("log_artifact", ("run0", str(tmp_path / "report.html"), "report"))
    assert trackers._recorded(tmp_path, "mlflow") == "run0"
    trackers.MLflow(tmp_path, {}, 0)  # another run in the same directory, from its first step
    assert trackers._recorded(tmp_path, "mlflow") != "run0"


def test_wandb_resumes_its_run_and_uploads_neither_terminal_nor_command(tmp_path, monkeypatch):
    begun = []

    def init(**options):
        begun.append(options)
        return types.SimpleNamespace(config=types.SimpleNamespace(update=lambda *a, **o: None), id=options["id"])

    fake_client(monkeypatch, "wandb", types.SimpleNamespace(init=init, Settings=lambda **o: o))
    monkeypatch.setenv("WANDB_PROJECT", "other")
    trackers.WeightsAndBiases(tmp_path, {}, 0)
    trackers.WeightsAndBiases(tmp_path, {}, 12)
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["project"] == "other"
    trackers.WeightsAndBiases(tmp_path, {}, 0)
    assert begun[2]["id"] != begun[0]["id"]
    (tmp_path / "wandb_run").unlink()  # a run of version 0.1
    trackers.WeightsAndBiases(tmp_path, {}, 12)
    assert begun[3]["id"] == tmp_path.name
    assert begun[0]["settings"]["console"] == "off" and begun[0]["settings"]["x_disable_meta"]


def test_the_progress_bar_shows_the_last_evaluation_and_the_time_left(tmp_path, monkeypatch, capsys):
    config = configuration.default().train
    detector = bad_steps.BadStepDetector(config, ["w"], tmp_path / "metrics.jsonl", 0)
    progress = Progress(tmp_path, 0, 40, 1.0, 1e9, detector, ["w"])
    clock = iter(range(0, 100_000, 30))
    monkeypatch.setattr("llm_jax.training.progress.time.perf_counter", lambda: next(clock))
    metrics = {"loss": 2.0, "tokens": 10.0, "input_tokens": 6000.0, "bad": False, "gradient_norms": jnp.ones(1)}
    for step in range(1, 9):
        progress.step(step, {name: jnp.asarray(value) for name, value in metrics.items()})
        if step == 4:
            progress.flush({}, validation_loss=1.5)
    progress.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert "left" not in lines[0] and "held-out" not in lines[0]
    # 6,000 inputs in 30 s, of which 10 predict a counted target.
    assert re.search(
        r"step 7 of 40: loss 2.000, 200 tokens/s, .* held-out loss 1.500 at step 4, [\d.]+ (min|h) left$",
        "\n".join(lines),
        re.M,
    )


def test_the_report_of_a_run_holds_no_secret(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    config = json.loads((trained / "config.json").read_text())
    config["data"]["source"] = "https://me:hunter2@host/texts"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    sample = {"step": 8, "name": "samples", "text": "token=hunter2 and loss: 3"}
    (tmp_path / "run" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (path,) = write_report(tmp_path / "run")
    page = path.read_text()
    assert "hunter2" not in page and "https://***@host/texts" in page and "and loss: 3" in page


def test_the_entropy_of_attention_is_that_of_the_captured_probabilities(make):
    model, params = make()
    ids = jax.random.randint(jax.random.key(0), (2, 150), 3, 259)
    positions = jnp.broadcast_to(jnp.arange(150), ids.shape)
    batch = {"inputs": ids, "positions": positions, "segments": jnp.ones_like(ids)}
    statistics = jax.jit(measurements.layer_statistics(model))(params, batch)
    assert {kind: list(values) for kind, values in statistics.items()} == {
        kind: ["layers/0", "layers/1"] for kind in ("activation", "attention_entropy")
    }
    for layer, probabilities in enumerate(capture(model, params, ids).attentions):
        probabilities = np.asarray(probabilities)[:, :, ::3]  # 50 of 150 queries: at most 64
        entropy = -np.sum(probabilities * np.log(np.maximum(probabilities, 1e-30)), -1).mean()
        assert statistics["attention_entropy"][f"layers/{layer}"] == pytest.approx(entropy, rel=1e-5)


def test_durations_are_formatted_in_one_unit():
    assert [bars.duration(s) for s in (0.2, 89, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]


def test_an_estimate_includes_evaluations_and_checkpoints_and_runs_no_step_that_does_not_fit(
    tiny, tmp_path, monkeypatch
):
    config = configuration.replace(tiny, {"train.steps": 10, "eval.every": 3, "eval.rows": 9, "checkpoint.every": 2})
    parts = setup(config, 259)
    held_out = {"": 20, "a": 4}
    # Evaluations at 3, 6 and 9 of 9 and 4 rows, in batches of 8, and at 10 of 20 and 4.
    assert estimate._evaluation_batches(config, held_out, 0) == 3 * (2 + 1) + (3 + 1)
    assert estimate._evaluation_batches(config, held_out, 6) == 1 * (2 + 1) + (3 + 1)
    assert estimate._evaluation_batches(config, {}, 0) == 0
    result = estimate.estimate(parts, held_out, tmp_path / "not" / "there")
    assert result.step_seconds > 0 and result.batch_seconds > 0 and 1 <= result.timed_steps <= 5
    expected = result.compile_seconds + 10 * result.step_seconds + 13 * result.batch_seconds
    assert result.seconds == pytest.approx(expected)
    weights = sum(leaf.size for leaf in jax.tree.leaves(parts.state.params))
    assert result.checkpoint_bytes == pytest.approx(3 * 4 * weights, rel=0.01)  # weights and two moments of Adam
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    assert result.checkpoints == min(5, kept) and result.free_disk > 0
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(estimate.runtime, "available_memory", lambda: result.memory.peak)
    small = estimate.estimate(parts, held_out, tmp_path)
    assert small.seconds is None and small.timed_steps == 0 and small.memory == result.memory
    text = estimate.describe(small, config, 0)
    assert "time: not measured, because the step needs more memory than is free" in text
    monkeypatch.setattr(estimate.runtime, "available_memory", lambda: 1000)
    monkeypatch.delattr(estimate.memory, "of_executable")  # nothing is compiled
    none = estimate.estimate(parts, held_out, tmp_path)
    assert none.seconds is None and none.memory.peak == pytest.approx(3 * 4 * weights, rel=0.01)
    lines = [line for line in estimate.describe(none, config, 0).splitlines() if "memory" in line]
    assert len(lines) == 1 and lines[0].startswith("memory: not enough: weights and optimizer alone take ")


def test_the_text_of_an_estimate_has_the_measured_figures():
    needs = estimate.RunEstimate(
        compile_seconds=30.0,
        step_seconds=0.5,
        timed_steps=5,
        batch_seconds=0.25,
        steps=700,
        evaluation_batches=40,
        memory=Memory(2**30, 2**31, 0, 2**29),
        free_memory=2**33,
        checkpoint_bytes=2**29,
        checkpoints=3,
        free_disk=2**30,
        spent_seconds=41.0,
    )
    config = configuration.default()
    lines = estimate.describe(needs, config, 700 * config.train.batch_size * config.train.seq_len // 2).splitlines()
    assert lines[0].endswith("tokens (2.00 passes over the text)") and lines[0].startswith("to do: 700 steps of")
    assert (
        lines[1].startswith("time: about 6 min: 700 steps of 0.5 s") and "10 s of evaluations, 30 s of comp" in lines[1]
    )
    assert lines[2].startswith("memory: 3.0 GiB on each device") and lines[2].endswith("8.0 GiB are free")
    assert lines[3] == "disk: 1.5 GiB: 3 checkpoints of 512.0 MiB; 1.0 GiB are free"
    assert (
        lines[4].startswith("warning: the checkpoints do not fit on the disk")
        and "measured in 41 s with 5 steps" in lines[5]
    )


def test_pictures_are_drawn_with_every_evaluation_and_given_to_the_trackers(command, tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda workdir, config, start: recorder)
    flags = ["--config.report.to=('tensorboard',)", "--config.report.pictures=('attention','quantization')"]
    flags += ["--config.train.steps=3", "--config.eval.every=2", "--config.eval.prompts=('the model',)"]
    done = command("train", f"--workdir={tmp_path}", *flags)
    pictures = [(step, name, path) for kind, step, name, path in (c for c in recorder.calls if c[0] == "picture")]
    assert [(step, name) for step, name, _ in pictures] == [(2, "pictures/attention"), (3, "pictures/attention")]
    assert pictures[0][2] == tmp_path / "pictures" / "attention-2.png"
    assert all(path.read_bytes().startswith(b"\x89PNG") for _, _, path in pictures)
    assert done.stdout.count("no picture 'quantization' (") == 2  # the groups of nf4 do not divide this model
    finished = next(call for call in recorder.calls if call[0] == "finish")
    assert finished[2] == [tmp_path / "report.html"] and finished[1]["steps"] == 3


def test_pictures_without_a_prompt_are_rejected_before_training(command, tmp_path):
    for flags, message in (
        (["--config.report.pictures=('atention',)"], "'report.pictures' is 'atention'; expected one of attention"),
        (["--config.report.pictures=('surprisal',)"], "report.pictures=surprisal needs a text; set eval.pr"),
    ):
        assert message in command("train", f"--workdir={tmp_path / 'x'}", *flags, code=2).stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://x.net/a?sv=1&sig=AbC%2Fd&e=2", "https://x.net/a?sv=1&sig=***&e=2"),
        ("aws_secret_access_key=abc/def", "aws_secret_access_key=***"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        ("password = 'hunter 2 x' end", "password = *** end"),
        ("s3://user:p/w@host/data", "s3://***@host/data"),
        ("the key of C, tokens a second", "the key of C, tokens a second"),
    ],
)
def test_more_forms_of_secrets_are_replaced(text, expected):
    assert trackers.redact(text) == expected
