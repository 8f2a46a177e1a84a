"""Trains a language model: `python -m llm_jax.train --config=configs/default.py --workdir=runs/x`.

The same command resumes an interrupted run; the result equals the result of an uninterrupted run bit for bit.
"""

import pathlib
import sys
import types

from llm_jax import cli, files, object_store, runtime
from llm_jax.cli import signals
from llm_jax.schema import Config

FLAGS = cli.Flags()
FLAGS.string("workdir", None, "directory of the run (config, metrics, checkpoints)", required=True)
FLAGS.integer("devices", None, "simulate this many CPU devices; default: the devices of this machine")
FLAGS.string("coordinator_address", "", "several processes: HOST:PORT of process 0; default: detected from the cluster")
FLAGS.integer("num_processes", 0, "with --coordinator_address: number of processes; 0: not set")
FLAGS.integer("process_id", -1, "with --coordinator_address: index of this process, from 0; -1: not set")
FLAGS.string("coordinator_bind_address", "", "HOST:PORT at which process 0 listens; default: --coordinator_address")
FLAGS.number("start_timeout", 300.0, "seconds to wait until all processes have started")
FLAGS.boolean("dry_run", False, "print parameters and shardings, and estimate time, memory and disk of the run")
FLAGS.boolean("profile", False, "write a trace of three training steps to WORKDIR/profile, for TensorBoard or xprof")
NEEDS: cli.Needs = ((("profile",), "--dry_run is given", lambda f: not f.dry_run),)


def main(f: cli.Flags) -> int:
    runtime.retain_freed_memory()
    runtime.simulate_devices(f.devices)
    if f.devices in (None, 1):
        runtime.disable_async_dispatch()
    from llm_jax.parallel import processes

    addresses = (f.coordinator_address, f.num_processes, f.process_id, f.coordinator_bind_address, f.start_timeout)
    with processes.connected(*addresses):
        return _train(f)


def _train(f: cli.Flags) -> int:
    from llm_jax.parallel import processes
    from llm_jax.training import trainer

    config = f.config
    if f.dry_run:
        print_estimate(config, files.path(f.workdir))
        return 0
    signal = signals.DeferredSignals(resumption=lambda: resumption(f))
    summary = trainer.train(config, f.workdir, stop=signal, profile=f.profile, attachments=write_report)
    if number := int(summary.get("stopped", 0)):  # the signal number; another process may have received the signal
        steps = config.train.steps
        message = f"saved at step {summary['steps']} of {steps} in {f.workdir}; the same command resumes from there"
        if processes.is_main():
            print(f"\n{message}", file=sys.stderr)
        return 128 + number
    return 0


def resumption(f: cli.Flags) -> str:
    """What the same command does after it was stopped. Called at an interrupt: imports nothing and reads no network."""
    workdir = f["workdir"].value
    if not workdir or object_store.is_object(workdir):
        return "the same command resumes from the last checkpoint, or from step 0 without one"
    names = [path.name for path in (files.path(workdir) / "checkpoints").glob("*")]
    if steps := [int(name) for name in names if name.isascii() and name.isdigit()]:
        return f"the same command resumes from the checkpoint of step {max(steps)}"
    return "the same command starts again from step 0 (there is no checkpoint yet)"


def print_estimate(config: Config, workdir: pathlib.Path) -> None:
    """Prints the parameters, shardings and estimated time, memory and disk space of a run; writes nothing."""
    from llm_jax.training import estimate, inputs, trainer
    from llm_jax.training import setup as setup_lib

    prepared = trainer.prepare(config, workdir)
    setup, data = prepared.setup, prepared.data
    print(inputs.describe(setup.config, data))
    print(setup_lib.describe(setup), flush=True)
    held_out = {"": data.held_out, **data.held_out_by_source}
    counts = {name: len(rows) for name, rows in held_out.items() if rows is not None}
    needs = estimate.estimate(setup, counts, workdir, prepared.start.step)
    print(estimate.describe(needs, setup.config, data.num_tokens[0]))


def write_report(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Writes WORKDIR/report.html, with secrets removed, for upload to trackers; returns a list with its path."""
    import dataclasses

    from llm_jax.research import page, runs
    from llm_jax.training.trackers import redact

    (run,) = runs.load([workdir])
    public = dataclasses.replace(run, config=redact(run.config), samples=redact(run.samples))
    path = workdir / "report.html"
    files.write(path, page.render([public], files.absolute(workdir).name))
    return [path]


class _CallableModule(types.ModuleType):
    """Makes the module callable, so that `llm_jax.train(...)` still works after this module has been imported."""

    def __call__(self, *args, **kwargs):
        from llm_jax.training import trainer

        return trainer.train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

COMMAND = cli.Command(
    "train",
    main,
    FLAGS,
    needs=NEEDS,
    interrupt_message=lambda f: f"interrupted; {resumption(f)}",
    config=Config,
    compiles=True,
    memory_hint=(
        "use a smaller --config.train.batch_size or train.seq_len, --config.model.remat=full, or "
        "--config.train.grad_accumulation=2 or more; python -m llm_jax.plan --memory shows the effect"
    ),
)

if __name__ == "__main__":
    cli.start(COMMAND)
