import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import importlib
import io
import multiprocessing
import os
import pathlib
import random
import runpy
import subprocess
import sys
import typing

import fsspec.implementations.memory
import hypothesis
import jax
import jax.numpy as jnp
import pytest

from llm_jax import cli, runtime, schema, trees
from llm_jax import configuration as config_lib
from llm_jax.checkpoints import abstract_params
from llm_jax.errors import UserError
from llm_jax.kernels import compiler, native
from llm_jax.model.transformer import Transformer
from llm_jax.object_store import clients, store
from tests import compilation
from tests.compilation import pytest_runtest_setup as pytest_runtest_setup

ROOT = pathlib.Path(__file__).parents[1]
# Time limits are off: a busy machine is no fault. The gate draws the same examples every time, .ci/full new ones.
hypothesis.settings.register_profile("free", deadline=None)
hypothesis.settings.register_profile("gate", deadline=None, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "free"))
compilation.share_cache()
# Many runs share a process here: the next one takes the memory that the last one freed.
runtime.release_freed_memory = lambda: None
LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, limit, module, *flags = sys.argv
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
sys.argv = [module, *flags]
runpy.run_module(module, run_name="__main__")
"""
# The files that take longest come first, so that no worker of xdist begins one at the end; the others keep their order.
LONGEST = (
    *("lora/test_run.py", "checkpoints/test_checkpoint.py", "training/test_losses.py", "decoding/test_methods.py"),
    *("training/test_trainer.py", "training/test_callable.py", "model/test_transformer.py"),
    *("quant/test_post_training.py", "parallel/test_mesh.py", "training/test_optim.py", "training/test_step.py"),
    *("lora/test_adapt.py", "lora/test_quantized.py", "decoding/test_loop.py", "decoding/test_complete.py"),
    *("evaluation/test_tasks.py", "lora/test_step.py", "evaluation/test_classification.py", "checkpoints/test_hf.py"),
    *("checkpoints/test_open.py", "decoding/test_prefix.py", "model/test_capture.py", "decoding/test_samplers.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {ROOT / "tests" / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """Collects cyclic garbage less often: with JAX's many small objects it takes 7 percent of the CPU time."""
    gc.collect()
    gc.freeze()  # modules and tests stay to the end
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def compiled_kernels() -> None:
    """Skips tests of the kernels in C++ where no compiler is installed and none has been cached."""
    if native.loaded()[0] is None:
        try:
            compiler.find_compiler()
        except UserError as error:
            pytest.skip(str(error))


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> pathlib.Path:
    """A cache directory for one test, without the kernels in C++: compiling them takes a minute of CPU time."""
    native.loaded()
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "own_cache"))
    return tmp_path / "own_cache"


@pytest.fixture(scope="session")
def tiny() -> schema.Config:
    """The checked configuration of tests/tiny.py, with the byte tokenizer's vocabulary."""
    config = config_lib.build(runpy.run_path(str(ROOT / "tests" / "tiny.py"))["get_config"]())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=259))


@pytest.fixture(scope="session")
def make(tiny):
    """make(**changes of the model's config) -> (model, parameters).

    The initial values depend on paths, shapes and `base_width` alone; models that agree in these share them.
    """
    initial: dict[tuple, dict] = {}

    @functools.cache
    def build(**changes):
        model = Transformer(dataclasses.replace(tiny.model, **changes))
        weights = trees.flatten(abstract_params(model)).items()
        key = (model.config.base_width, *((path, weight.shape, weight.dtype) for path, weight in weights))
        if key not in initial:
            initial[key] = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return model, initial[key]

    return build


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> pathlib.Path:
    """A text of 40 kB whose next characters can be learned."""
    words = "the model reads a token and then the token after it returns one line of text".split()
    draw = random.Random(0)
    lines = (" ".join(draw.choice(words) for _ in range(8)) for _ in range(1000))
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def simulated():
    """simulated(count)(function, *arguments) -> its result, from the process that has `count` simulated devices."""
    executors: dict[int, concurrent.futures.Executor] = {}

    def process(count):
        if count not in executors:
            executors[count] = concurrent.futures.ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), runtime.simulate_devices, (count,)
            )
        return lambda *call: executors[count].submit(*call).result()

    yield process
    for executor in executors.values():
        executor.shutdown()


@pytest.fixture(scope="session")
def command(text_file, cache, simulated):
    """command("evaluate", *flags) runs a command within this process and returns its exit code and output.

    A process of its own runs a command with `process=True`, `start` (returns the running process) or `largest_file`.
    One further process for each number of simulated devices runs the commands with --devices.
    """

    def run(
        name: str,
        *flags: str,
        code: int | None = 0,
        start: bool = False,
        largest_file: int = 0,
        process: bool = False,
    ):
        if name == "train":
            flags = (
                f"--config={ROOT / 'tests' / 'tiny.py'}",
                f"--config.data.source={text_file}",
                f"--config.data.cache_dir={cache}",
                *flags,
            )
        if not (start or largest_file or process):
            count = next((flag for flag in flags if flag.startswith("--devices=")), "")
            done = simulated(int(count.split("=")[1]))(call, name, *flags) if count else call(name, *flags)
            assert code is None or done.returncode == code, done.stdout + done.stderr
            return done
        full = [sys.executable, "-m", f"llm_jax.{name}", *flags]
        if largest_file:  # in bytes: what is written beyond is an error, as on a full disk
            full = [sys.executable, "-c", LIMITED, str(largest_file), f"llm_jax.{name}", *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        if start:
            return subprocess.Popen(
                full, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        done = subprocess.run(full, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done

    return run


def call(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a command within this process, in the directory of the repository."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = cli.call(importlib.import_module(f"llm_jax.{name}").COMMAND, flags)
    return subprocess.CompletedProcess([name, *flags], code, out.getvalue(), errors.getvalue())


class Bucket(fsspec.implementations.memory.MemoryFileSystem):
    """Object stores in memory, behind the interface through which gs:// and s3:// are reached."""

    cachable = False
    store: typing.ClassVar[dict] = {}
    pseudo_dirs: typing.ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).split("://", 1)[-1])

    def glob(self, path, **options):
        names = super().glob(path, **options)
        stripped = [name.lstrip("/") for name in names]
        return dict(zip(stripped, names.values(), strict=True)) if options.get("detail") else stripped


@pytest.fixture
def bucket(monkeypatch):
    """s3://bucket and gs://bucket in memory, without their packages."""
    from etils.epath import backend

    system = Bucket()

    def look(system, name, prefix):
        if name != "bucket":
            raise FileNotFoundError(name)

    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: system)
    monkeypatch.setattr(clients, "client", lambda scheme: system)
    monkeypatch.setattr(store, "_LIST_ONE", {"gs": look, "s3": look})
    yield system
    system.store.clear()


@pytest.fixture(scope="session")
def trained(command, tmp_path_factory) -> pathlib.Path:
    """A finished run of the tiny model."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    command("train", f"--workdir={workdir}")
    return workdir
