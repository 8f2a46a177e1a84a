"""Options whose default values are computed from other options. A run records the computed value."""

from collections.abc import Set
from typing import Any


def warmup_steps(steps: int) -> int:
    """The default of `optim.warmup_steps` for `train.steps`."""
    return steps // 14


def reset_derived(mapping: dict[str, Any], overridden: Set[str]) -> None:
    """Resets a recorded option to its symbolic default, in place, if an override changes the option it depends on.

    Args:
      mapping: the complete nested configuration of a run, before the overrides.
      overridden: dotted keys of the overrides.
    """
    optim, steps = mapping["optim"], mapping["train"]["steps"]
    if "train.steps" in overridden and optim["warmup_steps"] == warmup_steps(steps):
        optim["warmup_steps"] = -1
