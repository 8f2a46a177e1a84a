"""Pieces of a long computation that are kept on disk and found again: weights of any kind, and notes about them."""

import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from llm_jax import trees, weights
from llm_jax.checkpoints.directory import make_directory, read_json, write_json


def write(directory: pathlib.Path, tree: Any, notes: Any) -> None:
    """Writes a parameter tree and JSON notes; the directory appears whole or not at all."""
    partial = directory.with_name(f".partial-{directory.name}")
    shutil.rmtree(partial, ignore_errors=True)
    make_directory(partial)
    write_json(partial / "notes.json", {"params": trees.describe(tree), "notes": notes})
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        orbax.save(partial.absolute() / "arrays", tree)
    os.rename(partial, directory)


def read(directory: pathlib.Path) -> tuple[dict[str, Any], Any]:
    """The inverse of `write`: (tree on the default device, notes)."""
    said = read_json(directory / "notes.json")
    abstract = trees.unflatten({path: weights.abstract(r) for path, r in said["params"].items()})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        return orbax.restore(directory.absolute() / "arrays", placed), said["notes"]
