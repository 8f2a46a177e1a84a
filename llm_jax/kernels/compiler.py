"""Compiles the C++ kernels. Imports no JAX, because the build of a wheel uses this module too (`hatch_build.py`).

One library supports every CPU of an architecture: it selects the instruction set at run time.
"""

import concurrent.futures
import hashlib
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

from llm_jax.errors import UserError

SOURCES = pathlib.Path(__file__).parent / "cpu"
PREBUILT = pathlib.Path(__file__).parent / "prebuilt"  # in a wheel that was built on a machine with a compiler
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-fno-math-errno")


def headers() -> pathlib.Path:
    """The directory with the headers of XLA's FFI, which jaxlib ships.

    Raises:
      UserError: jaxlib is not installed.
    """
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("jaxlib, which has the headers of the kernels, is not installed")
    return pathlib.Path(spec.submodule_search_locations[0]) / "include"


def file_name(*details: str) -> str:
    """The file name of the library; contains a hash of its sources, flags, architecture and ABI of XLA's FFI.

    Args:
      details: further properties of the system that are hashed, such as the version of the C library.

    Raises:
      UserError: jaxlib is not installed.
    """
    # The compiler is not hashed: a cached or prebuilt library is found where no compiler is installed.
    key = hashlib.sha256(repr((FLAGS, platform.machine(), *details)).encode())
    for path in (headers() / "xla" / "ffi" / "api" / "c_api.h", *sorted(SOURCES.iterdir())):
        if path.is_file():
            key.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"kernels-{key.hexdigest()[:20]}.so"


def find_compiler() -> str:
    """The path of a C++ compiler: that of the environment variable CXX, else c++, g++ or clang++.

    Raises:
      UserError: there is none.
    """
    names = (os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++", "clang++")
    for name in names:
        if path := shutil.which(name):
            return path
    raise UserError(f"no C++ compiler was found ({', '.join(names)}); install one, or set CXX")


def compile_library(compiler: str, flags: tuple[str, ...]) -> bytes:
    """The shared library of the kernels, compiled with `flags`.

    Raises:
      UserError: the compiler fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = pathlib.Path(directory) / "kernels.so"

        def run(*arguments: str) -> None:
            done = subprocess.run([compiler, *flags, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise UserError(f"{compiler} cannot compile the kernels ({(errors or ['no message'])[0].strip()})")

        sources = {str(path): f"{directory}/{path.stem}.o" for path in sorted(SOURCES.glob("*.cc"))}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda source: run("-c", source, "-o", sources[source]), sources))
        run("-shared", *sources.values(), "-o", str(output))
        return output.read_bytes()


def compile_for_xla(compiler: str) -> bytes:
    """The shared library with the handlers of XLA's custom calls.

    Raises:
      UserError: the compiler fails, or jaxlib is not installed.
    """
    return compile_library(compiler, (*FLAGS, f"-I{SOURCES}", "-isystem", str(headers())))
