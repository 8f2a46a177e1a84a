"""Loads the C++ kernels (from the wheel, or compiled on first use and cached) and registers them with XLA.

The environment variable LLM_JAX_KERNELS chooses who computes products with quantized weights and attention over a
cache: "xla", "cpu" (an error where the kernels cannot be compiled), "pallas" (products: see `pallas`), or "auto", the
default: on a CPU, the kernels in C++ where they can be compiled, on a TPU those in Pallas, else XLA.

LLM_JAX_CPU_PATH chooses the instructions of the kernels in C++: a name of `PATHS`; "auto", the default, is the fastest
of this CPU.
"""

import ctypes
import functools
import os
import pathlib
import platform
import sys
import threading

import jax

from llm_jax import files
from llm_jax.errors import UserError
from llm_jax.kernels import compiler, target

SETTING = "LLM_JAX_KERNELS"
PATH_SETTING = "LLM_JAX_CPU_PATH"
SETTINGS = ("auto", "cpu", "pallas", "xla")
TARGETS = {  # name of a custom call of XLA -> symbol of its handler
    "llm_jax_quantized_product": "LlmJaxQuantizedProduct",
    "llm_jax_blockwise_product": "LlmJaxBlockwiseProduct",
    "llm_jax_integer_product": "LlmJaxIntegerProduct",
    "llm_jax_expanded_weight": "LlmJaxExpandedWeight",
    "llm_jax_bfloat16_product": "LlmJaxBFloat16Product",
    "llm_jax_cached_attention": "LlmJaxCachedAttention",
}
PATHS = ("auto", "portable", "avx2", "avx512", "avx512_vnni", "avx512_amx", "neon_dot")  # `Path` of machine.h
_PATIENCE = 1.0  # seconds of compilation before a line says so
_COMPILING = "note: compiling the kernels for the CPU, once on this machine; this may take half a minute"


def setting() -> str:
    """The value of LLM_JAX_KERNELS: "auto" (the default), "cpu", "pallas" or "xla".

    Raises:
      UserError: the variable has another value.
    """
    value = os.environ.get(SETTING, "") or "auto"
    if value not in SETTINGS:
        raise UserError(f"{SETTING}={value}; expected one of {', '.join(SETTINGS)}")
    return value


def path_setting() -> str:
    """The value of LLM_JAX_CPU_PATH, a name of `PATHS`; "auto" by default.

    Raises:
      UserError: the variable has another value.
    """
    value = os.environ.get(PATH_SETTING, "") or "auto"
    if value not in PATHS:
        raise UserError(f"{PATH_SETTING}={value}; expected one of {', '.join(PATHS)}")
    return value


def library(silent: bool = False) -> ctypes.CDLL | None:
    """The kernels, registered with XLA under `TARGETS`; None if XLA is to compute everything.

    Args:
      silent: print no line that says why XLA computes.

    Raises:
      UserError: LLM_JAX_KERNELS or LLM_JAX_CPU_PATH has an unknown value, LLM_JAX_KERNELS is "cpu" where the kernels
        cannot be compiled, or the CPU does not have the instructions of LLM_JAX_CPU_PATH.
    """
    wanted, path = setting(), path_setting()
    if wanted in ("pallas", "xla"):
        return None
    library, reason = loaded()
    if library is None:
        if wanted == "cpu":
            raise UserError(f"{SETTING}=cpu: {reason}")
        if not silent:
            _note(reason)
        return None
    if not library.llm_jax_has_path(PATHS.index(path)):
        missing = amx_reason(library) if path == "avx512_amx" else "this CPU does not have these instructions"
        raise UserError(f"{PATH_SETTING}={path}: {missing}")
    library.llm_jax_use_path(PATHS.index(path))
    return library


def amx_reason(library: ctypes.CDLL) -> str:
    """The reason why the kernels do not use AMX, or ""."""
    if (path := path_setting()) not in ("auto", "avx512_amx"):
        return f"{PATH_SETTING}={path}"
    library.llm_jax_amx_reason.restype = ctypes.c_char_p
    reason: str = library.llm_jax_amx_reason().decode()
    return reason


@functools.cache
def loaded() -> tuple[ctypes.CDLL | None, str]:
    """(the C++ kernels, reason why the prebuilt ones of the wheel are not used; "" if the wheel contains none).

    Without kernels: None and the reason why they cannot be compiled or loaded.
    """
    library, reason = _prebuilt()
    if library is not None:
        return library, ""
    try:
        return _registered(_compiled()), reason
    except (UserError, OSError) as error:
        return None, f"{reason}, and {error}" if reason else str(error)


def unusable_reason() -> str:
    """The reason why the function being traced cannot use a C++ kernel, independent of its arguments; or ""."""
    if (platform_name := target.platform()) != "cpu":
        return f"JAX runs on {platform_name}"
    # Whether an array is sharded shows only when the program is compiled; XLA would gather it for a custom call.
    if jax.device_count() > 1:
        return f"JAX uses {jax.device_count()} devices"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 or mesh.manual_axes:
        return "a mesh of devices is in use"
    return ""


@functools.cache
def _note(reason: str) -> None:
    print(f"note: products with quantized weights use XLA, which is slower: {reason}", file=sys.stderr)


def _prebuilt() -> tuple[ctypes.CDLL | None, str]:
    """(library of the wheel or None, reason why it cannot be used on this system; "" if the wheel contains none)."""
    libraries = sorted(compiler.PREBUILT.glob("*.so"))
    if not libraries:
        return None, ""
    try:
        path = compiler.PREBUILT / compiler.file_name()
        if path not in libraries:
            names = ", ".join(library.name for library in libraries)
            return None, f"the library of the wheel ({names}) was built for another jaxlib or CPU architecture"
        return _registered(path), ""
    except (UserError, OSError) as error:  # such as a C library that is older than that of the build
        return None, f"the library of the wheel cannot be used ({error})"


def _registered(path: pathlib.Path) -> ctypes.CDLL:
    """Loads a library and registers its handlers with XLA.

    Raises:
      OSError: it cannot be loaded.
      UserError: it lacks a handler, or XLA refuses one.
    """
    library = ctypes.CDLL(str(path))
    jax.default_backend()  # before it is initialized, XLA only queues handlers, and one that it refuses ends JAX
    try:
        handlers = {name: jax.ffi.pycapsule(getattr(library, symbol)) for name, symbol in TARGETS.items()}
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except (AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    return library


def _compiled() -> pathlib.Path:
    """The shared library of these sources, from the cache if it is there; several processes compile it once.

    Raises:
      UserError: it is not in the cache and cannot be compiled, or the cache cannot be written to.
    """
    directory = files.cache_directory() / "kernels"
    path = directory / compiler.file_name(*platform.libc_ver())
    if path.exists():
        return path
    program = compiler.find_compiler()
    files.make_directory(directory)
    with files.lock(directory, wait=True):
        if not path.exists():
            note = threading.Timer(_PATIENCE, print, [_COMPILING], {"file": sys.stderr, "flush": True})
            note.start()
            try:
                library = compiler.compile_for_xla(program)
            finally:
                note.cancel()
            files.write(path, library)
    return path
