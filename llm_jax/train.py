"""Trains a language model: `python -m llm_jax.train --config=configs/default.py --workdir=runs/x`.

Started again with the same command it resumes where it was, bit for bit.
"""

import sys
import types

from absl import flags

from llm_jax import cli

cli.define_config()
flags.DEFINE_string("workdir", None, "directory of the run (config, metrics, checkpoints)", required=True)
flags.DEFINE_integer("devices", 0, "simulate this many CPU devices")
flags.DEFINE_boolean("dry_run", False, "print the parameters and their shardings, and stop")
flags.DEFINE_boolean("profile", False, "trace three steps of this start into WORKDIR/profile, for TensorBoard or xprof")
NEEDS: cli.Needs = ((("profile",), "--dry_run is given", lambda f: not f.dry_run),)


def main() -> None:
    f = flags.FLAGS
    cli.keep_memory()
    cli.use_devices(f.devices)
    if f.devices <= 1:
        cli.one_step_at_a_time()
    from llm_jax.training import inputs, trainer
    from llm_jax.training import setup as setup_lib

    config = cli.load_config()
    if f.dry_run:
        import pathlib

        prepared = trainer.prepare(config, pathlib.Path(f.workdir).expanduser())
        print(inputs.describe(prepared.setup.config, prepared.inputs))
        print(setup_lib.describe(prepared.setup))
        return
    with cli.signals_noted() as signal_number:
        summary = trainer.train(config, f.workdir, stop=signal_number, profile=f.profile)
        number = signal_number()
    if number and summary.get("stopped"):
        steps = config.train.steps
        cli.leave(number, f"saved at step {summary['steps']} of {steps}; the same command resumes from there")


class _CallableModule(types.ModuleType):
    """`llm_jax.train` is this module, and stays the function when the module has been imported."""

    def __call__(self, *args, **kwargs):
        from llm_jax.training import trainer

        return trainer.train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    cli.run(main, "interrupted; the same command resumes from the last checkpoint", NEEDS)
