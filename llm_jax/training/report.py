"""What a run tells: the parameter table, the progress bar, a JSON line a step, model-flops utilization."""

import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from llm_jax import trees


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


class Progress:
    """The bar on the terminal and `metrics.jsonl`. Metrics stay on the device until the next step is sent off."""

    def __init__(self, workdir: pathlib.Path, start: int, steps: int, flops_per_token: float, peak: float):
        self._file = _reopen(workdir / "metrics.jsonl", start)
        self._bar = tqdm(
            total=steps, initial=start, desc="training", unit="step", dynamic_ncols=True, mininterval=0.5, disable=None
        )
        self._steps, self._said = steps, time.perf_counter()
        self._flops_per_token, self._peak = flops_per_token, peak
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._clock = time.perf_counter()
        self.rates: list[float] = []  # tokens per second of every step
        self._line: dict[str, float] = {}

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of step `step` and writes those of the step before."""
        self.flush()
        self._pending = (step, metrics)

    def collect(self) -> None:
        """Waits for the step in hand and reads its metrics."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        rate = values["tokens"] / max(now - self._clock, 1e-9)
        self._clock = now
        self.rates.append(rate)
        mfu = rate * self._flops_per_token / self._peak
        self._line = {"step": step} | values | {"tokens_per_second": rate, "mfu": mfu}
        text = f"loss {values['loss']:.3f}, {rate:,.0f} tokens/s, MFU {mfu:.0%}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(1)
        if self._bar.disable and now - self._said > 10:  # no terminal: a line now and then
            self._said = now
            print(f"step {step} of {self._steps}: {text}", flush=True)

    def flush(self, **extra: float) -> None:
        """Writes the line of the step in hand, `extra` figures included."""
        self.collect()
        if self._line:
            self._file.write(json.dumps(self._line | extra) + "\n")
            self._file.flush()
            self._line = {}

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


def _reopen(path: pathlib.Path, start: int):
    """The metrics file, cut after the line of step `start`: later ones are written again."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # the line a killed process was writing
                break
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a")
