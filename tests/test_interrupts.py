"""Ctrl-C while a command imports its modules."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
INTERRUPTED = """
import os, signal, sys, time
from importlib.machinery import ExtensionFileLoader
from llm_jax import cli

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe()
        while frame and not isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            frame = frame.f_back
        if frame:
            sys.meta_path.remove(self)
            print("initializing", flush=True)
            os.kill(os.getpid(), signal.SIGINT)

def main():
    import numpy
    sys.meta_path.insert(0, Interrupt())
    import jaxlib.xla_client
    time.sleep(60)

cli.run_script(main)
"""


def test_an_interrupt_while_an_extension_is_initialized_ends_the_command():
    """jaxlib converts an exception of that moment to ImportError."""
    run = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "initializing\n", "\ninterrupted\n")


@pytest.mark.parametrize("program", [("-m", "llm_jax.train"), ("llm-jax", "train")])
def test_an_interrupt_while_a_command_imports_is_one_line(tmp_path, program):
    """The interrupt arrives when the package imports its first module."""
    (tmp_path / "llm-jax").write_text("from llm_jax.__main__ import main\nmain()\n")
    (tmp_path / "absl").mkdir()
    (tmp_path / "absl" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")
