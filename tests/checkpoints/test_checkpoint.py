import dataclasses
import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax import checkpoints, files, tokenizers, trees
from llm_jax.checkpoints import run as run_form
from llm_jax.checkpoints import storage
from llm_jax.checkpoints import writer as writer_lib
from llm_jax.decoding import loop
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.weights import Adapted


def metrics(workdir):
    kept = ("step", "loss", "grad_norm", "lr", "validation_loss")
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: line[k] for k in kept if k in line} for line in lines]


def state(workdir):
    """Parameters and optimizer state of the last checkpoint, as they lie on disk."""
    directory = checkpoints.find(workdir)
    record = checkpoints.verify(directory)
    model = llm_jax.load(directory, scan_layers=True).model
    from llm_jax.training import optim

    config = checkpoints.read_config(directory)
    params = checkpoints.abstract_params(model)
    optimizer = jax.eval_shape(optim.make(config.optim, config.train.steps, params).init, params)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), (params, optimizer))
    return run_form.restore_state(directory, record, *abstract)


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    jax.tree.map(np.testing.assert_array_equal, state(a), state(b))


def test_load_gives_model_params_and_tokenizer(trained):
    model, params, tokenizer = llm_jax.load(trained)
    text = "the model reads"
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray([tokenizer.encode(text)]))
    assert logits.shape == (1, len(text), tokenizer.vocab_size)
    assert "layers/1/mlp/up" in trees.flatten(params)
    scanned, stacked, _ = llm_jax.load(trained / "checkpoints" / "8", scan_layers=True)
    again = jax.jit(scanned.apply)({"params": stacked}, jnp.asarray([tokenizer.encode(text)]))
    np.testing.assert_allclose(again, logits, atol=1e-5)


def test_training_lowers_the_loss_and_writes_its_summary(trained):
    seen = metrics(trained)
    assert [line["step"] for line in seen] == list(range(1, 9))
    assert seen[-1]["loss"] < seen[0]["loss"] - 1
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["validation_loss"] == seen[-1]["validation_loss"]
    assert 0 < summary["compressed_bits_per_byte"]["xz -9"] < 8


def test_commands_read_the_run(command, trained):
    found = json.loads(command("evaluate", f"--checkpoint={trained}", "--json").stdout)
    assert found["loss"] == pytest.approx(metrics(trained)[-1]["validation_loss"], rel=1e-5)
    said = command("generate", f"--checkpoint={trained}", "--prompt=the ", "--max_new_tokens=9", "--temperature=0")
    model, params, tokenizer = llm_jax.load(trained)
    ids = [1, *tokenizer.encode("the ")]
    (one,) = loop.generate(model, params, [ids], DecodingOptions(temperature=0).sampler(), max_new_tokens=9)
    assert said.stdout.rstrip("\n") == tokenizer.decode(ids + one.ids).rstrip("\n")


@pytest.mark.uncached
def test_started_again_after_the_end_it_changes_nothing(command, trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    command("train", f"--workdir={copy}")
    assert_same_run(copy, trained)


def test_fine_tuning_starts_from_the_weights_and_keeps_the_tokenizer(command, trained, tmp_path):
    command(
        "train",
        f"--workdir={tmp_path}",
        f"--config.init_from={trained}",
        "--config.optim.lr=1e-9",
        "--config.train.steps=3",
    )
    assert metrics(tmp_path)[-1]["validation_loss"] == pytest.approx(metrics(trained)[-1]["validation_loss"], rel=1e-4)
    done = command(
        "train", f"--workdir={tmp_path / 'x'}", f"--config.init_from={trained}", "--config.tokenizer.kind=char", code=2
    )
    assert "trained on 'byte' tokens" in done.stderr
    done = command(
        "train", f"--workdir={tmp_path / 'x'}", f"--config.init_from={trained}", "--config.model.mlp_dim=40", code=2
    )
    assert "model.mlp_dim=40 does not fit the weights of" in done.stderr and "'layers/0/mlp/down'" in done.stderr


def test_another_configuration_in_the_same_workdir_is_refused(command, trained):
    done = command("train", f"--workdir={trained}", "--config.optim.lr=0.5", code=2)
    assert "optim.lr was 0.01, now 0.5" in done.stderr and "another --workdir" in done.stderr
    done = command("train", f"--workdir={trained}", "--config.model.attention_softcap=9.0", code=2)
    assert "model.attention_softcap was 0.0, now 9.0" in done.stderr
    done = command("train", f"--workdir={trained}", "--config.train.steps=5", code=2)
    assert "is at step 8, past train.steps=5" in done.stderr


@pytest.mark.uncached
def test_resume_is_bitwise_after_kill_9(command, trained, tmp_path, monkeypatch):
    """Killed while it saves a checkpoint and between two of them. The process that goes on compiles for itself."""
    flags = ("train", f"--workdir={tmp_path}", "--config.checkpoint.every=1")
    kills = {"saving": 0, "between": 0}
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    for when, target in (("saving", 2), ("between", 5), ("saving", 7)):
        if kills["saving"] and target == 7:  # the first one was killed in time
            continue
        process = command(*flags, start=True)
        while process.poll() is None:
            steps = checkpoints.steps(tmp_path)
            names = [path.name.removeprefix(".partial-") for path in (tmp_path / "checkpoints").glob(".partial-*")]
            partial = [int(name) for name in names if name.isdigit()]
            if max(partial if when == "saving" else steps, default=0) >= target:
                os.kill(process.pid, signal.SIGKILL)
                kills[when] += process.wait() == -signal.SIGKILL
            time.sleep(0.0005 if max(steps, default=0) >= target - 1 else 0.01)
        process.communicate()
    assert kills == {"saving": 1, "between": 1}
    monkeypatch.undo()
    command(*flags, process=True)
    assert_same_run(tmp_path, trained)
    assert not list((tmp_path / "checkpoints").glob(".partial*"))


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def files_of(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def test_every_flipped_or_missing_byte_is_found(copy):
    directory = copy / "checkpoints" / "8"
    for path in files_of(directory):
        before = path.read_bytes()
        if before:
            middle = len(before) // 2
            path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
            with pytest.raises(UserError):
                checkpoints.verify(directory)
            path.write_bytes(before[:-1])
            with pytest.raises(UserError):
                checkpoints.verify(directory)
        path.unlink()
        with pytest.raises(UserError):
            checkpoints.verify(directory)
        path.write_bytes(before)
        checkpoints.verify(directory)
    (directory / "stray").write_text("")
    with pytest.raises(UserError, match="'stray' does not belong"):
        checkpoints.verify(directory)


def test_a_damaged_checkpoint_stops_the_run_and_names_the_one_before(command, copy):
    path = max(files_of(copy / "checkpoints" / "8" / "arrays"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    for flags in (
        ("train", f"--workdir={copy}"),
        ("evaluate", f"--checkpoint={copy}"),
        ("generate", f"--checkpoint={copy}", "--prompt=a"),
    ):
        done = command(*flags, code=2)
        line = done.stderr.strip().splitlines()[-1]
        assert "is damaged" in line and "delete this directory to resume from checkpoint 4" in line
    shutil.rmtree(copy / "checkpoints" / "8")
    command("train", f"--workdir={copy}")
    checkpoints.verify(copy / "checkpoints" / "8")


@pytest.mark.uncached
def test_a_damaged_checkpoint_is_deleted_and_the_one_before_is_used_if_asked(command, copy, trained):
    flags = ("train", f"--workdir={copy}", "--config.checkpoint.on_damage=previous")
    path = max(files_of(copy / "checkpoints" / "8" / "arrays"), key=lambda p: p.stat().st_size)
    path.unlink()  # a missing shard
    done = command(*flags)
    assert (
        f"note: {copy}/checkpoints/8: the file 'arrays/" in done.stdout and "is missing; it is deleted" in done.stdout
    )
    assert f"resuming from {copy}/checkpoints/4" in done.stdout
    assert_same_run(copy, trained)
    for step in (4, 8):
        (copy / "checkpoints" / str(step) / "record.json").write_text("{")
    assert "checkpoints/4/record.json: damaged" in command(*flags, code=2).stderr
    assert checkpoints.steps(copy) == [4, 8]
    done = command("train", f"--workdir={copy}", "--config.checkpoint.on_damage=last", code=2)
    assert "'checkpoint.on_damage' is 'last'; expected one of previous, stop" in done.stderr


def test_another_format_is_refused(copy):
    directory = copy / "checkpoints" / "8"
    record = json.loads((directory / "record.json").read_text())
    files.write_json(directory / "record.json", record | {"format": 99})
    with pytest.raises(UserError, match="checkpoint format 99; this version reads format 1"):
        checkpoints.verify(directory)


def test_another_vocabulary_is_refused(copy):
    tokenizers.save(tokenizers.get("char").train(["abc"], 9), copy / "checkpoints" / "8" / "tokenizer")
    with pytest.raises(UserError, match="tokenizer/"):
        llm_jax.load(copy)


def test_the_last_and_the_best_are_kept(command, tmp_path):
    command(
        "train", f"--workdir={tmp_path}", "--config.train.steps=6", "--config.optim.lr=0.3",
        "--config.checkpoint.every=1", "--config.checkpoint.keep_last=2", "--config.checkpoint.keep_best=3",
        "--config.eval.every=1", "--config.optim.schedule=constant",
    )  # fmt: skip
    # The last evaluation is over other rows (eval.final_rows), so that its loss is not compared.
    losses = {line["step"]: line["validation_loss"] for line in metrics(tmp_path)}
    final = losses.pop(6)
    best = sorted(losses, key=losses.__getitem__)[:3]
    assert final < losses[best[-1]]  # it would be among the best
    assert checkpoints.steps(tmp_path) == sorted({5, 6, *best})


def test_losses_over_other_rows_are_not_compared(tiny, tmp_path):
    """A resumed run may have another eval.rows; the best checkpoint before the change is not lost to the new ones."""
    keep = dataclasses.replace(tiny.checkpoint, keep_last=1, keep_best=1)
    tokenizer = tokenizers.get("byte").train([], 0)
    writer = checkpoints.Writer(tmp_path, dataclasses.replace(tiny, checkpoint=keep), tokenizer, "")
    losses = [(1, 4.0, 8), (2, 3.0, 8), (3, 3.5, 8), (4, 2.5, 16), (5, 2.8, 16), (6, None, 100)]
    for step, loss, rows in losses:
        writer.save(step, {"w": jnp.zeros(1)}, {}, loss, rows)
    writer.close()
    assert checkpoints.steps(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_a_path_that_is_no_checkpoint_is_a_one_line_error(command, tmp_path, what):
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    if what == "file":
        path.write_text("")
    done = command("generate", f"--checkpoint={path}", "--prompt=a", code=2)
    assert len(done.stderr.strip().splitlines()) == 1 and "expected a run" in done.stderr


def test_nodes_survive_a_checkpoint(make, tiny, tmp_path):
    """Kinds of weights that are no arrays are restored as what they were."""
    model, params = make()
    path = "layers/0:2/0::1/attention/query"
    base = trees.flatten(params)[path]
    node = Adapted(base, jnp.ones((2, 32, 3)), jnp.ones((2, 3, base.shape[-1])), jnp.ones(2))
    params = trees.unflatten(trees.flatten(params) | {path: node})
    writer = checkpoints.Writer(tmp_path, tiny, tokenizers.get("byte").train([], 0), "")
    writer.save(1, params, {"nothing": jnp.zeros(1)}, None)
    writer.close()
    model, loaded, _ = llm_jax.load(tmp_path)
    query = loaded["layers"]["1"]["attention"]["query"]
    assert isinstance(query, Adapted) and query.scale.shape == ()
    jax.tree.map(np.testing.assert_array_equal, loaded, trees.restage(params))
    assert jnp.isfinite(jax.jit(model.apply)({"params": loaded}, jnp.ones((1, 4), int))).all()


def test_a_file_that_is_created_after_a_failed_checkpoint_was_removed_is_removed_too(tiny, monkeypatch, tmp_path):
    remove, removed = storage.abandon, []

    def abandon(partial):
        remove(partial)
        if not removed:  # a write of Orbax that was still in flight
            (partial / "arrays").mkdir(parents=True)
        removed.append(partial)

    def fail(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "abandon", abandon)
    monkeypatch.setattr(writer_lib, "write_manifest", fail)
    writer = checkpoints.Writer(tmp_path, tiny, tokenizers.get("byte").train([], 0), "")
    writer.save(1, {"w": jnp.zeros(1)}, {}, None)
    with pytest.raises(UserError, match="cannot be written"):
        writer.close()
    assert len(removed) == 2 and not list((tmp_path / "checkpoints").iterdir())


def test_a_corpus_that_changed_under_a_run_is_refused(command, trained, text_file, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    other = tmp_path / "words.txt"
    other.write_text(text_file.read_text() + " more")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["source"] = str(other)
    files.write_json(tmp_path / "run" / "config.json", config)
    done = command("train", f"--workdir={tmp_path / 'run'}", f"--config.data.source={other}", code=2)
    assert "its text has changed since" in done.stderr


def test_fine_tuning_takes_weights_of_another_layout_and_mesh(command, trained, tmp_path):
    command(
        "train", f"--workdir={tmp_path}", f"--config.init_from={trained}", "--config.optim.lr=1e-9",
        "--config.train.steps=3", "--config.model.scan_layers=False", "--devices=4", "--config.mesh.fsdp=2",
    )  # fmt: skip
    assert metrics(tmp_path)[-1]["validation_loss"] == pytest.approx(metrics(trained)[-1]["validation_loss"], rel=1e-4)
