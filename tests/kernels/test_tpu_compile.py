"""The kernels for TPUs, compiled for TPUs that are not there, and the cycles that their compiler estimates."""

import importlib.util
import json
import subprocess
import sys

import pytest

from llm_jax.parallel import topologies
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed ('llm_jax[plan]')"),
]


def compiled(chip, *products, **environment):
    """{product: its figures}, see `tpu_compile`."""
    command = [sys.executable, "-m", "tests.kernels.tpu_compile", chip, *products]
    environment = topologies.environment() | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("chip", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_every_kernel_compiles(chip):
    sizes = ("16/4096/4096/0", "2048/4096/4096/0", "2048/4096/4096/1", "300/576/1536/0", "300/576/1536/1")
    products = [f"{s}/{n}/kernel" for s in ("int8", "int4", "int4_affine", "nf4", "mxfp4") for n in sizes]
    figures = compiled(chip, *products)
    assert all(row["kernels"] == 1 for row in figures.values())


def test_the_kernels_beat_the_expansion_by_xla(tmp_path):
    """With this flag, the compiler of libtpu 0.0.50 estimates the cycles of its final instructions, of kernels too."""
    flags = f"--xla_jf_dump_static_llo_profile_to={tmp_path} --xla_tpu_check_llo_types=false"
    size = "2048/4096/4096/0"
    products = [f"{scheme}/{size}/{how}" for scheme in ("int4", "nf4") for how in ("kernel", "xla")]
    figures = compiled("v5e:1x1", f"int8/{size}/dense", *products, LIBTPU_INIT_ARGS=flags)
    dense, *cycles = (row["cycles"] for row in figures.values())
    for kernel, xla in zip(cycles[::2], cycles[1::2], strict=True):
        assert dense < kernel < 1.3 * dense < 1.5 * dense < xla
