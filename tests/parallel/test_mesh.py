import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from llm_jax.checkpoints import abstract_params
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import mesh as mesh_lib
from tests.parallel import on_mesh

AUTO = (AxisType.Auto,) * len(mesh_lib.AXES)  # by default, axes are explicit from JAX 0.12 on
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8, "data": 1},
    "tensor": {"tensor": 2, "data": -1},
    "all": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line.get("validation_loss"), line["grad_norm"]) for line in lines]


def assert_same_losses(one_device, mesh):
    expected, got = losses(one_device), losses(mesh)
    assert len(got) == len(expected) == 8
    for one, other in zip(expected, got, strict=True):
        assert other == tuple(None if x is None else pytest.approx(x, rel=2e-3) for x in one)


# "tensor" splits rows over the axis "data" as well.
@pytest.mark.parametrize("mesh", [pytest.param("data", marks=pytest.mark.slow), "fsdp", "tensor", "all"])
def test_every_mesh_gives_the_losses_of_one_device(command, trained, tmp_path, mesh):
    flags = [f"--config.mesh.{axis}={size}" for axis, size in MESHES[mesh].items()]
    done = command("train", f"--workdir={tmp_path}", "--devices=8", *flags)
    assert_same_losses(trained, tmp_path)
    assert "8 cpu device" in done.stdout
    if mesh == "fsdp":
        assert "fsdp" in done.stdout.split("mesh {")[0]


def test_a_run_resumes_on_another_mesh(command, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    done = command("train", f"--workdir={workdir}", "--devices=4", *mesh)
    assert f"resuming from {workdir}/checkpoints/4" in done.stdout
    assert_same_losses(trained, workdir)


def test_dry_run_prints_the_shardings_and_writes_nothing(command, tmp_path):
    done = command(
        "train",
        f"--workdir={tmp_path / 'x'}",
        "--dry_run",
        "--devices=4",
        "--config.mesh.tensor=4",
        "--config.mesh.data=1",
    )
    row = next(line for line in done.stdout.splitlines() if line.startswith("layers/0:2/0::1/mlp/up"))
    assert "(2, 32, 48)" in row and "tensor" in row
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.mesh.data=3"], "does not fit 8 devices"),
        (["--config.mesh.data=0"], "positive number"),
        (["--config.mesh.data=-1", "--config.mesh.fsdp=-1"], "for at most one axis"),
        (["--config.train.batch_size=6"], "cannot be split over mesh data x fsdp = 8"),
        (["--config.mesh.rules=(('.*',('rows',None)),)"], "'rows' is not a mesh axis"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(command, tmp_path, flags, message):
    done = command("train", f"--workdir={tmp_path / 'x'}", "--devices=8", *flags, code=2)
    assert message in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("layer", "scanned"), [("1", False), (".*", True)])
def test_rules_that_name_layers_hold_while_weights_are_gathered(layer, scanned):
    """Layers that are not scanned are traced once for all that are gathered alike; here layer 1 differs."""
    rules = (
        (r"layers/.*/attention/query", ("fsdp", "tensor")),
        (rf"layers/{layer}/mlp/up", ("tensor", "fsdp")),
        (r".*", ("fsdp", None)),
    )
    model = Transformer(dataclasses.replace(on_mesh.tiny().model, scan_layers=scanned))
    mesh = AbstractMesh((1, 4, 1, 2), mesh_lib.AXES, axis_types=AUTO)
    apply = mesh_lib.with_mesh(mesh, lambda params, tokens: model.apply({"params": params}, tokens), rules)
    text = str(jax.make_jaxpr(apply)(abstract_params(model), jax.ShapeDtypeStruct((8, 16), jnp.int32)))
    columns, rows = (len(re.findall(rf"spec=\w+\({axes}\)", text)) for axes in ("None, 'tensor'", "'tensor', None"))
    assert (columns, rows) == (1 if scanned else 2, 1)


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_of_the_head_is_reduced_before_the_layers(tied):
    """Otherwise every device keeps the whole gradient of the head during the backward pass of the layers."""
    config = on_mesh.tiny(**{"model.tie_embeddings": tied})
    model, mesh = Transformer(config.model), AbstractMesh((1, 8, 1, 1), mesh_lib.AXES, axis_types=AUTO)
    params, tokens = abstract_params(model), jax.ShapeDtypeStruct((8, 16), jnp.int32)

    def loss(params, tokens):
        return jnp.sum(model.apply({"params": params}, tokens))

    def barriers(rules):
        text = str(jax.make_jaxpr(mesh_lib.with_mesh(mesh, jax.grad(loss), rules))(params, tokens))
        return re.findall(r"(\w+):\w+\[8,16,32\] (\w+):\w+\[[\d,]+\] = optimization_barrier", text)

    assert len(barriers(config.mesh.rules)) == 1 and not barriers(())
