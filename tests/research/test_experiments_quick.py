"""The scripts of experiments/ with --quick: they write below --runs only, and a second call measures nothing again."""

import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import grain.python  # noqa: F401  its flags, which it defines once, are no script's
import pytest
from absl import flags

from llm_jax.cli import entry
from llm_jax.research import findings
from tests.conftest import ROOT

SCRIPTS = sorted(p for p in (ROOT / "experiments").glob("*/*.py") if "experiments.script(" in p.read_text())


@pytest.fixture
def run(monkeypatch):
    """Runs a script of experiments/ in this process and removes the flags that it defines."""

    def run_script(path, *arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        # Errors are raised, not printed: `signals.exit_process` would end the tests.
        monkeypatch.setattr(entry, "_start", lambda c, arguments: entry._execute(c, c.flags, arguments))
        before = set(flags.FLAGS)
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            for name in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, name)
            for defined in (flags.FLAGS.flags_by_module_dict(), flags.FLAGS.flags_by_module_id_dict()):
                for of_module in defined.values():
                    of_module[:] = [flag for flag in of_module if flag.name in before]

    return run_script


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_experiment_measures_once_and_publishes_below_its_runs(script, run, command, tmp_path):
    committed = {path: path.read_bytes() for path in script.parent.iterdir() if path.is_file()}
    arguments = ["--quick", f"--runs={tmp_path}"]
    if script.parent.name == "quantization_quality":
        arguments.append(f"--checkpoint={tmp_path / 'model'}")
        width = ("--config.model.width=128", "--config.model.mlp_dim=128")  # must be divisible by the group size of 128
        vocabulary = ("--config.tokenizer.kind=byte_bpe", "--config.tokenizer.vocab_size=300")  # for GGUF files
        command("train", f"--workdir={tmp_path / 'model'}", "--config.train.steps=4", *width, *vocabulary)
    run(script, *arguments)
    published = tmp_path / "quick" / "published"
    results = findings.read(published / "results.json")
    assert results and all(r.verdict and r.command and r.date for r in results)
    if script.parent.name not in ("reliability", "width_transfer"):  # their READMEs have no table of verdicts
        text = (published / "README.md").read_text()
        assert all(f"| **{r.verdict}** |" in text for r in results)
    measured, content = figures(tmp_path), (published / "results.json").read_bytes()
    if script.parent.name not in ("adapter_inference", "contextual"):  # take seconds and store no figures
        run(script, *arguments, *(["--resume"] if script.parent.name == "reliability" else []))
        assert (published / "results.json").read_bytes() == content and figures(tmp_path) == measured
    assert {path: path.read_bytes() for path in script.parent.iterdir() if path.is_file()} == committed


@pytest.mark.slow
def test_an_experiment_resumes_after_an_interruption_and_after_a_kill(run, tmp_path):
    script = ROOT / "experiments" / "heavy_tail" / "run.py"
    arguments = ["--quick", f"--runs={tmp_path}"]
    measured: dict[pathlib.Path, int] = {}
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while len(figures(tmp_path)) == len(measured):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code and "Traceback" not in errors
        assert number == signal.SIGKILL or "the same command measures the others" in errors
        assert measured.items() <= figures(tmp_path).items()
        measured = figures(tmp_path)
    assert len(measured) < 8 and not (tmp_path / "quick" / "published").exists()
    run(script, *arguments)
    assert measured.items() <= figures(tmp_path).items() and len(figures(tmp_path)) == 8


def figures(runs):
    """{path: modification time} of the stored figures. Recipes are excluded: every call writes them again."""
    paths = (p for p in runs.rglob("*.json") if p.parent.name != "published" and p.name != "recipe.json")
    return {p: p.stat().st_mtime_ns for p in paths}
