"""Process-wide settings of JAX and of malloc, and explanations of device errors.

The settings are simulated devices, asynchronous dispatch, the cache of compiled functions, and memory kept by malloc.
"""

import ctypes
import hashlib
import mmap
import os
import pathlib
import platform
import re
import signal
import sys
import time
import traceback

from llm_jax.errors import UserError

_CACHE_BYTES = 2**30  # largest size of the cache of compiled functions
_MIN_COMPILE_SECONDS = 0.1  # functions that compile faster are not cached: reading many small files takes as long
_STALE_SECONDS = 60.0
_OVERCOMMIT = pathlib.Path("/proc/sys/vm/overcommit_memory")  # 2: Linux counts addresses that are never accessed


def simulate_devices(count: int | None) -> None:
    """Makes JAX use `count` simulated CPU devices; None leaves the devices of the machine. Call before JAX is used.

    Raises:
      UserError: a count below 1, or JAX already runs with other devices.
    """
    if count is None:
        return
    if count < 1:
        raise UserError(
            f"--devices={count}; expected at least 1 simulated CPU device; omit the flag to use this machine's devices"
        )
    import jax

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.default_backend() == "cpu" and jax.device_count() == count:
            return  # an earlier call in this process
        raise UserError(f"--devices={count}: JAX already runs with other devices in this process") from error


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Makes the kernel send a signal to this process when its parent process ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def retain_freed_memory() -> None:
    """Configures glibc's malloc to retain freed memory and to use huge pages. Does nothing without glibc.

    XLA on CPU allocates its buffers anew for every step. If malloc returns them to the system in between, page faults
    take about a quarter of the time of a training step. Decoding reads all weights for every token; with pages of 4 KiB
    it waits for address translation.
    """
    # From glibc's malloc.h: trim threshold (-1: never), padding at the top, number of mapped blocks, arenas.
    options = {-1: -1, -2: 2**28, -4: 0, -8: 1}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
        _reserve_huge_pages()


def release_freed_memory() -> None:
    """Returns memory that malloc retains to the system, for example after a checkpoint has been loaded."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
        _reserve_huge_pages()


def _reserve_huge_pages() -> None:
    """Extends the heap by addresses that the kernel is advised to back with huge pages; takes no memory by itself.

    The advice must precede the first access. The block is freed at once: malloc retains its addresses at the top of the
    heap and allocates from them. Does nothing where a limit counts addresses, such as `ulimit -v`: too few would be
    left for shared libraries and threads, and where glibc fills each new block with a byte (MALLOC_PERTURB_).
    """
    if _addresses_are_limited() or _malloc_fills_blocks():
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = (available_memory() or 0) // 2
    block = libc.malloc(size) if size else None
    if block:
        start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(start, size - (start - block), mmap.MADV_HUGEPAGE)
        libc.free(block)


def _addresses_are_limited() -> bool:
    """Whether addresses count against a limit before they are accessed (Linux)."""
    import resource

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    try:
        return _OVERCOMMIT.read_text().strip() == "2"
    except OSError:
        return False


def _malloc_fills_blocks() -> bool:
    """Whether glibc's malloc fills each block that it returns, which accesses all of its addresses."""
    return bool(os.environ.get("MALLOC_PERTURB_")) or "glibc.malloc.perturb" in os.environ.get("GLIBC_TUNABLES", "")


def available_memory() -> int | None:
    """The memory in bytes that new processes may take without swapping; None if it is unknown (not on Linux)."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def disable_async_dispatch() -> None:
    """Makes JAX on CPU finish a computation before it dispatches the next. Call before JAX is used.

    XLA allocates the temporaries of a step when the step is dispatched: with a second step in the queue, a CPU would
    hold the temporaries of two. Several simulated devices must run concurrently; leave it enabled for them. The setting
    has no effect on accelerators.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def enable_compilation_cache(directory: pathlib.Path) -> None:
    """Makes JAX keep compiled functions on disk, where later processes find them instead of compiling again.

    Does nothing if a cache is configured already, for example by JAX_COMPILATION_CACHE_DIR, or if the directory cannot
    be written. The least recently used functions are deleted when there is more than 1 GiB of them.

    Args:
      directory: is created; machines with different CPU instructions use different directories in it.
    """
    import jax

    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    directory = directory / _machine()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            return
        _delete_incomplete(directory)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def _machine() -> str:
    """A name for the instruction set of the CPU: code compiled for one CPU may use instructions that others lack."""
    features = _cpu_features() or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def cpu_instructions() -> frozenset[str]:
    """The instruction sets of the CPU by their Linux names, such as "avx2"; empty if unknown."""
    return frozenset(_cpu_features().partition(":")[2].split())


def _cpu_features() -> str:
    """The line of /proc/cpuinfo with the instruction sets, or ""."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _delete_incomplete(directory: pathlib.Path) -> None:
    """Deletes entries of JAX's cache that a process left unfinished when it ended; JAX could never replace them.

    JAX writes `KEY-cache`, then `KEY-atime`.
    """
    for entry in directory.glob("*-cache"):
        complete = entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists()
        if not complete and time.time() - entry.stat().st_mtime > _STALE_SECONDS:
            entry.unlink(missing_ok=True)


# (pattern of an error message of JAX, explanation with a cure). {0}: the group of the pattern.
_DEVICE_ERRORS = (
    (
        r"RESOURCE_EXHAUSTED.{0,200}?alloc\w*(?: request for)? ([\d.,]+ ?(?:[KMGT]i?B|bytes))",
        "no memory is left on the device for another {0}; {hint}",
    ),
    (r"RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY", "no memory is left on the device; {hint}"),
    (
        r"driver version is insufficient|SYSTEM_DRIVER_MISMATCH|INSUFFICIENT_DRIVER|driver.{0,60}too old",
        "the driver of the device is too old for the installed JAX; update it, install a JAX for its version, or set "
        "JAX_PLATFORMS=cpu",
    ),
    (
        r"Unable to initialize backend '(\w+)'|Unknown backend:? '?(\w+)'?",
        "JAX finds no usable device for JAX_PLATFORMS={platforms}; unset it to use the devices that JAX finds, set "
        "JAX_PLATFORMS=cpu, or install JAX for this device (for NVIDIA GPUs: pip install 'jax[cuda12]')",
    ),
)


def explain_device_error(error: BaseException, hint: str) -> str:
    """Returns a one-line explanation of a device error of JAX, or "" for other errors.

    Args:
      hint: how the command can use less memory.
    """
    text = " ".join(str(error).split())
    if _raised_in(error) == "xla_bridge.py" and "initialize backend" not in text:
        text += " Unable to initialize backend 'unnamed'"  # jax 0.10 fails an assertion without CUDA
    for pattern, meaning in _DEVICE_ERRORS:
        if match := re.search(pattern, text):
            return meaning.format(*match.groups(), hint=hint, platforms=os.environ.get("JAX_PLATFORMS", ""))
    return ""


def _raised_in(error: BaseException) -> str:
    """The name of the file whose code raised an error."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return os.path.basename(frames[-1]) if frames else ""
