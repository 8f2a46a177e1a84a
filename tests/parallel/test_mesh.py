import json

import pytest

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8, "data": 1},
    "tensor": {"tensor": 2, "data": -1},
    "all": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line.get("validation_loss"), line["grad_norm"]) for line in lines]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_gives_the_losses_of_one_device(command, trained, tmp_path, mesh):
    flags = [f"--config.mesh.{axis}={size}" for axis, size in MESHES[mesh].items()]
    done = command("train", f"--workdir={tmp_path}", "--devices=8", *flags)
    expected, got = losses(trained), losses(tmp_path)
    assert len(got) == len(expected) == 8
    for one, other in zip(expected, got, strict=True):
        assert other == tuple(None if x is None else pytest.approx(x, rel=2e-3) for x in one)
    assert "8 cpu device" in done.stdout
    if mesh == "fsdp":
        assert "fsdp" in done.stdout.split("mesh {")[0]


def test_a_run_goes_on_under_another_mesh(command, trained, tmp_path):
    command("train", f"--workdir={tmp_path}", "--config.train.steps=4", "--config.optim.schedule=constant")
    command(
        "train", f"--workdir={tmp_path}", "--config.optim.schedule=constant", "--devices=4", "--config.mesh.data=1",
        "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
    )  # fmt: skip
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


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
        (["--config.mesh.rules=(('.*',('rows',None)),)"], "'rows' is no mesh axis"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(command, tmp_path, flags, message):
    done = command("train", f"--workdir={tmp_path / 'x'}", "--devices=8", *flags, code=2)
    assert message in done.stderr.strip().splitlines()[-1]
