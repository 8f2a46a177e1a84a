"""A process that compiles for `plan` ends with the command that started it, however that ends."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-m", "llm_jax.training.planning"]).pid, flush=True)
time.sleep(600)
"""


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is sent by the kernel of Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_compiler_of_plan_ends_with_the_command(number):
    reader, writer = os.pipe()  # stays open here, so that the child waits for its request
    with os.fdopen(reader), os.fdopen(writer, "w"):
        parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=reader, stdout=subprocess.PIPE, cwd=ROOT)
        child = pathlib.Path("/proc") / parent.stdout.readline().decode().strip()
        wait_for(lambda: (child / "syscall").read_text().startswith("0 0x0 "))  # it reads its request
        parent.send_signal(number)
        parent.wait()
        parent.stdout.close()
        wait_for(lambda: not child.exists() or ") Z " in (child / "stat").read_text(), 10.0)
