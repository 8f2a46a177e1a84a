"""Training in several real processes on this machine."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from llm_jax import checkpoints
from tests.conftest import ROOT

FIGURES = ("loss", "grad_norm", "validation_loss")


@pytest.fixture(scope="session")
def launch(text_file, cache):
    """launch(number of processes, workdir, *flags, module="llm_jax.train") -> the running launcher."""

    def start(count, workdir, *flags, module="llm_jax.train"):
        full = [
            *(sys.executable, "-m", "llm_jax.parallel.launcher", str(count), module),
            *(f"--config={ROOT / 'tests' / 'tiny.py'}", f"--workdir={workdir}"),
            *(f"--config.data.source={text_file}", f"--config.data.cache_dir={cache}", *flags),
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(
            full, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.fixture(scope="session")
def run(launch):
    """run(number of processes, workdir, *flags, code=0) runs to the end and returns (stdout, stderr)."""

    def finish(*arguments, code=0, **options):
        process = launch(*arguments, **options)
        out, errors = process.communicate(timeout=300)
        assert process.returncode == code, out + errors
        return out, errors

    return finish


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(a, b, tolerance=2e-3):
    expected, actual = lines(a), lines(b)
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for line, other in zip(expected, actual, strict=True):
        for name in FIGURES:
            assert (name in line) == (name in other)
            assert other.get(name) == (pytest.approx(line[name], rel=tolerance) if name in line else None)


def process_ids(workdir) -> dict[int, int]:
    """{number of the process: process id} of the trainers of a workdir."""
    found = {}
    for entry in pathlib.Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if f"--workdir={workdir}" in words and "llm_jax.parallel.launcher" not in words:
            found |= {int(w.partition("=")[2]): int(entry.name) for w in words if w.startswith("--process_id=")}
    return found


def wait_for_step(launcher, workdir, step):
    path = workdir / "metrics.jsonl"
    while launcher.poll() is None and not (path.exists() and len(path.read_text().splitlines()) >= step):
        time.sleep(0.02)
    assert launcher.poll() is None, launcher.communicate()


def test_two_processes_train_as_one_does(run, trained, tmp_path):
    out, _ = run(2, tmp_path / "run")
    assert_same_losses(trained, tmp_path / "run", tolerance=1e-4)
    checkpoints.verify(tmp_path / "run" / "checkpoints" / "8")
    assert "1: step" not in out and "0: step 8 of 8" in out
    assert "2 cpu device(s)" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_loss"] == lines(tmp_path / "run")[-1]["validation_loss"]
    assert not (tmp_path / "run" / ".shared").exists()


MESHES = {
    "data": (4, ()),
    "fsdp": (4, ("--config.mesh.data=1", "--config.mesh.fsdp=4")),
    "tensor": (4, ("--config.mesh.data=2", "--config.mesh.tensor=2")),
    "two devices each": (2, ("--devices=2", "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")),
}


@pytest.mark.slow
def test_samples_and_tasks_are_those_of_process_0(run, tmp_path):
    task = tmp_path / "sums.jsonl"
    task.write_text("\n".join(json.dumps({"question": f"{i} + {i} =", "answer": 2 * i}) for i in range(5)))
    flags = ("--config.eval.prompts=('the ',)", "--config.report.samples_every=4", f"--config.eval.tasks=('{task}',)")
    out, _ = run(
        2, tmp_path / "run", *flags, "--config.report.norms_every=4", "--config.mesh.fsdp=2", "--config.mesh.data=1"
    )
    for title in ("before training", "after 4 steps", "after training"):
        assert f"0: ----- {title}" in out and f"1: ----- {title}" not in out
    assert all("task_sums" in line and "activation" in line["norms"] for line in lines(tmp_path / "run")[3::4])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_of_processes_gives_the_losses_of_one(run, trained, tmp_path, mesh):
    count, flags = MESHES[mesh]
    run(count, tmp_path / "run", *flags)
    assert_same_losses(trained, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "two devices each"])
def test_a_process_may_compile_much_longer_than_the_others(run, trained, tmp_path, mesh):
    """A delay of 40 seconds before the first training step; Gloo connects processes within 30 seconds only."""
    _, flags = MESHES[mesh]
    run(2, tmp_path / "run", *flags, module="tests.parallel.slow_process")
    assert_same_losses(trained, tmp_path / "run")


@pytest.mark.slow
def test_a_process_that_is_killed_while_another_waits_for_its_first_step(launch, tmp_path):
    workdir = tmp_path / "run"
    launcher = launch(2, workdir, module="tests.parallel.slow_process")
    while launcher.poll() is None and not (workdir / "attempts.jsonl").exists():
        time.sleep(0.05)
    time.sleep(3.0)
    os.kill(process_ids(workdir)[1], signal.SIGKILL)
    began = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - began < 30 and launcher.returncode == 137
    assert "0: error: process 1 on" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_part_of_a_batch_is_held_out_and_answers_are_counted(run, tmp_path):
    """A last batch that is not full, and the accuracy on a test split."""
    rows = [{"text": f"{word} {i}", "label": word} for i in range(40) for word in ("good", "bad")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = (f"--config.data.source={tmp_path / 'data.jsonl'}", "--config.data.kind=labelled", "--config.eval.rows=5")
    flags = (*flags, "--config.train.seq_len=128")
    for count in (1, 2):
        run(count, tmp_path / str(count), *flags)
    assert_same_losses(tmp_path / "1", tmp_path / "2")
    one, two = (json.loads((tmp_path / str(count) / "summary.json").read_text()) for count in (1, 2))
    assert two["test_accuracy"] == one["test_accuracy"] and two["test_count"] == one["test_count"]


@pytest.mark.slow
def test_adapters_in_two_processes(run, trained, tmp_path):
    flags = (f"--config.init_from={trained}", "--config.lora.rank=2", "--config.train.steps=3")
    run(1, tmp_path / "1", *flags)
    run(2, tmp_path / "2", *flags, "--config.mesh.data=1", "--config.mesh.fsdp=2")
    assert_same_losses(tmp_path / "1", tmp_path / "2")
    run(1, tmp_path / "2", *flags, "--config.train.steps=5")
    assert lines(tmp_path / "2")[-1]["step"] == 5


@pytest.mark.slow
def test_processes_with_other_options_are_refused(tmp_path, text_file, cache):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    flags = (f"--config={ROOT / 'tests' / 'tiny.py'}", f"--workdir={tmp_path / 'run'}")
    flags = (*flags, f"--config.data.source={text_file}", f"--config.data.cache_dir={cache}")
    trainers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "llm_jax.train", *flags, f"--config.optim.lr={rate}"),
                *(f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}"),
            ],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE, text=True,
        )
        for index, rate in enumerate(("1e-2", "2e-2"))
    ]  # fmt: skip
    errors = [trainer.communicate(timeout=120)[1] for trainer in trainers]
    assert [trainer.returncode for trainer in trainers] == [2, 2]
    for text in errors:
        assert "the run differs between processes: optim.lr is 0.02 here and 0.01 in process 0" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_spikes_are_rolled_back_by_all(run, tmp_path):
    flags = ("--config.optim.lr=1e-9", "--config.train.on_bad_step=rollback", "--config.train.spike_factor=1.0045")
    flags = (*flags, "--config.train.steps=60", "--config.train.batch_size=2", "--config.checkpoint.every=6")
    out, _ = run(2, tmp_path / "run", *flags)
    assert "rolling back to step" in out
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 61))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_another_mesh(run, trained, tmp_path):
    workdir = tmp_path / "run"
    for count, steps, flags in (
        (2, 3, ("--config.mesh.data=1", "--config.mesh.fsdp=2")),
        (1, 6, ()),
        (4, 8, ("--config.mesh.data=2", "--config.mesh.tensor=2")),
    ):
        run(count, workdir, f"--config.train.steps={steps}", "--config.optim.schedule=constant", *flags)
    run(1, tmp_path / "one", "--config.optim.schedule=constant")
    steps = [{k: line[k] for k in ("step", "loss", "grad_norm")} for line in lines(workdir)]
    for line, expected in zip(steps, lines(tmp_path / "one"), strict=True):
        assert line == {k: pytest.approx(expected[k], rel=2e-3) for k in line}


STOPPED = ("--config.train.steps=200", "--config.checkpoint.every=25")
STOPPED = (*STOPPED, "--config.eval.every=0")  # a step at which a run is stopped is not evaluated


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """The figures of every step of a run of two processes with the options `STOPPED`."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(2, workdir, *STOPPED)
    return [{k: line.get(k) for k in ("step", *FIGURES)} for line in lines(workdir)]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_process(launch, run, undisturbed, tmp_path, index, number):
    """SIGTERM: all save the same step. SIGKILL: the others end. The restart goes on bit for bit."""
    workdir = tmp_path / "run"
    launcher = launch(2, workdir, *STOPPED)
    wait_for_step(launcher, workdir, 40)
    os.kill(process_ids(workdir)[index], number)
    began = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert "Traceback" not in errors
    step = checkpoints.steps(workdir)[-1]
    checkpoints.verify(checkpoints.find(workdir))
    if number == signal.SIGTERM:
        assert launcher.returncode == 128 + number and lines(workdir)[-1]["step"] == step
        assert f"0: saved at step {step} of 200 in {workdir}; the same command resumes from there" in errors
    else:
        assert launcher.returncode == 137
        assert f"{1 - index}: error: process {index} on" in errors and "resumes from the last checkpoint" in errors
    out, _ = run(2, workdir, *STOPPED)
    assert f"0: resuming from {workdir}/checkpoints/{step}" in out
    assert [{k: line.get(k) for k in ("step", *FIGURES)} for line in lines(workdir)] == undisturbed


@pytest.mark.slow
def test_a_workdir_in_use_is_refused(launch, run, tmp_path):
    workdir, flags = tmp_path / "run", ("--config.train.steps=100000", "--config.checkpoint.every=5")
    first = launch(2, workdir, *flags)
    wait_for_step(first, workdir, 12)
    _, errors = run(2, workdir, *flags, code=2)
    assert "another trainer is at work here" in errors and "Traceback" not in errors
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143
