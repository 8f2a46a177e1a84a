"""Object stores as run directories, in memory; `training/test_objects_live.py` does so with real servers."""

import contextlib
import json
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

import llm_jax
from llm_jax import checkpoints, files, object_store, trees
from llm_jax.checkpoints import storage
from llm_jax.errors import UserError
from llm_jax.object_store import appender, locks, store
from llm_jax.training import start, trainer
from tests.conftest import ROOT

DIRECTORY = "s3://bucket/run"


@pytest.fixture
def directory(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    return files.path(DIRECTORY)


def test_files_are_written_read_appended_and_listed(directory):
    files.make_directory(directory)
    assert files.list_files(directory) == {}
    files.write_json(directory / "a.json", {"a": 1})
    assert files.read_json(directory / "a.json") == {"a": 1}
    with pytest.raises(UserError, match="^s3://bucket/run/b.json: cannot be read .no such object.$"):
        files.read_json(directory / "b.json")
    with files.open_to_append(directory / "m.jsonl") as file:
        file.write("1\n")
        file.flush()
        assert not (directory / "m.jsonl").exists()  # not yet: it is uploaded every few seconds
        files.sync(file)
        assert files.read(directory / "m.jsonl") == b"1\n"
        file.write("2\n")
    with files.open_to_append(directory / "m.jsonl") as file:
        file.write("3\n")
    assert files.read(directory / "m.jsonl") == b"1\n2\n3\n"
    assert abs(files.modification_time(directory / "m.jsonl") - time.time()) < 60
    assert list(files.list_files(directory)) == ["a.json", "m.jsonl"]
    with files.local_copy(directory) as copy:
        assert {p.name: p.read_bytes() for p in copy.iterdir()} == {
            "a.json": b'{\n "a": 1\n}\n',
            "m.jsonl": b"1\n2\n3\n",
        }


def test_appended_lines_are_uploaded_in_the_background_and_again_where_that_failed(directory, bucket, monkeypatch):
    monkeypatch.setattr(appender, "_UPLOAD_EVERY", 0.0)
    monkeypatch.setattr(appender, "_REST", 0)
    with files.open_to_append(directory / "m.jsonl") as file:
        with monkeypatch.context() as broken:
            broken.setattr(bucket, "pipe_file", lambda *arguments, **options: 1 / 0)
            file.write("1\n")
            file.flush()
            file._upload.join()
            with pytest.raises(UserError, match="m.jsonl: cannot be written .division by zero.$"):
                files.sync(file)
        file.write("2\n")
        file.flush()
        file._upload.join()
        assert files.read(directory / "m.jsonl") == b"1\n2\n"


def test_a_directory_appears_complete_or_not_at_all(directory, bucket, monkeypatch):
    path = directory / "checkpoints" / "4"
    with files.new_directory(path) as partial:
        (partial / "a").write_text("a")
        (partial / "manifest.json").write_text("{}")
    with pytest.raises(ZeroDivisionError), files.new_directory(directory / "checkpoints" / "8") as partial:
        (partial / "manifest.json").write_text("{}")
        raise ZeroDivisionError
    assert storage.steps(path.parent) == [4]
    order = []
    rm, put = bucket.rm_file, bucket.put_file
    monkeypatch.setattr(bucket, "rm_file", lambda name: (order.append(name), rm(name)))
    monkeypatch.setattr(bucket, "put_file", lambda file, name: (order.append(name), put(file, name)))
    with files.new_directory(path.with_name("12")) as partial:
        for name in ("z", "manifest.json", "a"):
            (partial / name).write_text("a")
    assert [name.rsplit("/", 1)[-1] for name in order] in (["a", "z", "manifest.json"], ["z", "a", "manifest.json"])
    del order[:]
    storage.remove(path)
    assert order[0].endswith("4/manifest.json") and storage.steps(path.parent) == [12]
    files.write(directory / "checkpoints" / "16" / "arrays" / "d", "half")
    storage.remove_unfinished(path.parent)
    assert {name.split("/")[0] for name in files.list_files(path.parent)} == {"12"}


def test_a_lock_is_held_by_one_process_and_survives_none(directory, monkeypatch):
    monkeypatch.setattr(locks, "_HEARTBEAT", 0.04)
    monkeypatch.setattr(locks, "_STALE", 0.4)
    lock = files.lock(directory)
    files.check_lock(lock)
    with pytest.raises(UserError, match=rf"^{DIRECTORY}: another trainer is at work here \(process \d+ on .*\); end"):
        files.lock(directory)
    lock._own |= {"machine": "another", "host": "elsewhere"}
    time.sleep(0.2)  # a heartbeat from there
    with pytest.raises(UserError, match=r"another trainer is at work here \(process \d+ on elsewhere\)"):
        files.lock(directory)
    lock._stop.set()  # it is stopped or cut off
    lock._thread.join()
    began = time.monotonic()
    successor = files.lock(directory)
    assert time.monotonic() - began >= 0.4
    with pytest.raises(UserError, match="another trainer has taken over this run"):
        files.check_lock(lock)
    files.check_lock(successor)
    lock.close()
    assert [path.name for path in directory.glob(".lock*")] == [".lock-2"]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    successor._own["process"] = dead.pid
    successor._stop.set()
    successor._thread.join()
    object_store.write(directory / ".lock-2", successor._content(1))
    began = time.monotonic()
    third = files.lock(directory)  # without waiting: that process is gone
    assert time.monotonic() - began < 0.3
    third.close()
    third.close()
    assert not list(directory.glob(".lock*"))


def test_two_that_take_a_stale_lock_over_at_once(directory, monkeypatch):
    """The second one finds the next number taken."""
    monkeypatch.setattr(locks.Lock, "_watch", lambda self, number: None)
    numbers = locks.Lock._numbers
    first = files.lock(directory)
    monkeypatch.setattr(locks.Lock, "_numbers", lambda self: [])  # as it was a moment ago
    with pytest.raises(UserError, match="another trainer is at work here"):
        files.lock(directory)
    monkeypatch.setattr(locks.Lock, "_numbers", numbers)
    files.check_lock(first)
    first.close()


def test_object_names_with_glob_characters(bucket):
    """`glob` would find nothing below s3://bucket/run[1], so that a run there would start again from step 0."""
    directory = files.path("s3://bucket/run[1]")
    files.write(directory / "checkpoints" / "4" / "manifest.json", "{}")
    files.write(directory / "checkpoints" / "4" / "arrays" / "manifest.json", "{}")
    files.write(directory / "checkpoints" / "40" / "record.json", "{}")
    assert storage.steps(directory / "checkpoints") == [4]
    with contextlib.closing(files.lock(directory)) as lock:
        files.check_lock(lock)
        with pytest.raises(UserError, match="another trainer is at work here"):
            files.lock(directory)
    files.write(directory / "checkpoints" / "copy of 4" / "record.json", "{}")
    storage.remove_unfinished(directory / "checkpoints")
    names = list(files.list_files(directory / "checkpoints"))
    assert names == ["4/arrays/manifest.json", "4/manifest.json", "copy of 4/record.json"]


def test_a_trainer_that_wakes_up_leaves_the_run_to_its_successor(directory, monkeypatch):
    """It was suspended for longer than its lock holds; nothing of the run is written or removed any more."""
    monkeypatch.setattr(appender, "_UPLOAD_EVERY", 0.0)
    config = llm_jax.config(ROOT / "tests" / "tiny.py")
    sleeper = files.lock(directory)
    writer = checkpoints.Writer(directory, config, None, "", lock=sleeper)
    lines = files.open_to_append(directory / "metrics.jsonl", sleeper)
    lines.write("1\n")
    files.sync(lines)
    lines.write("2\n")
    files.write(directory / ".lock-2", json.dumps({"token": "of the successor"}))
    files.write(directory / "metrics.jsonl", "1\n2\n3\n")
    files.write(directory / "checkpoints" / "4" / "manifest.json", "{}")
    before = {name: files.read(path) for name, path in files.list_files(directory).items()}
    lost = "^s3://bucket/run: another trainer has taken over this run"
    lines.flush()
    for write in (
        lines.close,
        lambda: writer.save(4, {"w": jnp.zeros(1)}, {}, None),
        lambda: checkpoints.Writer(directory, config, None, "", lock=sleeper),
    ):
        with pytest.raises(UserError, match=lost):
            write()
    writer._finish(directory / "checkpoints" / "4", {"step": 4}, "")
    with pytest.raises(UserError, match=lost):
        writer.close()
    assert {name: files.read(path) for name, path in files.list_files(directory).items()} == before
    sleeper.close()


def test_a_store_that_fails_in_a_save_or_while_a_checkpoint_is_verified(directory, trained, bucket, monkeypatch):
    """The save fails with one line although the other checkpoints cannot be listed; no checkpoint counts as damaged."""
    config = llm_jax.config(ROOT / "tests" / "tiny.py", {"checkpoint.on_damage": "previous"})
    tokenizer = llm_jax.load(trained).tokenizer
    writer = checkpoints.Writer(directory, config, tokenizer, "")
    for step in (4, 8):
        writer.save(step, {"w": jnp.zeros(1)}, {}, None)
    writer.wait()

    def fail(*arguments, **options):
        raise ConnectionError("no network")

    with monkeypatch.context() as broken:
        broken.setattr(bucket, "cat_file", lambda name: fail() if "8/record" in name else bucket._cat(name))
        bucket._cat = type(bucket).cat_file.__get__(bucket)
        with pytest.raises(UserError, match=r"checkpoints/8/record.json: cannot be read .no network.$"):
            start._last_checkpoint(config, directory)
    with monkeypatch.context() as broken:
        for name in ("put_file", "find"):
            broken.setattr(bucket, name, fail)
        writer.save(12, {"w": jnp.zeros(1)}, {}, None)
        broken.setattr(writer._orbax, "close", fail)
        cannot = (
            r"run/checkpoints: the checkpoint cannot be written \(.*no network.*\); the last finished checkpoint stays$"
        )
        with pytest.raises(UserError, match=cannot):
            writer.close()
    assert start._last_checkpoint(config, directory)[0].name == "8"


def test_a_call_is_not_waited_for_once_its_store_does_not_answer(directory, monkeypatch):
    """A slow call is; afterwards requests fail at once, until the store answers again."""
    monkeypatch.setattr(store, "_PROBE", 0.02)
    monkeypatch.setattr(store, "_SILENT", 0.1)
    assert object_store.bounded(directory, lambda: time.sleep(0.3) or "slow") == "slow"
    with pytest.raises(ZeroDivisionError):
        object_store.bounded(directory, lambda: 1 / 0)
    with monkeypatch.context() as hanging:
        hanging.setattr(store, "_ANSWER", 0.02)
        hanging.setattr(store, "_LIST_ONE", {"s3": lambda *arguments: time.sleep(1)})
        with pytest.raises(
            UserError, match="^s3://bucket/run: its store has not answered for .* s; check the network$"
        ):
            object_store.bounded(directory, lambda: time.sleep(5))
        with pytest.raises(UserError, match="the store does not answer"):
            files.write(directory / "a", "a")
        monkeypatch.setattr(store, "_PAUSE", 0.0)  # the store is looked for again, and still does not answer
        with pytest.raises(UserError, match="the store does not answer"):
            files.write(directory / "a", "a")
    files.write(directory / "a", "a")
    assert not store._unanswering


@pytest.mark.parametrize("error", [PermissionError("403"), OSError("503 slow down"), FileNotFoundError("bucket")])
def test_a_store_that_answers_with_an_error_is_not_given_up(directory, monkeypatch, error):
    """An account may lose the permission to list, and a busy store asks for fewer requests, while an upload goes on."""
    monkeypatch.setattr(store, "_PROBE", 0.01)
    monkeypatch.setattr(store, "_SILENT", 0.02)

    def refuse(*arguments):
        raise error

    monkeypatch.setattr(store, "_LIST_ONE", {"s3": refuse})
    assert object_store.bounded(directory, lambda: time.sleep(0.2) or "slow") == "slow"
    error = type("ServerDisconnectedError", (type("ClientConnectionError", (Exception,), {}),), {})("no route")
    with pytest.raises(object_store.Unanswered, match="has not answered for"):
        object_store.bounded(directory, lambda: time.sleep(0.2))
    store._unanswering.clear()


def test_a_checkpoint_that_hangs_is_one_line_and_does_not_hold_up_the_end(bucket, trained, monkeypatch):
    writer = checkpoints.Writer(
        files.path("gs://bucket/run"), llm_jax.config(ROOT / "tests" / "tiny.py"), llm_jax.load(trained).tokenizer, ""
    )
    monkeypatch.setattr(store, "_PROBE", 0.02)
    monkeypatch.setattr(store, "_SILENT", 0.1)
    monkeypatch.setattr(store, "_ANSWER", 0.02)
    monkeypatch.setattr(store, "_LIST_ONE", {"gs": lambda *arguments: time.sleep(1)})
    monkeypatch.setattr(writer._orbax, "save", lambda *arguments, **options: None)
    monkeypatch.setattr(writer._orbax, "wait_until_finished", lambda: time.sleep(30))
    monkeypatch.setattr(writer._orbax, "close", lambda: time.sleep(30))
    writer.save(4, {"w": jnp.zeros(1)}, {}, None)
    began = time.monotonic()
    cannot = (
        r"run/checkpoints: the checkpoint cannot be written \(.*not answered.*\); the last finished checkpoint stays$"
    )
    with pytest.raises(UserError, match=cannot):
        writer.close()
    assert time.monotonic() - began < 20
    store._unanswering.clear()


def test_errors_of_clients_are_one_line_and_other_errors_stay(directory, tmp_path):
    client = {"__name__": "s3fs.core"}
    exec("def fail(): raise PermissionError('no route')", client)

    def fail():
        raise PermissionError("no route")

    message = "^s3://bucket/run: cannot be read or written .no route.; give the account"
    with pytest.raises(UserError, match=message), object_store.as_user_errors(directory):
        client["fail"]()
    for path, function in ((directory, fail), (tmp_path, client["fail"])):
        with pytest.raises(PermissionError), object_store.as_user_errors(path):
            function()
    explained = []
    for function in (client["fail"], fail):
        try:
            function()
        except PermissionError as error:
            explained.append(object_store.explain(error))
    assert explained[0].startswith("an object store cannot be read or written (no route)") and explained[1] == ""


def test_a_run_is_stopped_resumed_read_and_reported(directory, trained, text_file, cache, command):
    """As an undisturbed run on a disk, bit for bit."""
    changes = {"data.source": str(text_file), "data.cache_dir": str(cache)}
    config = llm_jax.config(ROOT / "tests" / "tiny.py", changes)
    written = []

    def stop(line):
        if line["step"] == 5:  # after the save of step 4, before which its lines are to be there
            written.extend(files.read(directory / "metrics.jsonl").splitlines())
        return written

    stopped = trainer.train(config, DIRECTORY, callback=stop, verbose=False)
    assert len(written) >= 4
    assert stopped["stopped"] and stopped["steps"] < 8
    files.write(directory / "checkpoints" / "7" / "arrays" / "d", "of a process that was killed")
    summary = trainer.train(config, DIRECTORY, verbose=False)
    own, local = (list(map(json.loads, files.read(p / "metrics.jsonl").splitlines())) for p in (directory, trained))
    for line in own + local:
        for key in ("tokens_per_second", "mfu", "seconds"):
            line.pop(key)
    assert own == local
    assert summary["steps"] == 8 and files.read_json(directory / "summary.json")["steps"] == 8
    assert not list(directory.glob(".lock*")) and storage.steps(directory / "checkpoints")[-1] == 8
    fingerprint = trees.fingerprint(llm_jax.load(trained).params)
    loaded = llm_jax.load(DIRECTORY)
    assert trees.fingerprint(loaded.params) == fingerprint
    assert "run" in command("compare", DIRECTORY, str(trained)).stdout
    command("report", DIRECTORY)
    assert b"<!doctype html>" in files.read(directory / "report.html")[:100].lower()
    assert files.read(directory / "report-curves.png")[:4] == b"\x89PNG"
    llm_jax.save(*loaded, "s3://bucket/saved")
    assert trees.fingerprint(llm_jax.load("s3://bucket/saved").params) == fingerprint
    with pytest.raises(UserError, match="s3://bucket/saved already exists"):
        llm_jax.save(*loaded, "s3://bucket/saved")

    arrays = files.list_files(directory / "checkpoints" / "8" / "arrays")
    damaged = next(path for name, path in arrays.items() if "/d/" in name)
    content = bytearray(files.read(damaged))
    content[len(content) // 2] ^= 1
    files.write(damaged, bytes(content))
    with pytest.raises(UserError, match=r"s3://bucket/run/checkpoints/8: the file 'arrays/.*' is damaged .*checkpoint"):
        trainer.train(config, DIRECTORY, verbose=False)
    config = llm_jax.config(ROOT / "tests" / "tiny.py", changes | {"checkpoint.on_damage": "previous"})
    trainer.train(config, DIRECTORY, verbose=False)
    assert trees.fingerprint(llm_jax.load(DIRECTORY).params) == fingerprint

    def state():
        return {
            name: files.read(path) for name, path in files.list_files(directory).items() if not name.startswith(".lock")
        }

    def take_over(line):
        if line["step"] == 9:
            before.update(state())
            files.write(directory / ".lock-99", json.dumps({"token": "of the successor"}))

    before = {}
    config = llm_jax.config(ROOT / "tests" / "tiny.py", changes | {"train.steps": 12})
    with pytest.raises(UserError, match="another trainer has taken over this run"):
        trainer.train(config, DIRECTORY, callback=take_over, verbose=False)
    assert before and state() == before


def test_what_an_object_store_cannot_do_is_refused(command, bucket, monkeypatch):
    for flag, message in (
        ("--profile", "error: --profile writes a trace to the workdir, which is not supported in s3://bucket/x"),
        ("--config.report.to=('tensorboard',)", "error: report.to=tensorboard appends to files, which s3://bucket/x"),
    ):
        assert command("train", "--workdir=s3://bucket/x", flag, code=2).stderr.startswith(message)
    for name, *flags in (
        ("sweep", "--config=tests/tiny.py", "--grid=train.seed=0,1"),
        ("convert", "--input=s3://bucket/x", "--to=hf"),
        ("quantize", "--checkpoint=s3://bucket/x", "--scheme=int8"),
    ):
        refused = command(name, *flags, "--output=s3://bucket/s", code=2).stderr
        assert refused == "error: --output=s3://bucket/s: this command writes to disks only; give a directory\n"
    monkeypatch.setattr(trainer.processes, "count", lambda: 2)
    with pytest.raises(UserError, match="--workdir=s3://bucket/x: 2 processes cannot .* Orbax has no driver"):
        trainer.train(llm_jax.config(ROOT / "tests" / "tiny.py"), "s3://bucket/x")
