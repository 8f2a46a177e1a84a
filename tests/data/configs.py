"""Configurations of data for tests."""

import dataclasses
from typing import Any

from llm_jax import configuration
from llm_jax.schema import DataConfig


def data_config(source: Any, cache: Any = "", **changes: Any) -> DataConfig:
    """The default options of `data` with another source, cache directory and other changes, read by one process."""
    options = {"source": str(source), "cache_dir": str(cache), "validation_fraction": 0.1, "workers": 1}
    return dataclasses.replace(configuration.default("data"), **options | changes)
