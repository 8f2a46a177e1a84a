"""Adapters from the command line: trained, resumed, loaded, refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax import checkpoints, files, lora, tokenizers, trees, weights
from llm_jax.checkpoints import adapters as adapters_form
from llm_jax.checkpoints.manifest import write_manifest
from llm_jax.errors import UserError
from tests.checkpoints.test_checkpoint import metrics

LORA = (
    "--config.lora.rank=4",
    "--config.lora.targets=('linear', 'embeddings')",
    "--config.lora.dropout=0.1",
)


@pytest.fixture(scope="module")
def run(command, trained, tmp_path_factory):
    """Eight steps of adapters over the run `trained`."""
    workdir = tmp_path_factory.mktemp("runs") / "adapters"
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    done = command("train", f"--workdir={workdir}", f"--config.init_from={trained}", *LORA)
    assert "weights from" in done.stdout and {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before
    return workdir


@pytest.fixture(scope="module")
def over_int8(command, trained, tmp_path_factory):
    """Eight steps of adapters over the run `trained` in int8."""
    workdir = tmp_path_factory.mktemp("runs") / "over_int8"
    flags = ("--config.lora.rank=4", "--config.quant.scheme=int8", "--config.optim.lr=0.1")
    command("train", f"--workdir={workdir}", f"--config.init_from={trained}", *flags)
    return workdir


def arrays(workdir):
    directory = checkpoints.find(workdir)
    return adapters_form.restore_adapters(directory, checkpoints.verify(directory))


def test_the_run_learns_and_its_checkpoint_is_small_and_names_its_base(run, trained):
    seen, base = metrics(run), checkpoints.find(trained)
    assert seen[-1]["validation_loss"] < metrics(trained)[-1]["validation_loss"]
    record = checkpoints.verify(checkpoints.find(run))
    assert record["base"] == {"path": str(base), "sha256": trees.fingerprint(llm_jax.load(trained).params)}
    summary = json.loads((run / "summary.json").read_text())
    optimizer = sum(int(np.prod(shape)) for shape, _ in record["optimizer"].values())
    assert optimizer <= 2 * summary["trained_parameters"] + 4 and summary["trained_parameters"] < summary["parameters"]
    assert {path.rsplit("/", 1)[1] for path in record["params"]} == {"a", "b", "scale"}


@pytest.mark.uncached
def test_resume_is_bitwise_over_a_base_that_has_moved(run, command, trained, tmp_path):
    shutil.copytree(run, tmp_path / "again")
    shutil.copytree(trained, tmp_path / "base")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    again = f"--workdir={tmp_path / 'again'}"
    done = command("train", again, f"--config.init_from={tmp_path / 'base'}", *LORA, process=True)
    assert "resuming from" in done.stdout
    assert metrics(tmp_path / "again") == metrics(run)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / "again"), arrays(run))


def test_every_command_accepts_a_run_with_adapters(run, command, text_file, tmp_path):
    model, params, tokenizer = llm_jax.load(run)
    assert isinstance(trees.flatten(params)["layers/0/mlp/up"], weights.Adapted)
    ids = jnp.asarray([tokenizer.encode("the model reads")])
    logits = jax.jit(lambda p: model.apply({"params": p}, ids))(params)
    found = json.loads(command("evaluate", f"--checkpoint={run}", "--json").stdout)
    assert found["loss"] == pytest.approx(metrics(run)[-1]["validation_loss"], rel=1e-5)
    assert command("generate", f"--checkpoint={run}", "--prompt=the ", "--max_new_tokens=3").stdout
    command("convert", f"--input={run}", f"--output={tmp_path / 'hf'}", "--to=hf")  # merged
    again = llm_jax.load(tmp_path / "hf")
    np.testing.assert_allclose(jax.jit(again.model.apply)({"params": again.params}, ids), logits, atol=2e-5)


def test_peft_and_back_over_a_base_of_hugging_faces(trained, command, tmp_path):
    """init_from takes anyone's checkpoint, --to=peft names it, and every command takes what was written."""
    command("convert", f"--input={trained}", f"--output={tmp_path / 'base'}", "--to=hf")
    flags = (f"--config.init_from={tmp_path / 'base'}", "--config.lora.rank=3", "--config.train.steps=3")
    command("train", f"--workdir={tmp_path / 'run'}", *flags)
    command("convert", f"--input={tmp_path / 'run'}", f"--output={tmp_path / 'peft'}", "--to=peft")
    ours, theirs = llm_jax.load(tmp_path / "run"), llm_jax.load(tmp_path / "peft")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "peft").iterdir()}
    assert tokenizers.digest(ours.tokenizer) == tokenizers.digest(theirs.tokenizer)
    ids = jnp.asarray([ours.tokenizer.encode("the model reads")])
    logits = [jax.jit(one.model.apply)({"params": one.params}, ids) for one in (ours, theirs, llm_jax.load(trained))]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
    assert np.abs(logits[2] - logits[0]).max() > 1e-3
    done = command("convert", f"--input={trained}", f"--output={tmp_path / 'x'}", "--to=peft", code=2)
    assert "--to=peft writes adapters" in done.stderr
    settings = tmp_path / "peft" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "/gone"}))
    moved = (f"--input={tmp_path / 'peft'}", f"--output={tmp_path / 'merged'}", "--to=hf")
    assert "/gone does not exist, and there is no checkpoint of this name" in command("convert", *moved, code=2).stderr
    command("convert", *moved, f"--base={tmp_path / 'base'}")
    merged = llm_jax.load(tmp_path / "merged")
    np.testing.assert_allclose(jax.jit(merged.model.apply)({"params": merged.params}, ids), logits[1], atol=2e-5)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("generate", ("--prompt=a", "--checkpoint")),
        ("evaluate", ("--checkpoint",)),
        ("evaluate", ("--task=copying", "--checkpoint")),
        ("quantize", ("--output=none", "--scheme=int8", "--checkpoint")),
        ("convert", ("--output=none", "--to=hf", "--input")),
    ],
)
def test_base_is_rejected_for_checkpoints_without_adapters(command, trained, name, flags):
    done = command(name, *flags[:-1], f"{flags[-1]}={trained}", "--base=x", code=2)
    assert f"--base=x names the base of adapters; {trained} has no adapters" in done.stderr


def test_adapters_train_over_a_base_that_is_split(run, command, trained, tmp_path):
    mesh = ("--devices=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    command("train", f"--workdir={tmp_path / 'run'}", f"--config.init_from={trained}", *LORA, *mesh)
    assert metrics(tmp_path / "run")[-1]["validation_loss"] == pytest.approx(
        metrics(run)[-1]["validation_loss"], rel=1e-4
    )


def test_runs_over_one_base_are_mixed(run, over_int8, command, trained, tmp_path):
    """A PiSSA run, which trained over another base, and one whose factors are rounded are as they are alone."""
    other = ("--config.lora.rank=2", "--config.lora.variant=pissa", "--config.lora.factors=int8")
    paths = (run, tmp_path / "other")
    command("train", f"--workdir={paths[1]}", f"--config.init_from={trained}", *other, "--config.train.steps=3")
    base, found = checkpoints.load_separately(*paths)
    ids = jnp.asarray([base.tokenizer.encode("the model")] * 3)
    mixture = jnp.array([[1.0, 0], [0, 1.0], [0, 0]])

    @jax.jit
    def logits(params, first, second):
        mixed = lora.mix(lora.combine(first, second), mixture)
        return [base.model.apply({"params": lora.attach(params, one)}, ids) for one in (mixed, second)]

    together, second = logits(base.params, *found)
    alone = [llm_jax.load(path) for path in (*paths, trained)]
    expected = [jax.jit(one.model.apply)({"params": one.params}, ids)[0] for one in alone]
    np.testing.assert_allclose(together, expected, atol=2e-5)
    np.testing.assert_allclose(second[0], expected[1], atol=2e-5)
    assert all(np.abs(expected[i] - expected[2]).max() > 1e-3 for i in (0, 1))
    with pytest.raises(UserError, match=r"a run without adapters; lora.rank is 0"):
        checkpoints.load_separately(trained)
    with pytest.raises(UserError, match=r"over_int8: the base of its adapters differs from the base of"):
        checkpoints.load_separately(run, over_int8)


@pytest.mark.parametrize(
    ("variant", "factors"),
    [
        pytest.param("loftq", "int8", marks=pytest.mark.uncached),
        ("pissa", ""),
        *(pytest.param(variant, "", marks=pytest.mark.slow) for variant in ("lora", "loftq")),
    ],
)
def test_qlora_resumes_bitwise_and_is_read_as_it_was_trained(command, trained, tmp_path, variant, factors):
    flags = (
        f"--config.init_from={trained}",
        "--config.lora.rank=4",
        f"--config.lora.variant={variant}",
        f"--config.lora.factors={factors}",
        "--config.quant.scheme=nf4:16",
        "--config.checkpoint.every=4",
    )
    command("train", f"--workdir={tmp_path / 'run'}", *flags)
    seen = metrics(tmp_path / "run")
    assert seen[-1]["loss"] < seen[0]["loss"]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    command("train", f"--workdir={tmp_path / 'again'}", *flags)
    assert metrics(tmp_path / "again") == seen
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / "again"), arrays(tmp_path / "run"))
    found = json.loads(command("evaluate", f"--checkpoint={tmp_path / 'run'}", "--json").stdout)
    assert found["loss"] == pytest.approx(seen[-1]["validation_loss"], rel=1e-5)
    node = trees.flatten(llm_jax.load(tmp_path / "run").params)["layers/0/mlp/up"]
    assert isinstance(node.base, weights.QTensor) and isinstance(node.a, weights.FakeQuant) == bool(factors)


def test_adapters_are_merged_into_a_quantized_base_and_the_error_is_printed(command, over_int8, tmp_path):
    to = (f"--checkpoint={over_int8}", f"--output={tmp_path / 'merged'}")
    assert "has adapters over a quantized base" in command("quantize", *to, "--scheme=int4:16", code=2).stderr
    done = command("quantize", *to)
    assert "relative error of the merged updates" in done.stdout
    ours, merged = llm_jax.load(over_int8), llm_jax.load(tmp_path / "merged")
    node = trees.flatten(merged.params)["layers/0/mlp/up"]
    assert isinstance(node, weights.QTensor) and node.scheme == "int8"
    base = trees.flatten(ours.params)["layers/0/mlp/up"].base
    ids = jnp.asarray([ours.tokenizer.encode("the model reads")])
    ours, merged = (jax.jit(one.model.apply)({"params": one.params}, ids) for one in (ours, merged))
    assert not np.array_equal(node.codes, base.codes) and np.abs(ours - merged).mean() < 0.1 * np.abs(ours).mean()


def test_adapters_over_full_weights_are_merged_and_quantized(run, command, tmp_path):
    command("quantize", f"--checkpoint={run}", f"--output={tmp_path / 'int8'}", "--scheme=int8")
    assert isinstance(trees.flatten(llm_jax.load(tmp_path / "int8").params)["layers/0/mlp/up"], weights.QTensor)


def test_another_base_is_refused(run, command, trained, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    directory = checkpoints.find(tmp_path / "run")
    record = json.loads((directory / "record.json").read_text())
    record["base"]["sha256"] = "0" * 64
    files.write_json(directory / "record.json", record)
    write_manifest(directory)
    with pytest.raises(UserError, match="adapters are for the base of sha256 000000000000, which was .*; now that has"):
        llm_jax.load(tmp_path / "run")
    shutil.copytree(trained, tmp_path / "base")
    with pytest.raises(UserError, match=rf"which was .*; {tmp_path}/base/checkpoints/\d+ has [0-9a-f]{{12}}$"):
        llm_jax.load(tmp_path / "run", base=tmp_path / "base")
    done = command(
        "train",
        f"--workdir={tmp_path / 'run'}",
        f"--config.init_from={trained}",
        "--config.train.steps=9",
        *LORA,
        code=2,
    )
    assert "for the base of sha256 000000000000" in done.stderr


def test_weights_that_cannot_be_adapted_are_one_line_errors(command, trained, tmp_path):
    def said(*flags):
        done = command("train", f"--workdir={tmp_path / 'x'}", *flags, code=2)
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "x").exists()
        return done.stderr

    base = f"--config.init_from={trained}"
    assert "name them with init_from" in said("--config.lora.rank=4")
    assert "lora.variant=dora has no effect with lora.rank=0" in said(base, "--config.lora.variant=dora")
    assert "lora.factors=int8 has no effect with lora.rank=0" in said("--config.lora.factors=int8")
    assert "lora.rank is 99 for" in said(base, "--config.lora.rank=99")
    assert "matches no weight" in said(base, "--config.lora.rank=2", "--config.lora.targets=('mlp/q',)")


def test_a_base_of_other_kinds_in_its_layers_is_read_one_by_one(command, trained, tmp_path):
    flags = ("--config.quant.scheme=int8", "--config.quant.rules=(('layers/0/.*', ''),)", "--config.train.steps=3")
    flags += ("--config.lora.rank=2", f"--config.init_from={trained}", "--config.model.scan_layers=False")
    command("train", f"--workdir={tmp_path / 'run'}", *flags)
    model, params, _ = checkpoints.load(tmp_path / "run", scan_layers=True)
    bases = [params["layers"][layer]["mlp"]["up"].base for layer in "01"]
    assert not model.config.scan_layers and [weights.is_quantized(base) for base in bases] == [False, True]


def test_weights_of_a_run_come_in_the_dtype_that_is_asked_for(command, trained, tmp_path):
    """So that what is trained is what the configuration says, and a resumed run finds it so."""
    flags = (f"--config.init_from={trained}", "--config.model.precision.params=bfloat16")
    flags += ("--config.optim.schedule=constant",)  # one program for all numbers of steps
    command("train", f"--workdir={tmp_path / 'all'}", *flags, "--config.train.steps=3")
    command("train", f"--workdir={tmp_path / 'all'}", *flags, "--config.train.steps=4")
    assert {str(w.dtype) for w in jax.tree.leaves(llm_jax.load(tmp_path / "all").params)} == {"bfloat16"}
    command("train", f"--workdir={tmp_path / 'low'}", *flags, "--config.train.steps=3", "--config.lora.rank=2")
    assert trees.flatten(llm_jax.load(tmp_path / "low").params)["layers/0/mlp/up"].base.dtype == "bfloat16"
