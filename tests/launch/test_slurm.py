"""A training and a sweep through a real Slurm (Debian: slurm-wlm, munge): killed processes, the queue, an array."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.launch import slurm_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"not installed: {', '.join(slurm_cluster.missing())}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of Slurm run as root here"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm"), port) as environment:
        yield environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def submit(slurm, logs: pathlib.Path, *arguments: str) -> str:
    """The number of the job of `./launch.sh slurm`."""
    command = [sys.executable, "-m", "llm_jax.launch", "slurm", f"--logs={logs}", *arguments]
    done = subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    return re.search(r"Submitted batch job (\d+)", done.stdout)[1]


def state(slurm, job: str) -> str:
    done = subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True, check=True)
    return " ".join(sorted(set(re.findall(r"JobState=(\w+)", done.stdout))))


def ended(slurm, job: str) -> str:
    """The state of a job, which must not be one of failure."""
    current = state(slurm, job)
    assert not {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"} & set(current.split()), current
    return current


def wait_for(condition, seconds: float, context) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, context()
        time.sleep(0.2)


def logs_of(directory: pathlib.Path):
    return lambda: "\n".join(path.read_text() for path in sorted(directory.glob("*.log")))


def steps(workdir: pathlib.Path) -> list[int]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def training(text_file, cache, workdir, count: int) -> list[str]:
    return [
        *("--", "train", f"--config={ROOT / 'tests' / 'tiny.py'}", f"--workdir={workdir}"),
        *(f"--config.data.source={text_file}", f"--config.data.cache_dir={cache}", f"--config.train.steps={count}"),
        *("--config.eval.every=0", "--config.checkpoint.every=20"),
    ]


def test_a_job_of_two_processes_that_loses_one_is_queued_again_and_ends(slurm, tmp_path, text_file, cache):
    workdir, logs = tmp_path / "run", tmp_path / "logs"
    job = submit(slurm, logs, "--tasks_per_node=2", *training(text_file, cache, workdir, 400))
    wait_for(lambda: len(steps(workdir)) > 30, 240, logs_of(logs))
    found = subprocess.run(
        ["pgrep", "-f", f"^{sys.executable} -m llm_jax.train.*{workdir}"], capture_output=True, text=True
    )
    processes = [int(pid) for pid in found.stdout.split()]
    assert len(processes) == 2, found.stdout
    os.kill(processes[-1], signal.SIGKILL)
    wait_for(lambda: state(slurm, job) == "PENDING", 90, logs_of(logs))
    time.sleep(3.0)  # Slurm itself waits two minutes; within a second, the node refuses a job that it has just ended
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=slurm, check=True)
    wait_for(lambda: ended(slurm, job) == "COMPLETED", 400, logs_of(logs))
    assert "resuming from" in logs_of(logs)()
    assert json.loads((workdir / "summary.json").read_text())["steps"] == 400
    assert sorted(set(steps(workdir))) == list(range(1, 401))


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, tmp_path, text_file, cache):
    workdir, logs = tmp_path / "run", tmp_path / "logs"
    job = submit(slurm, logs, *training(text_file, cache, workdir, 100_000))
    wait_for(lambda: len(steps(workdir)) > 30, 240, logs_of(logs))
    subprocess.run(["scancel", job], env=slurm, check=True)
    wait_for(lambda: "saved at step" in logs_of(logs)(), 60, logs_of(logs))
    time.sleep(3.0)
    assert state(slurm, job) == "CANCELLED"


def test_an_array_divides_the_points_of_a_sweep(slurm, tmp_path, text_file, cache):
    logs, output = tmp_path / "logs", tmp_path / "sweep"
    options = [f"--config.data.source={text_file}", f"--config.data.cache_dir={cache}", "--config.train.steps=4"]
    sweep = [
        *("--", "sweep", f"--config={ROOT / 'tests' / 'tiny.py'}", f"--output={output}", "--jobs=1", *options),
        "--grid=train.seed=0..3",
    ]
    job = submit(slurm, logs, "--array=2", *sweep)
    wait_for(lambda: ended(slurm, job) == "COMPLETED", 400, logs_of(logs))
    assert len(list(output.glob("*/summary.json"))) == 4
    assert len(list(logs.glob("*.log"))) == 2
