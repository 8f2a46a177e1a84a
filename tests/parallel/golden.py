"""The shardings of every parameter of the recipes, and the collectives of the tiny model's training step.

python -m tests.parallel.golden        # writes golden.json; see the difference before you commit it
"""

import json
import pathlib
from typing import Any

import jax
from jax.sharding import AbstractMesh

from llm_jax import configuration, runtime, trees
from llm_jax.checkpoints import abstract_params
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import mesh as mesh_lib

PATH = pathlib.Path(__file__).with_name("golden.json")
RECIPES = ("default", "gpt3", "llama2_7b", "llama3_8b", "llama2_70b", "qwen3_32b")
MESHES = {"fsdp": (1, 256, 1, 1), "fsdp_tensor": (1, 32, 1, 8)}
FSDP = (("data", 1), ("fsdp", 8))
ACCUMULATED = (("train.batch_size", 16), ("train.grad_accumulation", 2))
STEPS: dict[str, tuple[tuple[tuple[str, Any], ...], ...]] = {  # (sizes of the mesh, further options)
    "fsdp": (FSDP,),
    "fsdp_context_tensor": ((("data", 1), ("fsdp", 2), ("context", 2), ("tensor", 2)),),
    "fsdp_accumulated": (FSDP, ACCUMULATED),
    "fsdp_accumulated_gather_once": (FSDP, (*ACCUMULATED, ("train.gather_once", True))),
}


def shardings() -> dict[str, Any]:
    """{recipe: {mesh: {parameter: "shape: axis of each axis of the array"}}}."""
    dump: dict[str, Any] = {}
    for recipe in RECIPES:
        config = configuration.load(recipe, {} if recipe not in ("default",) else {"model.vocab_size": 2048})
        params = abstract_params(Transformer(config.model))
        for name, sizes in MESHES.items():
            mesh = AbstractMesh(sizes, mesh_lib.AXES)
            specs = trees.flatten(mesh_lib.shardings(params, config.mesh.rules, mesh))
            rows = {path: f"{leaf.shape}: {tuple(specs[path].spec)}" for path, leaf in trees.flatten(params).items()}
            dump.setdefault(recipe, {})[name] = rows
    return dump


def version() -> str:
    """The version of JAX, without its last number: another compiler may need other collectives."""
    return ".".join(jax.__version__.split(".")[:2])


def main() -> None:
    runtime.simulate_devices(8)
    from tests.parallel import on_mesh

    recorded = json.loads(PATH.read_text())["collectives"] if PATH.exists() else {}
    recorded[version()] = {name: on_mesh.step_collectives(*step) for name, step in STEPS.items()}
    PATH.write_text(json.dumps({"shardings": shardings(), "collectives": recorded}, indent=1) + "\n")


if __name__ == "__main__":
    main()
