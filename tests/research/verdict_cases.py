"""Made-up figures for the rules of experiments/."""

import importlib

from absl import flags

SEEDS = 3


def load(name):
    """A module of experiments/, without the flags that it defines: several scripts define --seeds."""
    module = importlib.import_module(f"experiments.{name}")
    for flag in flags.FLAGS.flags_by_module_dict().pop(module.__name__, []):
        delattr(flags.FLAGS, flag.name)
    return module


def seeds(value, spread=0.001):
    """Three values around one."""
    return [value - spread, value, value + spread]


def of(results):
    return {result.statement + (result.part and f" {result.part}"): result.verdict for result in results}
