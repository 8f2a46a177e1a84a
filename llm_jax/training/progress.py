"""Reports the metrics of a run during training: progress bar, metrics.jsonl and trackers."""

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from llm_jax import bars, files
from llm_jax.errors import UserError
from llm_jax.parallel import processes
from llm_jax.training.bad_steps import BadStepDetector, read_metrics
from llm_jax.training.trackers import Trackers

Metrics = Mapping[str, Any]  # {name: jax.Array}
_MAX_SILENCE = 60.0  # maximum seconds between printed lines without a terminal


@dataclasses.dataclass
class _Pending:
    """A dispatched step whose metrics have not been read.

    Attributes:
      ready: time at which the result was ready, in seconds of `time.perf_counter`; None: not known yet.
    """

    step: int
    metrics: Metrics
    ready: float | None = None


class Progress:
    """Reports every step when its result is ready, without delaying the next step.

    The time of a step is measured from the end of the previous step, evaluation or save to the end of the step.

    Args:
      detector: receives every step; for a bad step it raises `BadStep`, also from the methods of this class.
      weights: the per-layer names of the trainable weights, in the order of the norms.
      trackers: receive the same data as metrics.jsonl.
      norms_every: steps between lines with norms; 0: none.
      verbose: whether to show the bar and print.
      lock: the `files.lock` of the run; see `files.open_to_append`.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start: int,
        steps: int,
        flops_per_token: float,
        peak: float,
        detector: BadStepDetector,
        weights: Sequence[str] = (),
        trackers: Trackers | None = None,
        norms_every: int = 0,
        verbose: bool = True,
        lock: Any = None,
    ):
        self._path = workdir / "metrics.jsonl"
        self._lock = lock
        self._file = _reopen(self._path, start, lock)
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=None if verbose else True,
        )
        self._start, self._steps, self._verbose = start, steps, verbose
        self._flops_per_token, self._peak = flops_per_token, peak
        self._detector, self._weights, self._norms_every = detector, weights, norms_every
        self._trackers = trackers or Trackers()
        self._pending: _Pending | None = None
        self._printed = time.perf_counter()
        self._clock = time.perf_counter()  # end of the previous step, evaluation or save
        self._line: dict[str, Any] = {}
        self._last_evaluation = ""
        # The first step after compilation, and the time at which it was ready.
        self._first: tuple[int, float] | None = None
        self.rates: list[float] = []  # input tokens per second of every step, without padding

    def step(self, step: int, metrics: Metrics) -> dict[str, Any] | None:
        """Records the metrics of a dispatched step; writes and returns the line of the previous step."""
        previous, self._pending = self._pending, _Pending(step, metrics)
        self._collect(previous)
        line = self._write()
        if all(value.is_ready() for value in metrics.values()):  # on CPUs, dispatch waits until the step is finished
            self._pending.ready = time.perf_counter()
        return line

    def collect(self) -> None:
        """Waits for the pending step and reads its metrics."""
        pending, self._pending = self._pending, None
        self._collect(pending)

    def _collect(self, pending: _Pending | None) -> None:
        if pending is None:
            return
        metrics = jax.device_get(dict(pending.metrics))
        ready = time.perf_counter() if pending.ready is None else pending.ready
        step = pending.step
        norms = {name: metrics.pop(f"{name}_norms") for name in ("gradient", "update") if f"{name}_norms" in metrics}
        bad = bool(metrics.pop("bad"))
        values = {name: float(value) for name, value in metrics.items()}
        seconds, self._clock = max(ready - self._clock, 1e-9), ready
        rate = values["input_tokens"] / seconds
        self.rates.append(rate)
        mfu = rate * self._flops_per_token / self._peak
        timing = {"tokens_per_second": rate, "mfu": mfu, "seconds": seconds}
        self._line = {"step": step, **values, **timing}
        if bad:  # JSON has no NaN
            self._line = {k: v if math.isfinite(v) else None for k, v in self._line.items()} | {"bad": True}
        if self._norms_every and (step == 1 or step % self._norms_every == 0):
            self._line["norms"] = {
                name: dict(zip(self._weights, map(float, values), strict=True)) for name, values in norms.items()
            }
        text = f"loss {values['loss']:.3f}, {rate:,.0f} tokens/s, MFU {mfu:.0%}{self._last_evaluation}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(1)
        self._first = self._first or (step, ready)
        if self._verbose and self._bar.disable and (self._is_milestone(step) or ready - self._printed > _MAX_SILENCE):
            self._printed = ready
            print(f"step {step} of {self._steps}: {text}{self._time_left(step, ready)}", flush=True)
        if note := self._detector.record(step, values["loss"], bad, norms["gradient"]):
            self.write(note)

    def _time_left(self, step: int, now: float) -> str:
        """Returns ", N min left", estimated from the steps after the first, with evaluations and saves; or ""."""
        if self._first is None or step <= self._first[0] or step == self._steps:
            return ""
        each = (now - self._first[1]) / (step - self._first[0])
        return f", {bars.duration(each * (self._steps - step))} left"

    def _is_milestone(self, step: int) -> bool:
        """Whether a run without a terminal prints this step: the first, the last, and every tenth of the run."""
        tenth = max(self._steps // 10, 1)
        return step in (self._start + 1, self._steps) or step % tenth == 0

    def flush(
        self,
        statistics: Mapping[str, Mapping[str, Any]] | None = None,
        untracked: Collection[str] = (),
        **extra: float,
    ) -> dict[str, Any] | None:
        """Writes and returns the line of the pending step.

        Args:
          statistics: {kind: {weight or layer: value}}; the kinds are the norms "parameter" and "activation", and
            "attention_entropy".
          untracked: names in `extra` that are not sent to the trackers.
          extra: additional metrics, such as the results of an evaluation.
        """
        self.collect()
        for kind, values in (statistics or {}).items():
            numbers = {name: float(value) for name, value in values.items()}
            if kind == "attention_entropy":
                self._line[kind] = numbers
            else:
                self._line["norms"] = self._line.get("norms", {}) | {kind: numbers}
        self._line |= extra
        if "validation_loss" in extra and "step" in self._line:
            self._last_evaluation = f", held-out loss {extra['validation_loss']:.3f} at step {self._line['step']}"
        return self._write(untracked)

    def _write(self, untracked: Collection[str] = ()) -> dict[str, Any] | None:
        line, self._line = self._line, {}
        if "step" not in line:
            return None
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error
        scalars = {k: v for k, v in line.items() if isinstance(v, float) and k not in untracked}
        for kind, norms in line.get("norms", {}).items():
            scalars |= {f"{kind}_norm/{weight}": value for weight, value in norms.items()}
            if kind in ("parameter", "update"):  # norm over all weights; the norm of the gradient is `grad_norm`
                scalars[f"{kind}_norm"] = math.hypot(*norms.values())
        entropies = line.get("attention_entropy", {})
        scalars |= {f"attention_entropy/{layer}": value for layer, value in entropies.items()}
        self._trackers.scalars(line["step"], scalars)
        return line

    def text(self, step: int, name: str, text: str) -> None:
        """In process 0, prints a text above the bar, appends it to samples.jsonl and sends it to the trackers."""
        if not processes.is_main():
            return
        self.write(text)
        path = self._path.with_name("samples.jsonl")
        try:
            with files.open_to_append(path, self._lock) as file:
                file.write(json.dumps({"step": step, "name": name, "text": text}) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        self._trackers.text(step, name, text)

    def pictures(self, step: int, pictures: Mapping[str, bytes | str]) -> None:
        """Writes WORKDIR/pictures/NAME-STEP.png and sends it to the trackers; prints the reason for a missing picture.

        Args:
          pictures: {name: PNG bytes, or the reason why the picture cannot be drawn}.
        """
        for name, content in pictures.items():
            if isinstance(content, str):
                self.write(f"step {step}: no picture '{name}' ({content})")
                continue
            path = self._path.parent / "pictures" / f"{name}-{step}.png"
            files.write(path, content)
            with files.local_copy(path) as local:
                self._trackers.picture(step, f"pictures/{name}", local)

    def sync(self) -> None:
        """Flushes metrics.jsonl to the disk, so that after a power failure no line before a checkpoint is missing."""
        if processes.is_main():
            files.sync(self._file)

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`."""
        self._pending, self._line = None, {}
        self._file.close()
        self._file = _reopen(self._path, step, self._lock)
        self._bar.n = step
        self._bar.refresh()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restarts the clock after an evaluation or a save, whose time is not part of a step."""
        self._clock = time.perf_counter()

    def write(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._verbose:
            self._bar.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Closes the bar and the file; further calls have no effect."""
        self._bar.close()
        self._file.close()


def _reopen(path: pathlib.Path, start: int, lock: Any):
    """Opens the metrics file and truncates it after the line of step `start`; later steps are repeated.

    Process 0 writes the file; other processes discard their lines.
    """
    if not processes.is_main():
        return open(os.devnull, "a")
    files.write(path, "".join(json.dumps(line) + "\n" for line in read_metrics(path, start)), durable=True)
    return files.open_to_append(path, lock)
