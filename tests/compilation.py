"""How the tests compile, in this process and in those it starts.

Most programs here are tiny and run once, so most of the time would go into compiling them. Executables are cached in a
directory that the processes of a session share. XLA leaves out expensive optimizations and its fusion emitters, which
take half of the time of compiling for a CPU, and generates the code of a program in one part: in 32 parts, its default,
it takes 1.7 times the CPU time. Each process keeps its last executables in memory, and writes those to the directory
that took longer to compile than to write. Two markers restore what a user has: `optimized` (golden steps,
memory and time are of the code that users run; implied by `slow` and `live`) and `uncached` (bitwise resume is of
programs that each process compiled for itself). `OPTIMIZED_TESTS=1` marks every test as optimized, as .ci/full does.
"""

import atexit
import functools
import os
import shutil
import tempfile

import jax
import pytest
from jax._src import compilation_cache as cache_of_jax
from jax._src import compiler
from jax.experimental.compilation_cache import compilation_cache

_CHEAP: dict[str, bool | int] = {"xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):  # jax 0.12 refuses the option
    _CHEAP["xla_cpu_use_fusion_emitters"] = False
_IN_MEMORY = 256  # executables, each of which takes about 1 MB
_DIRECTORY = "JAX_COMPILATION_CACHE_DIR"  # set it to keep the cache from session to session


def share_cache() -> None:
    """Names a directory for the executables of this session; to be called before anything is compiled."""
    if _DIRECTORY not in os.environ:  # workers of xdist and other child processes inherit it
        os.environ[_DIRECTORY] = tempfile.mkdtemp(prefix="llm_jax-tests-")
        atexit.register(shutil.rmtree, os.environ[_DIRECTORY], ignore_errors=True)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    jax.config.update("jax_compilation_cache_dir", os.environ[_DIRECTORY])
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
    )


def with_optimized_hlo(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles to the HLO that users get, but takes no time to generate fast code from it."""
    changed = _set("jax_disable_most_optimizations", False)
    try:
        cheap = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
        return lowered.compile(compiler_options=cheap)
    finally:
        if changed:
            _set("jax_disable_most_optimizations", True)


def _cheap(get_options):
    """JAX has no public option that all compilations of a process share, so this wraps where they get theirs."""

    @functools.wraps(get_options)
    def options(*args, env_options_overrides=None, **kwargs):
        overrides = dict(env_options_overrides or {})
        if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "true":
            overrides |= _CHEAP
        return get_options(*args, env_options_overrides=overrides, **kwargs)

    return options


def _in_memory(read, compile_and_write):
    """Wraps how JAX reads an executable from its cache, and how it compiles and writes one, to keep both in memory."""
    executables: dict[tuple, tuple] = {}  # by last use

    def keep(key, executable, seconds):
        executables[key] = executable, seconds
        if len(executables) > _IN_MEMORY:
            del executables[next(iter(executables))]

    @functools.wraps(read)
    def read_once(key, options, backend, devices, *callbacks):
        executable, seconds = executables.pop((key, devices), (None, None))
        if executable is None:
            executable, seconds = read(key, options, backend, devices, *callbacks)
        if executable is not None:
            keep((key, devices), executable, seconds)
        return executable, seconds

    @functools.wraps(compile_and_write)
    def compile_and_keep(backend, module, devices, options, callbacks, name, key):
        executable = compile_and_write(backend, module, devices, options, callbacks, name, key)
        if not callbacks:  # an executable holds the Python functions that it calls
            keep((key, devices), executable, 0)
        return executable

    return read_once, compile_and_keep


compiler.get_compile_options = _cheap(compiler.get_compile_options)
cache_of_jax.get_executable_and_time, compiler._compile_and_write_cache = _in_memory(
    cache_of_jax.get_executable_and_time, compiler._compile_and_write_cache
)


def _set(option: str, value: bool) -> bool:
    """Sets a boolean option of JAX for this process and its children. Returns whether it changed."""
    variable, text = option.upper(), str(value).lower()
    changed = os.environ.get(variable) != text
    os.environ[variable] = text
    jax.config.update(option, value)
    return changed


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Applies the markers of a test before its fixtures are set up."""
    optimized = any(item.get_closest_marker(name) for name in ("optimized", "slow", "live"))
    optimized |= bool(os.environ.get("OPTIMIZED_TESTS"))
    if _set("jax_disable_most_optimizations", not optimized):
        jax.clear_caches()
        jax.devices()  # reads XLA_FLAGS once: what follows is for child processes
        cheap = [f"--{name}={str(value).lower()}" for name, value in _CHEAP.items()]
        flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in cheap]
        os.environ["XLA_FLAGS"] = " ".join(flags if optimized else [*flags, *cheap])
    if _set("jax_enable_compilation_cache", not item.get_closest_marker("uncached")):
        compilation_cache.reset_cache()
