import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from llm_jax import cli, runtime


@pytest.fixture
def no_cache():
    """JAX without a configured cache, as a command finds it; the configuration of the tests comes back."""
    names = ("compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_command_gets_a_bounded_cache_of_compiled_functions(no_cache, tmp_path):
    runtime.enable_compilation_cache(tmp_path)
    (directory,) = tmp_path.iterdir()
    assert jax.config.jax_compilation_cache_dir == str(directory)
    assert jax.config.jax_compilation_cache_max_size == 2**30


def test_a_configured_cache_is_left_alone(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    runtime.enable_compilation_cache(tmp_path / "other")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine") and not (tmp_path / "other").exists()


def test_a_directory_that_cannot_be_written_means_no_cache(no_cache, tmp_path):
    (tmp_path / "file").write_text("")
    runtime.enable_compilation_cache(tmp_path / "file" / "compiled")
    assert jax.config.jax_compilation_cache_dir is None


def test_unfinished_entries_are_deleted(no_cache, tmp_path):
    runtime.enable_compilation_cache(tmp_path)
    (directory,) = tmp_path.iterdir()
    for name in ("old-cache", "new-cache", "whole-cache", "whole-atime"):
        (directory / name).write_text("x")
    os.utime(directory / "old-cache", (time.time() - 3600,) * 2)
    os.utime(directory / "whole-cache", (time.time() - 3600,) * 2)
    jax.config.update("jax_compilation_cache_dir", None)
    runtime.enable_compilation_cache(tmp_path)
    assert {p.name for p in directory.iterdir()} == {"new-cache", "whole-cache", "whole-atime"}


@pytest.mark.parametrize(("flags", "enabled"), [([], True), (["--nocompilation_cache"], False)])
def test_only_commands_that_are_the_process_enable_the_cache(flags, enabled, monkeypatch):
    calls = []
    monkeypatch.setattr(runtime, "enable_compilation_cache", calls.append)
    monkeypatch.setattr(cli.entry.signals, "install", lambda message: None)
    command = cli.Command("example", lambda f: None, cli.Flags(), compiles=True)
    assert cli.call(command, flags) == 0 and not calls
    with pytest.raises(SystemExit):
        cli.start(command, flags)
    assert bool(calls) == enabled


def test_code_of_the_user_that_exits_ends_a_command_with_an_error(capsys):
    """Such as a tokenizer: an exit from there would end the command without a word, perhaps as a success."""
    command = cli.Command("example", lambda f: sys.exit(0), cli.Flags())
    assert cli.call(command) == 2
    assert capsys.readouterr().err.startswith("error: example: SystemExit: 0, test_runtime.py line")


OUT = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17592186044416 bytes."


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (jax.errors.JaxRuntimeError(OUT), "no memory is left on the device for another 17592186044416 bytes; less"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 2.50GiB on device"), "2.50GiB"),
        (jax.errors.JaxRuntimeError("INTERNAL: RESOURCE_EXHAUSTED"), "no memory is left on the device; less"),
        (RuntimeError("Unable to initialize backend 'cuda': no device"), "JAX_PLATFORMS=cuda"),
        (
            RuntimeError("Unable to initialize backend 'cuda': CUDA driver version is insufficient for CUDA runtime"),
            "driver of the device is too old",
        ),
    ],
    ids=str,
)
def test_errors_of_the_device_are_one_line_with_a_cure(error, message, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")

    def fail(f):
        raise error

    assert cli.call(cli.Command("example", fail, cli.Flags(), memory_hint="less"), []) == 2
    line = capsys.readouterr().err
    assert message in line and line.startswith("error: ") and line.count("\n") == 1


OTHERS = (RuntimeError("something else"), AssertionError("of a test"), ValueError("out of memory"))


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_keep_their_traceback(error):
    def fail(f):
        raise error

    with pytest.raises(type(error)):
        cli.call(cli.Command("example", fail, cli.Flags()), [])


def test_a_platform_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    code = "import jax\nfrom llm_jax import cli\ncli.start(cli.Command('x', lambda f: jax.devices(), cli.Flags()), [])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        pytest.skip("this machine has CUDA")
    assert done.returncode == 2 and done.stderr.startswith("error: JAX finds no usable device for JAX_PLATFORMS=cuda")
    assert done.stderr.count("\n") == 1


HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROBE = """
import pathlib
import re

from llm_jax import runtime

runtime.retain_freed_memory()
runtime.release_freed_memory()
block = bytearray(b"x") * 2**26
print(re.search(r"AnonHugePages: *(\\d+) kB", pathlib.Path("/proc/self/smaps_rollup").read_text()).group(1))
"""


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the system has no transparent huge pages"
)
def test_retained_memory_has_huge_pages():
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 0  # of 2**16 KiB; where memory is fragmented, few blocks are free


LIMITS = (
    "resource.setrlimit(resource.RLIMIT_AS, (2 * runtime.available_memory(), resource.RLIM_INFINITY))",
    "resource.setrlimit(resource.RLIMIT_DATA, (2 * runtime.available_memory(), resource.RLIM_INFINITY))",
    "runtime._OVERCOMMIT = pathlib.Path(sys.argv[1])",
)
LIMITED = """
import pathlib
import re
import resource
import sys

from llm_jax import runtime

{limit}
runtime.retain_freed_memory()
print(re.search(r"VmSize:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reserves addresses for huge pages")
@pytest.mark.parametrize("limit", LIMITS)
def test_no_addresses_are_reserved_where_a_limit_counts_them(limit, tmp_path):
    """JAX could not load its libraries if `ulimit -v` was little more than the reserved half of the memory."""
    overcommit = tmp_path / "overcommit_memory"
    overcommit.write_text("2\n")
    command = [sys.executable, "-c", LIMITED.format(limit=limit), str(overcommit)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 2**19  # KiB


@pytest.mark.parametrize("variable", [("MALLOC_PERTURB_", "85"), ("GLIBC_TUNABLES", "glibc.malloc.perturb=85")])
def test_no_addresses_are_reserved_where_malloc_fills_them(variable, monkeypatch):
    """Malloc would access half of the memory of the machine."""
    sizes = []
    monkeypatch.setattr(runtime, "available_memory", lambda: sizes.append(0))  # the size of the block; here none
    monkeypatch.setattr(runtime, "_addresses_are_limited", lambda: False)
    for name in ("MALLOC_PERTURB_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    runtime._reserve_huge_pages()
    assert len(sizes) == 1
    monkeypatch.setenv(*variable)
    runtime._reserve_huge_pages()
    assert len(sizes) == 1
