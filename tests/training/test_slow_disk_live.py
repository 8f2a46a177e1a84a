"""Runs on a slow disk, a FUSE file system that writes a few kilobytes per second (needs fusepy, libfuse2 and root)."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

import llm_jax
from llm_jax import checkpoints, trees
from tests.conftest import ROOT

pytestmark = pytest.mark.live
FLAGS = ("--config.train.steps=24", "--config.checkpoint.every=8", "--config.eval.every=100")


@pytest.fixture
def disk(tmp_path):
    """disk(bytes per second) -> the mounted directory, empty."""
    mounted = []

    def mount(rate):
        root, point = tmp_path / "root", tmp_path / "disk"
        root.mkdir(exist_ok=True)
        point.mkdir(exist_ok=True)
        program = pathlib.Path(__file__).with_name("slow_disk.py")
        process = subprocess.Popen(
            [sys.executable, program, root, point, str(rate), "0.05"], stderr=subprocess.PIPE, text=True
        )
        mounted.append(point)
        while not point.is_mount():
            if process.poll() is not None:
                pytest.skip(f"a FUSE file system cannot be mounted here: {process.communicate()[1].strip()[-200:]}")
            time.sleep(0.05)
        return point

    yield mount
    for point in mounted:
        subprocess.run(["umount", "--lazy", point], check=False)


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timing = ("tokens_per_second", "mfu", "seconds")
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def test_training_on_a_slow_disk_goes_on_says_what_it_waits_for_and_loses_nothing(command, disk, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    whole = tmp_path / "whole"
    command("train", f"--workdir={whole}", *FLAGS)
    slow = disk(20_000) / "run"
    running = command("train", f"--workdir={slow}", *FLAGS, start=True)
    partial = slow / "checkpoints" / ".partial-8"
    while not partial.exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    while partial.exists():  # the first checkpoint is being written
        reached = metrics(slow)[-1]["step"]
        time.sleep(0.1)
    assert reached >= 15  # training went on meanwhile, up to the next save
    while 16 not in checkpoints.steps(slow) and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGKILL)  # while the last one is written
    out, _ = running.communicate()
    assert re.search(r"step 16: training waited \d+ s for a save; a larger checkpoint.every \(8\)", out), out
    assert checkpoints.steps(slow)[-1] == 16
    command("train", f"--workdir={slow}", *FLAGS, process=True)
    assert metrics(slow) == metrics(whole)
    assert trees.fingerprint(llm_jax.load(slow).params) == trees.fingerprint(llm_jax.load(whole).params)
