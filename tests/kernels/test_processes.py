"""The kernels in C++ in several processes at once, on one core, with other numbers of threads, and after `fork`."""

import concurrent.futures
import hashlib
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llm_jax.kernels import cpu_attention, cpu_dense, cpu_product, native, number_formats
from tests.kernels import test_cpu_attention as attention
from tests.kernels.random_products import draw

pytestmark = pytest.mark.usefixtures("compiled_kernels")
SECONDS = 120  # for a process; they take three


def digests() -> list[str]:
    """A hash of the result of each kernel, in XLA's thread pool; each is worth several threads."""
    assert native.library() is not None
    r = np.random.default_rng(0)
    scheme = number_formats.scheme("int4:32")
    x, codes = r.normal(0, 1, (3, 1024)).astype(np.float32), r.integers(0, 256, (512, 1000), np.uint8)
    weight = codes, r.uniform(0.1, 1, (32, 1000)).astype(np.float16), None
    q, k = r.normal(0, 1, (4, 2, 8, 64)).astype(np.float32), r.normal(0, 1, (4, 200, 4, 64)).astype(np.float32)
    integers, scale = r.integers(-128, 128, (1024, 1000), np.int8), r.uniform(0.1, 1, (1, 1000)).astype(np.float32)
    x8 = r.integers(-128, 128, (3, 1024), np.int8)
    row, dense = (r.normal(0, 1, shape).astype(ml_dtypes.bfloat16) for shape in ((1, 1024), (1024, 1000)))
    calls = [
        (lambda x, weight: cpu_product.product(x, weight, scheme, -2), x, weight),
        (lambda x, weight: cpu_product.blockwise_products(x, [weight], scheme, -2), x, weight),
        (lambda q, k: cpu_attention.attention(q, k, k, jnp.ones((4, 2, 200), bool), None), q, k),
        (lambda row, dense: cpu_dense.product(row, dense, False), row, dense),
    ]
    if not cpu_product.unsupported_integer_reason(x8, integers):
        calls.append((lambda x, w: cpu_product.integer_product(x, jnp.float32(2), w, scale, -2), x8, integers))
    return [
        hashlib.sha256(np.asarray(jax.tree.leaves(jax.jit(call)(*arguments))[0])).hexdigest()
        for call, *arguments in calls
    ]


def digests_without_jax() -> list[str]:
    """The same of C functions, in new threads: JAX itself does not support `fork`."""
    p, case = draw("int4", 1024, 1000, 5, group=32), attention.draw((4, 2, 200, 8, 4, 64))
    results = p.run(threads=3), p.run(threads=3, blockwise=True), case.run(threads=3)
    return [hashlib.sha256(result).hexdigest() for result in results]


def main() -> None:
    """Prints the hashes of the results in this process and in a child that it forks while threads wait for a task."""
    for result in (digests(), digests_without_jax()):
        print(*result, flush=True)
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        print(*digests_without_jax(), flush=True)
        os._exit(0)
    sys.exit(os.waitpid(child, 0)[1])


def execute(affinity: set[int], **variables: str) -> list[list[str]]:
    code = f"import os; os.sched_setaffinity(0, {affinity}); from tests.kernels import test_processes as t; t.main()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert not done.returncode, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to cores")
def test_processes_at_once_have_the_results_of_this_one():
    """One on one core, one with more threads than cores (NPROC sets the threads of XLA); each forks a child."""
    cores = os.sched_getaffinity(0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        one_core = pool.submit(execute, {min(cores)})
        many_threads = pool.submit(execute, cores, NPROC="5")
        expected = [digests(), digests_without_jax(), digests_without_jax()]
        assert one_core.result() == expected and many_threads.result() == expected
