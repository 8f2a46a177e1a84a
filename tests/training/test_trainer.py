"""The trainer as a process: messages, signals, full disks, bad steps, trackers."""

import copy
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import time

import jax.numpy as jnp
import pytest

import llm_jax
from llm_jax import checkpoints, trees
from llm_jax.errors import UserError
from llm_jax.training import attempts as attempts_lib
from llm_jax.training import profiler, trackers
from tests.conftest import ROOT


def wait_for_step(process, workdir, step):
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        time.sleep(0.01)


def lines(workdir):
    clock = ("seconds", "tokens_per_second", "mfu")
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in found]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_has_its_own_exit_code(command, tmp_path, number):
    flags = ("--config.train.steps=100000", "--config.eval.every=0", "--config.checkpoint.every=0")
    process = command("train", f"--workdir={tmp_path}", *flags, start=True)
    wait_for_step(process, tmp_path, 2)
    other = command("train", f"--workdir={tmp_path}", *flags, code=2)
    assert f"another trainer is at work here (process {process.pid} on " in other.stderr
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    step = checkpoints.steps(tmp_path)[-1]
    assert f"saved at step {step} of 100000 in {tmp_path}; the same command resumes" in errors
    assert lines(tmp_path)[-1]["step"] == step
    checkpoints.verify(checkpoints.find(tmp_path))
    attempts = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert len(attempts) == 1 and attempts[0]["ended"] > attempts[0]["began"]
    assert 0 < attempts_lib.goodput(tmp_path) < 1


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("x", "the same command starts again from step 0 (there is no checkpoint yet)"),
        ("x/checkpoints/.partial-9", "the same command starts again from step 0 (there is no checkpoint yet)"),
        ("x/checkpoints/40", "the same command resumes from the checkpoint of step 40"),
        ("", "the same command resumes from the last checkpoint, or from step 0 without one"),
    ],
)
def test_an_interrupt_tells_where_the_same_command_starts(tmp_path, directory, message):
    (tmp_path / directory).mkdir(parents=True, exist_ok=True)
    command = importlib.import_module("llm_jax.train").COMMAND
    values = copy.deepcopy(command.flags)
    values["workdir"].value = str(tmp_path / "x") if directory else None
    assert command.message_on_interrupt(values) == f"interrupted; {message}"


@pytest.mark.uncached
def test_an_interrupted_run_rolls_back_the_same_spikes(text_file, cache, tmp_path):
    # Nothing is learned at this rate: the loss goes up and down around ln 259, depending on the batch.
    changes = {"data.source": str(text_file), "data.cache_dir": str(cache), "train.steps": 60, "train.batch_size": 2}
    changes |= {"optim.lr": 1e-9, "train.on_bad_step": "rollback", "train.spike_factor": 1.0045, "checkpoint.every": 6}
    changes |= {"model.num_layers": 1, "model.scan_layers": False, "eval.every": 60}
    config = llm_jax.config(ROOT / "tests" / "tiny.py", changes)
    a, b = tmp_path / "a", tmp_path / "b"

    def skipped_batches(workdir):
        return checkpoints.verify(checkpoints.find(workdir))["skipped_batches"]

    llm_jax.train(config, a, verbose=False)
    calls = itertools.count(1)
    stopped = llm_jax.train(config, b, stop=lambda: next(calls) == 40, verbose=False)
    assert stopped["stopped"] and len(lines(b)) == stopped["steps"] < 60
    assert 0 < skipped_batches(b) < skipped_batches(a)  # spikes on both sides of the interruption
    llm_jax.train(config, b, verbose=False)
    assert skipped_batches(b) == skipped_batches(a) and lines(b) == lines(a)
    assert [line["step"] for line in lines(a)] == list(range(1, 61))


def test_the_error_of_a_non_finite_loss_names_step_and_weights(command, tmp_path):
    flags = ("train", f"--workdir={tmp_path}", "--config.optim.lr=1e30", "--config.optim.clip_norm=0.0")
    error = command(*flags, code=2).stderr.strip().splitlines()[-1]
    assert error.startswith("error: step 2: the loss is 5.5") and "the gradient of embed/table, layers/0" in error
    assert "set train.on_bad_step to skip or rollback" in error
    error = command(*flags, "--config.train.on_bad_step=skip", code=2).stderr.strip().splitlines()[-1]
    assert "3 consecutive steps were bad; lower optim.lr, or set train.on_bad_step=rollback" in error
    error = command(*flags, "--config.train.on_bad_step=rollback", code=2).stderr.strip().splitlines()[-1]
    assert "3 rollbacks to step 0 have not helped" in error


def test_a_full_disk_loses_no_checkpoint(command, trained, tmp_path):
    """A limit on the size of files stands for the full disk: arrays do not fit, small files do."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    before = checkpoints.verify(checkpoints.find(tmp_path))
    flags = ("train", f"--workdir={tmp_path}")
    done = command(*flags, code=2, largest_file=20_000)
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "the checkpoint cannot be written" in error and "the last checkpoint is of step 4" in error
    assert checkpoints.steps(tmp_path) == [4] and checkpoints.verify(checkpoints.find(tmp_path)) == before
    assert not list((tmp_path / "checkpoints").glob(".partial*"))
    command(*flags)


def test_a_profile_of_a_finished_run_prints_a_note(tmp_path):
    lines: list[str] = []
    for start, enabled in ((8, True), (8, False), (7, True)):
        profiler.Profiler(tmp_path, start, 8, enabled, lines.append)
    assert lines == ["note: --profile writes no trace: the run has already reached train.steps=8"]


def test_tensorboard_gets_figures_norms_and_samples(command, tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    flags = ("--config.report.to=('tensorboard',)", "--config.report.norms_every=4", "--config.report.samples_every=4")
    command("train", f"--workdir={tmp_path}", *flags, "--config.eval.prompts=('the ',)", "--profile")
    seen: dict[str, list[int]] = {}
    hyperparameters: set[bytes] = set()
    for path in (tmp_path / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # a record: length, checksum, event, checksum
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                seen.setdefault(value.tag, []).append(event.step)
                hyperparameters |= set(re.findall(rb"optim\.lr|validation_loss", value.metadata.plugin_data.content))
    # The final evaluation is over other rows (eval.final_rows=0) than the periodic ones (eval.rows=8).
    assert seen["loss"] == list(range(1, 9)) and seen["validation_loss"] == [4]
    assert seen["final/validation_loss"] == seen["final/validation_bits_per_byte"] == [8]
    for kind in ("gradient_norm/layers/1/mlp/up", "update_norm/embed/table", "update_norm"):
        assert seen[kind] == [1, 4, 8]
    for kind in (
        "activation_norm/layers/0",
        "parameter_norm/embed/table",
        "parameter_norm",
        "attention_entropy/layers/1",
    ):
        assert seen[kind] == [4, 8]
    assert hyperparameters == {b"optim.lr", b"validation_loss"} and "_hparams_/session_end_info" in seen
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    table = trees.flatten(llm_jax.load(tmp_path).params)["embed/table"]
    assert last["norms"]["parameter"]["embed/table"] == pytest.approx(float(jnp.linalg.norm(table)), rel=1e-5)
    assert all(0 < entropy < math.log(32) for entropy in last["attention_entropy"].values())
    assert seen["samples/text_summary"] == [4, 8]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [4, 8] and "the " in samples[0]["text"]
    assert list((tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["goodput"] < 1 and summary["peak_host_bytes"] > 10**8


def test_tasks_are_evaluated_during_and_after_training(command, tmp_path):
    examples = [{"question": f"{i} + {i} =", "answer": 2 * i} for i in range(5)]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, examples)))
    flags = ("--config.eval.tasks=('FILE',)".replace("FILE", str(file)), "--config.eval.task_examples=2")
    done = command("train", f"--workdir={tmp_path / 'run'}", *flags)
    said = [line["task_sums"] for line in lines(tmp_path / "run") if "task_sums" in line]
    assert len(said) == 2 and all(0 <= share <= 1 for share in said) and "sums" in done.stdout
    counts = [line["task_examples/sums"] for line in lines(tmp_path / "run") if "task_sums" in line]
    assert counts == [2, 5]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["task_sums"] == said[-1]
    flags = ("--config.eval.tasks=('summing',)",)
    assert "the task 'summing' is unknown" in command("train", f"--workdir={tmp_path / 'x'}", *flags, code=2).stderr


def test_invalid_report_options_are_one_line_errors(command, tmp_path, monkeypatch):
    done = command("train", f"--workdir={tmp_path / 'x'}", "--config.report.to=('tensorbord',)", code=2)
    assert "'report.to' is 'tensorbord'; expected one of mlflow, tensorboard, wandb" in done.stderr
    assert not (tmp_path / "x").exists()
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else installed(name))
    with pytest.raises(UserError, match="report.to=wandb needs the package wandb; pip install wandb"):
        trackers.open_all(("wandb",), tmp_path, {}, 0)


def test_goodput_counts_the_time_of_killed_attempts(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    metrics = tmp_path / "metrics.jsonl"
    attempts_lib.begin(tmp_path, 0)
    metrics.write_text("".join(json.dumps({"step": s, "seconds": 9.0 if s == 1 else 1.0}) + "\n" for s in range(1, 6)))
    os.utime(metrics, (120.0, 120.0))  # killed 20 seconds after it began
    clock[0] = 500.0
    attempts_lib.begin(tmp_path, 5)
    clock[0] = 530.0
    attempts_lib.end(tmp_path)
    assert attempts_lib.goodput(tmp_path) == pytest.approx(5 * 1.0 / (20 + 30))


def test_goodput_survives_a_clock_that_is_set_back(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 1.0}) + "\n")
    attempts_lib.begin(tmp_path, 0)
    clock[0] = 10.0
    attempts_lib.end(tmp_path)
    assert attempts_lib.goodput(tmp_path) is None
    attempts_lib.begin(tmp_path, 1)
    clock[0] = 10.5
    attempts_lib.end(tmp_path)
    assert attempts_lib.goodput(tmp_path) == 1.0


@pytest.mark.parametrize(
    ("flag", "message"), [("--config.data.source=", "data.source is empty"), ("--workdir=", "--workdir is empty")]
)
def test_an_empty_workdir_is_rejected(command, tmp_path, flag, message):
    """Such as that of a shell variable that is not set."""
    flags = [flag] if flag == "--workdir=" else [f"--workdir={tmp_path}", flag]
    done = command("train", *flags, code=2)
    assert message in done.stderr and not list(tmp_path.iterdir())
