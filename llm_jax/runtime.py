"""Settings of the process that JAX and the allocator take: simulated devices, dispatch, freed memory."""

import ctypes
import sys

from llm_jax.errors import UserError


def simulate_devices(count: int) -> None:
    """Makes JAX use `count` simulated CPU devices; 0 leaves the devices of the machine. Call before JAX is used.

    Raises:
      UserError: a negative count, or JAX already runs with other devices.
    """
    if count < 0:
        raise UserError(f"--devices is {count}; expected a positive number of simulated CPU devices")
    if not count:
        return
    import jax

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.default_backend() == "cpu" and jax.device_count() == count:
            return  # an earlier call in this process
        raise UserError(f"--devices={count}: JAX already runs with other devices in this process") from error


def retain_freed_memory() -> None:
    """Configures glibc's malloc to retain freed memory in this process. Does nothing without glibc.

    XLA on CPU allocates its buffers anew for every step. If malloc returns them to the system in between, page faults
    take about a quarter of the time of a training step.
    """
    # From glibc's malloc.h: trim threshold (-1: never), padding at the top, number of mapped blocks, arenas.
    options = {-1: -1, -2: 2**28, -4: 0, -8: 1}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def release_freed_memory() -> None:
    """Returns freed memory that malloc retains to the system, such as the holes that loading a checkpoint leaves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def disable_async_dispatch() -> None:
    """Makes JAX on CPU finish a computation before it dispatches the next. Call before JAX is used.

    XLA allocates the temporaries of a step when the step is dispatched: with a second step in the queue, a CPU would
    hold the temporaries of two. Several simulated devices must run concurrently; leave it enabled for them. The setting
    has no effect on accelerators.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
