"""The flags that `./launch.sh` passes to the trainer; a stub interpreter prints its arguments."""

import pathlib
import shutil
import subprocess

import pytest

AUTO = ["--config.model.scan_layers=auto", "--config.model.precision.compute=auto"]
DEFAULT = ["--config=configs/default.py", *AUTO]


@pytest.fixture
def launch(tmp_path):
    """The arguments of Python after those of `./launch.sh`."""
    root = pathlib.Path(__file__).parents[2]
    for name in ("launch.sh", "requirements.txt"):
        shutil.copy(root / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/bash\n[ "$1" = -c ] || printf "%s\\n" "$@"\n')
    python.chmod(0o755)
    stamp = subprocess.run("cat requirements.txt | cksum", shell=True, cwd=tmp_path, capture_output=True, check=True)
    (tmp_path / ".venv/installed").write_bytes(stamp.stdout)

    def arguments(*flags: str) -> list[str]:
        done = subprocess.run([tmp_path / "launch.sh", *flags], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return arguments


def test_the_default_run_takes_what_trains_fastest_on_the_machine(launch):
    assert launch() == ["-m", "llm_jax.train", "--workdir=runs/default", *DEFAULT]
    processes = ["-m", "llm_jax.parallel.launcher", "2", "llm_jax.train"]
    assert launch("processes", "2") == [*processes, "--workdir=runs/processes", *DEFAULT]


def test_flags_replace_those_of_the_default_run(launch):
    flags = ["--workdir=a b", "--config.model.precision.compute=float32"]
    assert launch(*flags) == ["-m", "llm_jax.train", DEFAULT[0], AUTO[0], *flags]
    assert launch("--config=tiny") == ["-m", "llm_jax.train", "--workdir=runs/default", "--config=tiny"]
    assert launch("--config.train.seed=1")[-4:] == [*DEFAULT, "--config.train.seed=1"]
