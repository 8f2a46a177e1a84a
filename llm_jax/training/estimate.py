"""Estimates the time, memory and disk space of a run: compiles the step and times a few steps on dummy rows.

If the weights and the optimizer state alone exceed the free memory, nothing is compiled.

The timed steps use zeros as weights and synthetic rows. Time and memory depend only on shapes, dtypes and shardings,
which are those of the run. The run directory is neither read nor written.
"""

import dataclasses
import math
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import bars, object_store, runtime, weights
from llm_jax.data import rows
from llm_jax.errors import UserError
from llm_jax.schema import Config
from llm_jax.training import memory
from llm_jax.training.setup import Setup

_TIMED_STEPS = 5  # at most
_TIME_LIMIT = 20.0  # seconds after which no further step or batch is timed
_SAFE_SHARE = 0.9  # share of the free memory; a step that needs more is not run


@dataclasses.dataclass(frozen=True)
class RunEstimate:
    """The estimated time, memory and disk space of a run.

    Attributes:
      compile_seconds: time to compile the step and the evaluation, or to read them from the compilation cache; None
        if nothing was compiled because the weights and the optimizer state alone exceed the free memory.
      step_seconds: median time of the timed steps, or None if the step exceeds the free memory.
      timed_steps: number of timed steps.
      batch_seconds: time of a batch of an evaluation, or None.
      steps: number of remaining steps.
      evaluation_batches: number of batches of all evaluations of the run together.
      memory: memory of the compiled step; if nothing was compiled, of the weights and the optimizer state.
      free_memory: free bytes on a device, or in the machine for CPUs; None: unknown.
      checkpoint_bytes: size of one checkpoint.
      checkpoints: maximum number of checkpoints on the disk at the same time.
      free_disk: free bytes on the disk of the run directory; None in an object store.
      spent_seconds: time that the estimate took.
    """

    compile_seconds: float | None
    step_seconds: float | None
    timed_steps: int
    batch_seconds: float | None
    steps: int
    evaluation_batches: int
    memory: memory.Memory
    free_memory: int | None
    checkpoint_bytes: int
    checkpoints: int
    free_disk: int | None
    spent_seconds: float

    @property
    def seconds(self) -> float | None:
        """Estimated seconds to compile and run the remaining steps and evaluations."""
        if self.compile_seconds is None or self.step_seconds is None or self.batch_seconds is None:
            return None
        evaluations = self.evaluation_batches * self.batch_seconds
        return self.compile_seconds + self.steps * self.step_seconds + evaluations

    @property
    def disk_bytes(self) -> int:
        return self.checkpoint_bytes * self.checkpoints


def estimate(setup: Setup, held_out: Mapping[str, int], workdir: pathlib.Path, done: int = 0) -> RunEstimate:
    """Compiles the step and the loss of an evaluation, and times a few of both.

    Args:
      held_out: {source: number of held-out rows}, with the key "" for all together; {} without held-out data.
      workdir: directory of the run; may not exist.
      done: number of steps that the run has done.
    """
    config, began = setup.config, time.perf_counter()
    state = setup.state.replace(frozen={})
    limit = jnp.float32(math.inf)
    free = _free_memory()
    devices = setup.mesh.size if jax.default_backend() == "cpu" else 1  # simulated devices share the memory
    optimizer_bytes = memory.shard_bytes((state.opt_state, state.ema))
    need = memory.Memory(memory.shard_bytes((state, setup.state.frozen)), 0, 0, optimizer_bytes)
    compile_seconds: float | None = None
    step_times: list[float] = []
    batch_times: list[float] = []
    if free is None or need.peak * devices < free:
        step = setup.train_step.lower(state, setup.state.frozen, setup.batch, limit).compile()
        loss = setup.loss.lower(setup.state.params, setup.state.frozen, setup.batch).compile()
        compile_seconds = time.perf_counter() - began
        need = memory.of_executable(step, optimizer_bytes)
    if compile_seconds is not None and (free is None or need.peak * devices < _SAFE_SHARE * free):
        zeros = _zeros((state, setup.state.frozen))
        batch = dummy_batch(setup)
        current = [zeros[0]]  # the state, which every step donates

        def update() -> Any:
            current[0], metrics = step(current[0], zeros[1], batch, limit)
            return metrics

        step_times = _timed(update)
        params = current[0].params
        batch_times = _timed(lambda: loss(params, zeros[1], batch)) if held_out else [0.0]
    return RunEstimate(
        compile_seconds=compile_seconds,
        step_seconds=statistics.median(step_times) if step_times else None,
        timed_steps=len(step_times),
        batch_seconds=statistics.median(batch_times) if batch_times else None,
        steps=config.train.steps - done,
        evaluation_batches=_evaluation_batches(config, held_out, done),
        memory=need,
        free_memory=free,
        checkpoint_bytes=_checkpoint_bytes(setup),
        checkpoints=_checkpoints(config),
        free_disk=_free_disk(workdir),
        spent_seconds=time.perf_counter() - began,
    )


def describe(e: RunEstimate, config: Config, epoch_tokens: int) -> str:
    """Returns the estimate as text, with the costs that it does not include.

    Args:
      epoch_tokens: training tokens of one pass over the data.
    """
    tokens = e.steps * config.train.batch_size * config.train.seq_len
    epochs = f" ({tokens / epoch_tokens:,.2f} passes over the text)" if epoch_tokens else ""
    lines = [f"to do: {e.steps:,} steps of {config.train.batch_size} x {config.train.seq_len} tokens{epochs}"]
    free = "" if e.free_memory is None else f", {_size(e.free_memory)} are free"
    if e.compile_seconds is None:
        lines.append(
            f"memory: not enough: weights and optimizer alone take {_size(e.memory.arguments)} on each device{free}; "
            "nothing was compiled"
        )
    elif e.seconds is None or e.step_seconds is None or e.batch_seconds is None:
        lines.append("time: not measured, because the step needs more memory than is free")
    else:
        rate = config.train.batch_size * config.train.seq_len / e.step_seconds
        lines.append(
            f"time: about {bars.duration(e.seconds)}: {e.steps:,} steps of {e.step_seconds:.3g} s "
            f"({rate:,.0f} tokens/s), "
            f"{bars.duration(e.evaluation_batches * e.batch_seconds)} of evaluations, "
            f"{bars.duration(e.compile_seconds)} of compilation"
        )
    if e.compile_seconds is not None:
        lines.append(
            f"memory: {_size(e.memory.peak)} on each device for the step ({_size(e.memory.arguments)} of weights, "
            f"optimizer and batch, {_size(e.memory.temporaries)} of temporaries){free}"
        )
    lines.append(
        f"disk: {_size(e.disk_bytes)}: {e.checkpoints} checkpoints of {_size(e.checkpoint_bytes)}"
        + ("" if e.free_disk is None else f"; {_size(e.free_disk)} are free")
    )
    if e.free_disk is not None and e.disk_bytes > e.free_disk:
        lines.append("warning: the checkpoints do not fit on the disk; lower checkpoint.keep_last or keep_best")
    if e.timed_steps:
        lines.append(
            f"measured in {bars.duration(e.spent_seconds)} with {e.timed_steps} steps on zero weights and dummy rows; "
            "does not include samples, tasks and saving"
        )
    return "\n".join(lines)


def _timed(call: Callable[[], Any]) -> list[float]:
    """Seconds of each of up to `_TIMED_STEPS` calls (at least one) within `_TIME_LIMIT`, after one untimed call."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    seconds: list[float] = []
    while not seconds or (len(seconds) < _TIMED_STEPS and time.perf_counter() - began < _TIME_LIMIT):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def _zeros(shapes: Any) -> Any:
    """Arrays of zeros, every shard on its device."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), out_shardings=shardings
    )()


def dummy_batch(setup: Setup) -> dict[str, jax.Array]:
    """A batch whose rows are single documents with all targets counted: int32 (batch_size, seq_len) arrays."""
    rows, length = next(iter(setup.batch.values())).shape
    values = {"segments": 1, "mask": 1, "positions": jnp.arange(length, dtype=jnp.int32)}

    def make() -> dict[str, jax.Array]:
        return {name: jnp.broadcast_to(jnp.int32(values.get(name, 0)), (rows, length)) for name in setup.batch}

    return jax.jit(make, out_shardings=dict.fromkeys(setup.batch, setup.batch_sharding))()


def _evaluation_batches(config: Config, held_out: Mapping[str, int], done: int) -> int:
    steps, every = config.train.steps, config.eval.every
    during = len([step for step in range(every, steps, every) if step > done]) if every else 0

    def batches(limit: int) -> int:
        counts = (min(limit or count, count) for count in held_out.values())
        return sum(math.ceil(count / config.train.batch_size) for count in counts)

    return during * batches(config.eval.rows) + batches(config.eval.final_rows)


def _checkpoint_bytes(setup: Setup) -> int:
    state = setup.state
    saved = setup.method.checkpoint_params(state.params, state.frozen)
    return weights.num_bytes((saved, state.opt_state, state.ema))


def _checkpoints(config: Config) -> int:
    """The maximum number of checkpoints at a time; a new checkpoint is completed before the oldest is removed."""
    c = config.checkpoint
    saves = 1 + (len(range(c.every, config.train.steps, c.every)) if c.every else 0)
    return min(saves, c.keep_last + c.keep_best + 1)


def check_batch(setup: Setup) -> None:
    """Rejects a batch that cannot fit into the free memory, before its rows are built.

    Without this check, such a run would spend minutes on building rows and then be killed without a message. The check
    uses a lower bound of the memory: the int32 arrays of the batch, and for one micro-batch the token embeddings and,
    unless the attention kernel is fused, the float32 scores of one layer.

    Raises:
      UserError: the batch needs more memory than is free on a device, or in the machine for CPUs.
    """
    c, model, free = setup.config.train, setup.config.model, _free_memory()
    devices = setup.mesh.devices.flat
    on_cpu = devices[0].platform == "cpu"
    share = (sum(d.process_index == jax.process_index() for d in devices) if on_cpu else 1) / len(devices)
    tokens = c.batch_size * c.seq_len
    token_bytes = model.width * jnp.dtype(model.precision.compute).itemsize
    if setup.attention_kernel.split()[0] in ("plain", "xla"):
        token_bytes += model.num_heads * c.seq_len * 4
    needed = share * (tokens * len(rows.NAMES) * 4 + tokens // c.grad_accumulation * token_bytes)
    if free is not None and needed > free:
        raise UserError(
            f"train.batch_size={c.batch_size} rows of train.seq_len={c.seq_len} tokens with model.width={model.width} "
            f"and model.num_heads={model.num_heads} need more than {_size(needed)}, and {_size(free)} are free; lower "
            "one of these options, or raise train.grad_accumulation"
        )


def _free_memory() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return runtime.available_memory()


def _free_disk(workdir: pathlib.Path) -> int | None:
    if object_store.is_object(workdir):
        return None
    directory = workdir.absolute()
    while not directory.is_dir():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
