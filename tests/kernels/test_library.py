"""Where the library of the C++ kernels comes from, and which instructions of the CPU it uses."""

import concurrent.futures
import ctypes
import functools
import platform
import re
import shutil
import subprocess
import time

import numpy as np
import pytest

from llm_jax import runtime
from llm_jax.errors import UserError
from llm_jax.kernels import compiler, native
from tests.kernels.random_products import draw
from tests.kernels.test_cpu_product import PATHS, available

pytestmark = pytest.mark.usefixtures("compiled_kernels")


class Features(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in "leaf1_ecx leaf7_ebx leaf7_ecx leaf7_edx states".split()]


# Field and bit of what each path needs beyond the one before it. states: the registers that the system saves (XCR0).
NEEDS = {
    "avx2": [*(("leaf1_ecx", bit) for bit in (12, 28, 29)), ("leaf7_ebx", 5), ("states", 1), ("states", 2)],
    "avx512": [*(("leaf7_ebx", bit) for bit in (16, 17, 30, 31)), *(("states", bit) for bit in (5, 6, 7))],
    "avx512_vnni": [("leaf7_ecx", 11)],
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="CPUID is an instruction of x86")
def test_a_path_needs_each_of_its_instruction_sets():
    """A CPU or a virtual machine may have AVX2 without FMA or F16C, and a system may not save the registers."""
    library = native.loaded()[0]

    def path_of(bits):
        features = Features()
        for field, bit in bits:
            setattr(features, field, getattr(features, field) | 1 << bit)
        return native.PATHS[library.llm_jax_path_of(ctypes.byref(features))]

    bits, below = [], "portable"
    for path, needed in NEEDS.items():
        bits += needed
        assert path_of(bits) == path
        for missing in needed:
            assert path_of([bit for bit in bits if bit != missing]) == below, (path, missing)
        below = path
    for missing in NEEDS["avx2"]:
        assert path_of([bit for bit in bits if bit != missing]) == "portable", missing


@pytest.mark.skipif(not runtime.cpu_instructions(), reason="the system does not name the instruction sets")
def test_the_paths_are_those_that_the_system_names():
    names = runtime.cpu_instructions()
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    for path, needed in (("avx2", avx2), ("avx512", avx512), ("avx512_vnni", avx512 | {"avx512_vnni"})):
        assert available(path) == (needed <= names), path


@pytest.mark.parametrize(
    ("value", "message"), [("fast", "LLM_JAX_KERNELS=fast; expected one of auto, cpu, pallas, xla")]
)
def test_an_unknown_setting_is_refused(monkeypatch, value, message):
    monkeypatch.setenv("LLM_JAX_KERNELS", value)
    with pytest.raises(UserError, match=message):
        native.library()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "sse",
            "LLM_JAX_CPU_PATH=sse; expected one of auto, portable, avx2, avx512",
        ),
        ("neon_dot", "LLM_JAX_CPU_PATH=neon_dot: this CPU does not have these instructions"),
    ],
)
def test_instructions_that_are_unknown_or_missing_are_refused(monkeypatch, value, message):
    if value in PATHS and available(value):
        pytest.skip(f"this CPU has {value}")
    monkeypatch.setenv("LLM_JAX_CPU_PATH", value)
    with pytest.raises(UserError, match=message):
        native.library()


def test_the_instructions_can_be_chosen(monkeypatch):
    p = draw("int4", 192, 70, 3, group=32)
    portable = p.run("portable")
    monkeypatch.setenv("LLM_JAX_CPU_PATH", "portable")
    library = native.library()
    np.testing.assert_array_equal(p.run(), portable)
    assert native.PATHS[library.llm_jax_fastest_path()] == "portable"
    monkeypatch.undo()
    native.library()
    assert native.PATHS[library.llm_jax_fastest_path()] == native.PATHS[max(filter(library.llm_jax_has_path, range(7)))]


def test_without_a_compiler_products_use_xla_and_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "loaded", functools.cache(native.loaded.__wrapped__))
    assert native.library() is None and native.library() is None
    note = capsys.readouterr().err
    assert note.startswith("note: products with quantized weights use XLA, which is slower: no C++ compiler was found")
    assert note.count("\n") == 1
    monkeypatch.setenv("LLM_JAX_KERNELS", "cpu")
    with pytest.raises(UserError, match="LLM_JAX_KERNELS=cpu: no C\\+\\+ compiler was found"):
        native.library()
    monkeypatch.setenv("LLM_JAX_KERNELS", "xla")
    assert native.library() is None and not capsys.readouterr().err


def test_processes_compile_once_and_the_cache_needs_no_compiler(monkeypatch, capsys, tmp_path):
    compilations = []

    def compile_for_xla(program):
        time.sleep(0.1)  # for the other threads to come to the lock, and for the note
        compilations.append(program)
        return b"library"

    monkeypatch.setattr(compiler, "compile_for_xla", compile_for_xla)
    monkeypatch.setattr(compiler, "find_compiler", lambda: "c++")
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_PATIENCE", 0.01)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: native._compiled(), range(3)))
    assert compilations == ["c++"] and len(paths) == 1 and paths.pop().read_bytes() == b"library"
    monkeypatch.undo()
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert native._compiled().read_bytes() == b"library"
    note = capsys.readouterr().err
    assert note.startswith("note: compiling the kernels") and note.count("\n") == 1


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A directory for the library of a wheel; the next library is registered under another name."""
    monkeypatch.setattr(compiler, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(native, "loaded", functools.cache(native.loaded.__wrapped__))
    monkeypatch.setattr(native, "TARGETS", {f"llm_jax_{tmp_path.name}": "LlmJaxQuantizedProduct"})
    compiler.PREBUILT.mkdir()
    return compiler.PREBUILT


def test_the_library_of_the_wheel_precedes_the_compiled_one(wheel):
    path = wheel / compiler.file_name()
    shutil.copy(native._compiled(), path)
    library, reason = native.loaded()
    assert library._name == str(path) and reason == ""


def test_a_library_of_the_wheel_that_cannot_be_loaded_is_named_and_replaced(wheel, monkeypatch):
    (wheel / compiler.file_name()).write_bytes(b"no library")
    library, reason = native.loaded()
    assert library._name == str(native._compiled())
    assert re.fullmatch(r"the library of the wheel cannot be used \(.*prebuilt/kernels-\w+.so: \w.*\)", reason)
    monkeypatch.setattr(native, "loaded", functools.cache(native.loaded.__wrapped__))
    monkeypatch.setenv("LLM_JAX_CACHE", str(wheel))
    monkeypatch.setenv("CXX", "no-compiler")
    library, no_library = native.loaded()
    assert library is None and no_library.startswith(f"{reason}, and no C++ compiler was found")


def test_a_library_of_the_wheel_for_another_jaxlib_is_named_and_replaced(wheel):
    shutil.copy(native._compiled(), wheel / "kernels-0123456789.so")
    library, reason = native.loaded()
    assert library._name == str(native._compiled()) and reason == (
        "the library of the wheel (kernels-0123456789.so) was built for another jaxlib or CPU architecture"
    )


def test_handlers_that_xla_refuses_are_named_and_replaced(wheel, tmp_path):
    """The handler of the wheel announces another version of XLA's FFI."""
    source = tmp_path / "handler.cc"
    source.write_text(
        """
        #include "xla/ffi/api/c_api.h"
        extern "C" XLA_FFI_Error* LlmJaxQuantizedProduct(XLA_FFI_CallFrame* frame) {
          auto* extension = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
          if (extension) extension->metadata->api_version.major_version = 99;
          return nullptr;
        }
        """
    )
    library = wheel / compiler.file_name()
    command = [compiler.find_compiler(), "-shared", "-fPIC", "-isystem", compiler.headers(), source, "-o", library]
    subprocess.run(command, check=True)
    loaded, reason = native.loaded()
    assert loaded._name == str(native._compiled())
    assert reason.startswith(f"the library of the wheel cannot be used ({library}: ") and "API version (99." in reason
    assert "\n" not in reason


def test_a_short_compilation_prints_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compiler, "compile_for_xla", lambda program: b"library")
    monkeypatch.setattr(compiler, "find_compiler", lambda: "c++")
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    assert native._compiled().read_bytes() == b"library" and not capsys.readouterr().err


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    program = tmp_path / "cc"
    program.write_text("#!/bin/sh\necho 'x.cc:1: error: no such header' >&2; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match=r"cc cannot compile the kernels \(x.cc:1: error: no such header\)"):
        compiler.compile_library(str(program), ())
