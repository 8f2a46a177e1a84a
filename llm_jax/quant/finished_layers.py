"""Stores finished layers of a quantization on disk, from which an interrupted command resumes."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from llm_jax import files, trees, weights


def write(directory: pathlib.Path, tree: Any, notes: Any) -> None:
    """Writes a parameter tree and JSON notes; the directory appears complete or not at all."""
    with files.new_directory(directory, durable=True) as partial:
        files.write_json(partial / "notes.json", {"params": trees.describe(tree), "notes": notes})
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
            orbax.save(partial.absolute() / "arrays", tree)


def read(directory: pathlib.Path) -> tuple[dict[str, Any], Any]:
    """The inverse of `write`: (tree on the default device, notes)."""
    record = files.read_json(directory / "notes.json")
    abstract = trees.unflatten({path: weights.abstract(r) for path, r in record["params"].items()})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        return orbax.restore(directory.absolute() / "arrays", placed), record["notes"]
