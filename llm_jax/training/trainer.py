"""The training loop: `summary = train(config, workdir)`.

A second call with the same arguments resumes from the last checkpoint, bit for bit on the same mesh.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import bars, checkpoints, configuration, files, object_store, runtime, tokenizers, trees
from llm_jax.checkpoints import adapters, run
from llm_jax.errors import UserError
from llm_jax.evaluation import builtin
from llm_jax.model import transformer
from llm_jax.parallel import processes
from llm_jax.schema import Config, other_libraries
from llm_jax.training import (
    attempts,
    bad_steps,
    checks,
    estimate,
    inputs,
    measurements,
    next_command,
    results,
    start,
    trackers,
)
from llm_jax.training import setup as setup_lib
from llm_jax.training.evaluator import Evaluator
from llm_jax.training.profiler import Profiler
from llm_jax.training.progress import Progress
from llm_jax.training.setup import Setup
from llm_jax.training.step import TrainState

Callback = Callable[[dict[str, Any]], Any]
_SLOW_SAVE = 5.0  # seconds of waiting for the storage after which a line is printed
_MACHINE_OPTIONS = ("data.cache_dir", "data.workers")  # options that may differ between processes


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run before its weights are loaded.

    Attributes:
      setup: the parts of training, with the configuration after `init_from` and the data have been applied.
      start: where the run starts from.
      data: the tokenizer and the rows.
      reference: the weights of the frozen model in the loss, or {}.
    """

    setup: Setup
    start: start.Start
    data: inputs.Inputs
    reference: Any


def check(config: Config, workdir: pathlib.Path | None = None) -> start.Start:
    """Validates a configuration without reading data, and returns the start of the run.

    Raises:
      UserError: see `start.find` and `setup.setup`; an unknown task.
    """
    run_start = start.find(config, workdir)
    config = run_start.config
    provisional = config.model.vocab_size or config.tokenizer.vocab_size or 512
    model_config = dataclasses.replace(config.model, vocab_size=provisional)
    estimate.check_batch(setup_lib.setup(dataclasses.replace(config, model=model_config)))
    for name in config.eval.tasks:
        builtin.load_task(name)
    return run_start


def prepare(config: Config, workdir: pathlib.Path | None = None) -> Prepared:
    """Determines the start of a run, validates its configuration, reads its data and builds its setup.

    The configuration is validated before the data is read. Nothing is written to `workdir`.

    Raises:
      UserError: see `start.find`, `setup.setup` and `inputs.load`.
    """
    run_start = check(config, workdir)
    with processes.main_first("to read the data"):
        data = inputs.load(run_start.config, run_start)
    options = {k: v for k, v in configuration.flat(data.config).items() if k not in _MACHINE_OPTIONS}
    contents = {"the text": data.source.sha256, "the tokenizer": tokenizers.digest(data.tokenizer)}
    processes.check_equal(contents | options, "the run")
    setup = setup_lib.setup(data.config, data.vocab_size)
    processes.connect(setup.mesh)
    reference = setup.load_reference(data.tokenizer)
    return Prepared(setup, run_start, data, reference)


@functools.partial(
    other_libraries.explain_unknown_keywords,
    within=other_libraries.within_overrides("llm_jax.config(RECIPE, {}) as `config`"),
)
def train(
    config: Config | str | os.PathLike[str] | Mapping[str, Any],
    workdir: str | os.PathLike[str],
    *,
    callback: Callback | None = None,
    stop: Callable[[], Any] | None = None,
    profile: bool = False,
    verbose: bool = True,
    attachments: Callable[[pathlib.Path], Sequence[pathlib.Path]] = lambda workdir: (),
) -> dict[str, Any]:
    """Trains a model, or resumes the run in `workdir`, and returns its summary.

    With several processes (`parallel.processes`), every process calls this function with a shared workdir. Process 0
    prints, writes the files and calls `callback`. If one process is asked to stop, all stop a few steps later.

    Args:
      config: a `Config`, or an argument of `llm_jax.config`.
      workdir: the directory of the run: config.json, metrics.jsonl, summary.json and checkpoints/.
      callback: called after every step with a dict of metrics, with the keys of metrics.jsonl (step, loss,
        tokens_per_second, validation_loss after an evaluation, ...). A true return value stops the run.
      stop: called after every step; if it returns a true value, the run saves a checkpoint and stops. A context manager
        is entered during the training loop.
      profile: trace three steps into WORKDIR/profile.
      verbose: print the parameters, the progress and the results.
      attachments: called with the workdir when a run with trackers (`report.to`) has finished; returns files, such as a
        report, that are uploaded to the trackers.

    Returns:
      The metrics of summary.json: validation_loss, validation_perplexity, validation_bits_per_byte, steps,
      tokens_per_second, seconds and others. For a run that was stopped early, {"stopped": the value returned by
      `stop`, or True, "steps": number of completed steps}.

    Raises:
      UserError: the configuration, the data or the workdir cannot be used, or the loss is not finite.
    """
    config = config if isinstance(config, Config) else configuration.load(config)
    if not str(workdir):
        raise UserError("--workdir is empty; expected the directory of the run")
    workdir = files.path(workdir)
    files.check_reachable(workdir)
    files.check_writable(workdir)
    checks.check_storage(workdir, config, profile, processes.count())
    is_single, is_main = processes.count() == 1, processes.is_main()
    verbose = verbose and is_main
    lock = None
    began = time.perf_counter()
    log = print if verbose else lambda *values, **options: None
    with object_store.as_user_errors(workdir), contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(bars.off())
        with processes.main_first("to lock the run directory"):
            # Another trainer could delete the checkpoint that this one reads, and several processes must find the same
            # checkpoint.
            if is_main and workdir.is_dir() and (not is_single or (workdir / "config.json").is_file()):
                lock = stack.enter_context(contextlib.closing(files.lock(workdir)))
        prepared = prepare(config, workdir)
        setup, run_start, data = prepared.setup, prepared.start, prepared.data
        config, c, method = setup.config, setup.config.train, setup.method
        log(inputs.describe(config, data))
        log(setup_lib.describe(setup))
        if is_main:
            files.make_directory(workdir)
        if is_main and lock is None:
            lock = stack.enter_context(contextlib.closing(files.lock(workdir)))
        processes.check_shared(workdir, "--workdir")
        detector = bad_steps.BadStepDetector(c, setup.weight_names, workdir / "metrics.jsonl", run_start.step)

        # ---------------------------------------------------------------- state
        fingerprint = _check_reference(prepared, workdir)
        for note in start.notes(run_start):
            log(note)
        state, base_record = _initial_state(prepared)
        if run_start.checkpoint:
            log(f"resuming from {run_start.checkpoint}")
        del prepared
        runtime.release_freed_memory()
        if is_main:
            files.write_json(workdir / "config.json", configuration.as_dict(config), durable=True)

        # ---------------------------------------------------------------- evaluation and samples
        tasks = {pathlib.Path(name).stem: builtin.load_task(name) for name in config.eval.tasks}
        evaluator = Evaluator(setup, data, tasks)
        if config.eval.prompts and not run_start.step:
            log(evaluator.sample("before training", state))

        # ---------------------------------------------------------------- the loop
        reports = config.report.to if is_main else ()
        tracking = trackers.open_all(reports, workdir, configuration.flat(config), run_start.step)
        stack.callback(tracking.close)
        writer = checkpoints.Writer(
            workdir, config, data.tokenizer, data.source.sha256, fingerprint, base_record, lock=lock
        )
        stack.callback(writer.close)
        writer.discard(run_start.step)  # damaged checkpoints, see `start.find`
        flops = transformer.flops_per_token(config.model, c.seq_len)
        peak = measurements.matmul_peak(config.model.precision.compute)
        progress = Progress(
            workdir,
            run_start.step,
            c.steps,
            flops,
            peak,
            detector,
            setup.weight_names,
            tracking,
            config.report.norms_every,
            verbose,
            lock,
        )
        stack.callback(progress.close)
        if is_main:
            attempts.begin(workdir, run_start.step)
        rollbacks = bad_steps.Rollbacks()
        profiler = Profiler(workdir, run_start.step, c.steps, profile and is_main, progress.write)
        stack.callback(profiler.stop)
        periods = {
            "evaluate": config.eval.every,
            "sample": config.report.samples_every if config.eval.prompts else 0,
            "norms": config.report.norms_every,
            "save": config.checkpoint.every,
        }
        done, skipped_batches = run_start.step, run_start.record.get("skipped_batches", 0)
        batches = setup.batches(data.train, done + skipped_batches, c.steps + skipped_batches)
        eval_metrics: dict[str, float] = {}
        evaluated = False
        agree_to_stop = processes.StopAgreement()
        stopping: Any = False
        stop_requested = False  # whether the callback returned a true value
        scope = stack.enter_context(contextlib.ExitStack())
        if isinstance(stop, contextlib.AbstractContextManager):
            scope.enter_context(stop)
        while done < c.steps and not stopping:
            profiler.before_step(done, state)
            batch = next(batches)
            state, metrics = setup.step(state, batch, detector.limit(done + 1))
            done, eval_metrics, evaluated = done + 1, {}, False
            stopping = agree_to_stop(stop_requested or (stop() if stop else False))
            due = {name for name, every in periods.items() if every and done % every == 0}
            due = {"save"} if stopping else due | {"evaluate", "save"} if done == c.steps else due
            try:
                line = progress.step(done, metrics)
                stop_requested = stop_requested or bool(callback and is_main and line and callback(line))
                if stop_requested and is_single:
                    stopping, due = True, due | {"save"}
                if due:
                    progress.collect()
            except bad_steps.BadStep as bad:
                writer.wait()
                to = _rollback_step(config, workdir, bad)
                rollbacks.count(to, bad)
                writer.discard(to)
                detector.rewind(to)
                progress.rewind(to)
                progress.write(f"step {bad.step}: {bad.reason}; rolling back to step {to} and skipping these batches")
                state = _earlier_state(setup, run_start, workdir, to, state.frozen)
                done, skipped_batches = to, skipped_batches + bad.step - to
                batches = setup.batches(data.train, done + skipped_batches, c.steps + skipped_batches)
                continue
            if not due:
                continue
            final_only: set[str] = set()  # metrics over other rows or examples than in the periodic evaluations
            statistics_of_state = evaluator.statistics(state, batch) if "norms" in due else {}
            if "evaluate" in due:
                if done == c.steps and (note := evaluator.final_note()):
                    progress.write(note)
                eval_metrics, evaluated = evaluator.evaluate(state, done == c.steps), True
                final_only = evaluator.final_only(eval_metrics)
                progress.write(f"step {done}: {evaluator.describe(eval_metrics)}")
            line = progress.flush(statistics_of_state, final_only, **eval_metrics)
            stop_requested = stop_requested or bool(callback and is_main and line and callback(line))
            stopping = stopping or (stop_requested and is_single)
            if "evaluate" in due:
                progress.pictures(done, evaluator.pictures(state))
            if "sample" in due and done < c.steps:
                progress.text(done, "samples", evaluator.sample(f"after {done} steps", state))
            if "save" in due or stopping:
                saved = method.checkpoint_params(state.params, state.frozen)
                loss = None if "validation_loss" in final_only else eval_metrics.get("validation_loss")
                rows = eval_metrics.get("validation_rows")
                files.check_lock(lock)
                progress.sync()
                save_began = time.perf_counter()
                writer.save(done, saved, state.opt_state, loss, rows, skipped_batches, state.ema)
                if (seconds := time.perf_counter() - save_began) > _SLOW_SAVE:
                    fewer = f"a larger checkpoint.every ({every}) or " if (every := config.checkpoint.every) else ""
                    cure = f"{fewer}faster storage avoids this"
                    progress.write(f"step {done}: training waited {seconds:.0f} s for a save; {cure}")
            progress.restart_clock()
        scope.close()
        profiler.close(state)
        writer.wait()
        if config.eval.prompts and done == c.steps:
            progress.text(done, "samples", evaluator.sample("after training", state))
        progress.close()
        if is_main:
            attempts.end(workdir)
        if done < c.steps:
            return {"stopped": stopping, "steps": done}

        # ---------------------------------------------------------------- the results
        if not evaluated:  # the run was already complete; these metrics differ between processes
            eval_metrics = evaluator.evaluate(state, final=True)
        rate = statistics.median(progress.rates) if progress.rates else None
        summary = results.summarize(setup, data, state, workdir, eval_metrics, rate)
        summary["seconds"] = time.perf_counter() - began
        if is_main:
            files.write_json(workdir / "summary.json", summary)
            if tracking:
                with contextlib.ExitStack() as copies:
                    paths = [copies.enter_context(files.local_copy(path)) for path in attachments(workdir)]
                    tracking.finish(summary, paths)
        log(results.describe_results(workdir, config, summary))
        log(f"next: {next_command.after_training(workdir, config, data.tokenizer)}")
        return summary


def _check_reference(prepared: Prepared, workdir: pathlib.Path) -> str:
    """Returns the fingerprint of the frozen model in the loss, or "". Raises UserError if a resumed run's differs."""
    reference, run_start, config = prepared.reference, prepared.start, prepared.setup.config
    fingerprint = trees.fingerprint(reference) if reference else ""
    if reference and run_start.checkpoint and run_start.record["other"] != fingerprint:
        name = config.loss.teacher or config.init_from
        raise UserError(f"{name}: its weights have changed since {workdir} was started; choose another --workdir")
    return fingerprint


def _initial_state(prepared: Prepared) -> tuple[TrainState, dict[str, str] | None]:
    """Returns (the initial or resumed state, the path and hash of the base of adapters for the record)."""
    setup, run_start = prepared.setup, prepared.start
    base = setup.load_base(run_start.origin) if setup.method.reads_base(bool(run_start.checkpoint)) else None
    base_record = None
    if run_start.origin and setup.config.lora.rank:
        assert base is not None
        base_record = {"path": run_start.origin.name, "sha256": trees.fingerprint(base)}
        if run_start.checkpoint:
            adapters.check_base(run_start.checkpoint, run_start.record, **base_record)
    if run_start.checkpoint:
        state, constants = restore(setup, run_start.checkpoint, run_start.record)
    else:
        params, constants = setup.init_trainable(base)
        state = setup.initial_state(params)
    return state.replace(frozen=setup.freeze(base, constants, prepared.reference)), base_record


def _earlier_state(
    setup: Setup, run_start: start.Start, workdir: pathlib.Path, step: int, frozen: dict[str, Any]
) -> TrainState:
    """Returns the state after `step` updates: from the last checkpoint, or initialized again for step 0."""
    if step:
        directory = checkpoints.find(workdir)
        return restore(setup, directory, checkpoints.verify(directory))[0].replace(frozen=frozen)
    params, _ = setup.init_trainable(setup.load_base(run_start.origin))
    return setup.initial_state(params).replace(frozen=frozen)


def restore(setup: Setup, directory: pathlib.Path, record: Mapping[str, Any]) -> tuple[TrainState, Any]:
    """Returns (state of a verified checkpoint with empty `frozen`, constant parts of adapters)."""
    shapes = setup.state
    saved = setup.method.checkpoint_params(shapes.params, shapes.frozen)
    params, *rest = run.restore_state(directory, record, saved, shapes.opt_state, shapes.ema)
    trainable, constants = setup.method.split(params)
    step = jax.device_put(jnp.int32(record["step"]), setup.replicated)
    return TrainState(step, trainable, *rest), constants


def _rollback_step(config: Config, workdir: pathlib.Path, bad: bad_steps.BadStep) -> int:
    """Returns the step of the last regular checkpoint, or 0.

    Raises:
      UserError: `train.on_bad_step` is not "rollback"; with "skip", too many consecutive steps were bad.
    """
    saved = processes.broadcast(checkpoints.steps(workdir), waiting_for="to choose the checkpoint to go back to")
    if config.train.on_bad_step != "rollback":
        cure = bad_steps.CURES[config.train.on_bad_step]
        raise UserError(f"step {bad.step}: {bad.reason}; {f'step {saved[-1]} is saved; ' if saved else ''}{cure}")
    # Exclude checkpoints saved on a signal, which an uninterrupted run would not have.
    return ([s for s in saved if s % (config.checkpoint.every or 1) == 0] or saved or [0])[-1]
