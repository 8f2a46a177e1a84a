"""What a run tells: the parameter table, the progress bar, a JSON line a step, model-flops utilization."""

import json
import math
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from llm_jax import trees
from llm_jax.data.rows import Batch
from llm_jax.errors import UserError
from llm_jax.model.attention import Tokens
from llm_jax.model.transformer import ACTIVATIONS, Transformer
from llm_jax.training.bad_steps import Watch, lines_up_to
from llm_jax.training.sinks import Sink


def parameter_table(params: Any) -> str:
    """A line per weight of an abstract or real sharded tree: name, shape, dtype, sharding, entries."""
    lines, total, size = [], 0, 0
    for path, weight in trees.flatten(params).items():
        for keys, leaf in jax.tree_util.tree_flatten_with_path(weight)[0]:
            name = path + jax.tree_util.keystr(keys)
            total += leaf.size
            size += leaf.size * leaf.dtype.itemsize
            spec = tuple(leaf.sharding.spec)
            split = " x ".join(str(axis) for axis in spec if axis) or "copies"
            lines.append(f"{name:<44} {leaf.shape!s:<20} {leaf.dtype!s:<10} {split:<16} {leaf.size:>12,}")
    head = f"{'parameter':<44} {'shape':<20} {'dtype':<10} {'split over':<16} {'entries':>12}"
    return "\n".join([head, *lines, f"{total:,} parameters, {size / 2**20:,.1f} MiB"])


def matmul_peak(dtype: Any) -> float:
    """Measured flops per second of a square product in `dtype`, over all devices of this kind.

    Simulated CPU devices share the same cores and count once.
    """
    n = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best * (1 if jax.default_backend() == "cpu" else jax.device_count())


def activation_norms(model: Transformer) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """A function (params, batch) -> {layer: root mean square of what it gives}, float32 () each; to be jitted."""

    def found(params: Any, batch: Batch) -> dict[str, jax.Array]:
        where = Tokens(batch["positions"], batch["segments"])
        _, kept = model.apply({"params": params}, batch["inputs"], where, method="features", mutable=[ACTIVATIONS])
        values: dict[str, jax.Array] = {}
        for path, (value,) in trees.flatten(kept[ACTIVATIONS]).items():
            values |= dict(zip(trees.expand(path.removesuffix("/rms")), jnp.atleast_1d(value), strict=True))
        return values

    return found


def peak_memory() -> dict[str, int]:
    """The most memory that was in use, in bytes: of this process, and of a device where it tells."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    told = jax.local_devices()[0].memory_stats()
    return peaks | ({"peak_device_bytes": told["peak_bytes_in_use"]} if told else {})


def begin_attempt(workdir: pathlib.Path, step: int) -> None:
    """Notes in attempts.jsonl that a trainer begins. One that was killed ended when it last wrote metrics."""
    attempts, metrics = _attempts(workdir), workdir / "metrics.jsonl"
    if attempts and "ended" not in attempts[-1]:
        last = metrics.stat().st_mtime if metrics.exists() else 0.0
        attempts[-1]["ended"] = max(attempts[-1]["began"], last)
    _write_attempts(workdir, [*attempts, {"step": step, "began": time.time()}])


def end_attempt(workdir: pathlib.Path) -> None:
    """Notes that the trainer at work ends."""
    attempts = _attempts(workdir)
    attempts[-1]["ended"] = time.time()
    _write_attempts(workdir, attempts)


def goodput(workdir: pathlib.Path) -> float | None:
    """Useful time over the time that trainers have been at work on a run: steps that were kept times their median.

    Compiling, evaluating, saving and steps that were lost are not useful time. None where nothing has been timed.
    """
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    worked = sum(attempt.get("ended", time.time()) - attempt["began"] for attempt in _attempts(workdir))
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    return len(lines) * statistics.median(seconds) / worked if seconds and worked else None


class Tracer:
    """A profile of three steps, under WORKDIR/profile in the form that TensorBoard and xprof open.

    Args:
      first: how many steps are done when it begins; None: no profile.
    """

    def __init__(self, workdir: pathlib.Path, first: int | None):
        self._directory, self._first, self._active = workdir / "profile", first, False

    def at(self, done: int, state: Any) -> None:
        """To be called before every step, with the state that it starts from."""
        if self._first is None:
            return
        if done == self._first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._directory))
            self._active = True
        elif done == self._first + 3:
            self.close(state)

    def close(self, state: Any) -> None:
        if self._active:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._active = False
            print(f"profile: {self._directory} (tensorboard --logdir={self._directory})", flush=True)


def _attempts(workdir: pathlib.Path) -> list[dict[str, float]]:
    path = workdir / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _write_attempts(workdir: pathlib.Path, attempts: list[dict[str, float]]) -> None:
    partial = workdir / ".attempts.partial"
    partial.write_text("".join(json.dumps(attempt) + "\n" for attempt in attempts))
    partial.replace(workdir / "attempts.jsonl")


class Progress:
    """The bar on the terminal, `metrics.jsonl` and the sinks.

    Metrics stay on the device until the next step is sent off.

    Args:
      watch: is told of every step, and raises `BadStep` (out of whatever method collects the step).
      weights: the per-layer names of the trained weights.
      sinks: get what the file gets.
      norms_every: steps between lines with norms; 0: none.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start: int,
        steps: int,
        flops_per_token: float,
        peak: float,
        watch: Watch,
        weights: Sequence[str] = (),
        sinks: Sequence[Sink] = (),
        norms_every: int = 0,
    ):
        self._path = workdir / "metrics.jsonl"
        self._file = _reopen(self._path, start)
        self._bar = tqdm(
            total=steps, initial=start, desc="training", unit="step", dynamic_ncols=True, mininterval=0.5, disable=None
        )
        self._steps, self._said = steps, time.perf_counter()
        self._flops_per_token, self._peak = flops_per_token, peak
        self._watch, self._weights, self._sinks, self._norms_every = watch, weights, sinks, norms_every
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._clock = time.perf_counter()
        self.rates: list[float] = []  # tokens per second of every step
        self._line: dict[str, Any] = {}

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of step `step` and writes those of the step before."""
        before, self._pending = self._pending, (step, metrics)
        self._collect(before)
        self._write()

    def collect(self) -> None:
        """Waits for the step in hand and reads its metrics."""
        before, self._pending = self._pending, None
        self._collect(before)

    def _collect(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        if pending is None:
            return
        step, metrics = pending
        found = jax.device_get(metrics)
        norms = {name: found.pop(f"{name}_norms") for name in ("gradient", "update") if f"{name}_norms" in found}
        bad = bool(found.pop("bad"))
        values = {name: float(value) for name, value in found.items()}
        now = time.perf_counter()
        seconds, self._clock = max(now - self._clock, 1e-9), now
        rate = values["tokens"] / seconds
        self.rates.append(rate)
        mfu = rate * self._flops_per_token / self._peak
        timing = {"tokens_per_second": rate, "mfu": mfu, "seconds": seconds}
        self._line = {"step": step, **values, **timing}
        if bad:  # JSON knows no NaN
            self._line = {k: v if math.isfinite(v) else None for k, v in self._line.items()} | {"bad": True}
        if self._norms_every and (step == 1 or step % self._norms_every == 0):
            self._line["norms"] = {
                name: dict(zip(self._weights, map(float, values), strict=True)) for name, values in norms.items()
            }
        text = f"loss {values['loss']:.3f}, {rate:,.0f} tokens/s, MFU {mfu:.0%}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(1)
        if self._bar.disable and now - self._said > 10:  # no terminal: a line now and then
            self._said = now
            print(f"step {step} of {self._steps}: {text}", flush=True)
        self._watch.see(step, values["loss"], bad, norms["gradient"])

    def flush(self, norms: Mapping[str, Any] | None = None, **extra: float) -> None:
        """Writes the line of the step in hand, `extra` figures and `norms` of activations included."""
        self.collect()
        if norms:
            self._line["norms"] = self._line.get("norms", {}) | {"activation": {k: float(v) for k, v in norms.items()}}
        self._line |= extra
        self._write()

    def _write(self) -> None:
        line, self._line = self._line, {}
        if "step" not in line:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error
        plain = {k: v for k, v in line.items() if isinstance(v, float)}
        plain |= {f"{k}_norm/{w}": v for k, of in line.get("norms", {}).items() for w, v in of.items()}
        for sink in self._sinks:
            sink.scalars(line["step"], plain)

    def text(self, step: int, name: str, text: str) -> None:
        """Prints a text above the bar and gives it to the sinks."""
        self.write(text)
        for sink in self._sinks:
            sink.text(step, name, text)

    def rewind(self, step: int) -> None:
        """Forgets what came after `step`."""
        self._pending, self._line = None, {}
        self._file.close()
        self._file = _reopen(self._path, step)
        self._bar.n = step
        self._bar.refresh()
        self.pause()

    def pause(self) -> None:
        """Restarts the clock after work that is not training."""
        self._clock = time.perf_counter()

    def write(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        for sink in self._sinks:
            sink.close()


def _reopen(path: pathlib.Path, start: int):
    """The metrics file, cut after the line of step `start`: later ones are written again."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines_up_to(path, start)))
    return path.open("a")
