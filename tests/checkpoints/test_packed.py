"""Checkpoints in zip files and in object stores, and invalid zip files."""

import json
import shutil
import stat
import time
import zipfile

import pytest

import llm_jax
from llm_jax import checkpoints, files, object_store, trees
from llm_jax.checkpoints import location, zip_files
from llm_jax.errors import UserError
from llm_jax.object_store import clients, store

pytestmark = pytest.mark.usefixtures("own_cache")


def files_of(directory):
    return {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}


def packed(path, members, **attributes):
    """A zip file at `path` of {name: text or file}; `attributes` are set on every entry."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.writestr(info, content if isinstance(content, str) else content.read_bytes())
    return path


@pytest.mark.parametrize("inside", ["", "run/", "runs/a/"])
def test_a_zip_of_a_run_is_loaded_by_its_content(trained, tmp_path, own_cache, inside):
    members = {inside + name: path for name, path in files_of(trained).items()}
    archive = packed(tmp_path / "run.zip", members | {"__MACOSX/._a": "x", f"{inside}.DS_Store": "x"})
    expected = trees.fingerprint(llm_jax.load(trained).params)
    assert trees.fingerprint(llm_jax.load(archive).params) == expected
    checkpoint = llm_jax.open(archive)
    assert checkpoint.form == "run" and checkpoint.name == str(archive)  # what records refer to
    assert checkpoint.path.is_relative_to(own_cache) and llm_jax.open(checkpoint.name).path == checkpoint.path
    again = llm_jax.open(archive.rename(tmp_path / "moved.ZIP"))  # the same content: nothing is unpacked again
    assert again.config == checkpoint.config and len(list((own_cache / "zip").iterdir())) == 1
    assert files_of(again.path) == files_of(checkpoint.path)


def test_a_zip_of_one_checkpoint_or_one_gguf_file_is_found(trained, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "step"), "zip", checkpoints.find(trained))
    assert llm_jax.open(archive).form == "run"
    assert location.resolve(packed(tmp_path / "m.zip", {"models/small.gguf": "GGUF"})).name == "small.gguf"
    assert (
        location.recorded_name("~/m.zip", tmp_path).startswith("/")
        and location.recorded_name("gs://b/m.zip", tmp_path)[0] == "g"
    )


@pytest.mark.parametrize(
    ("members", "attributes", "message"),
    [
        ({"../outside": "x"}, {}, "'../outside' is outside the archive's directory"),
        ({"a/../../outside": "x"}, {}, "is outside"),
        ({"/outside": "x"}, {}, "is outside"),
        ({"..\\outside": "x"}, {}, "is outside"),
        ({"C:/outside": "x"}, {}, "is outside"),
        ({"config.json": "/etc/passwd"}, {"external_attr": (stat.S_IFLNK | 0o777) << 16}, "is a link or a device"),
        ({"config.json": "x"}, {"external_attr": (stat.S_IFIFO | 0o666) << 16}, "is a link or a device"),
        ({"config.json": "0" * 80_000_000}, {}, "80,000,000 bytes are packed in"),
        ({"a.txt": "x", "b.txt": "x"}, {}, "contains a.txt, b.txt; expected one run"),
        ({}, {}, "contains nothing; expected one run"),
        ({"notes/a.txt": "x"}, {}, "contains a.txt; expected one run"),
    ],
)
def test_an_unsafe_or_useless_zip_is_refused(tmp_path, own_cache, members, attributes, message):
    archive = packed(tmp_path / "run.zip", members, **attributes)
    with pytest.raises(UserError, match=message) as error:
        llm_jax.load(archive)
    assert "\n" not in str(error.value) and str(archive) in str(error.value)
    assert not list(tmp_path.rglob("outside")) and not list(own_cache.rglob(".partial*"))


def test_a_name_that_is_twice_in_a_zip_is_refused(tmp_path):
    archive = packed(tmp_path / "run.zip", {"a/config.json": "first"})
    with zipfile.ZipFile(archive, "a") as opened, pytest.warns(UserWarning, match="Duplicate"):
        opened.writestr("a/config.json", "second")
    with pytest.raises(UserError, match="contains 'a/config.json' twice"):
        llm_jax.load(archive)


def test_a_zip_that_lies_about_its_sizes_is_bounded_by_them(tmp_path, monkeypatch):
    """The declared size of a member is that of what is written, whatever its data expand to."""
    archive = packed(tmp_path / "run.zip", {"config.json": "0" * 100_000})
    data = bytearray(archive.read_bytes())
    true, false = (100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    assert data.count(true) == 2  # in the local header and in the directory
    archive.write_bytes(data.replace(true, false))
    with pytest.raises(UserError, match="not a readable zip file"):
        llm_jax.load(archive)
    assert all(path.stat().st_size < 100 for path in (tmp_path / "own_cache").rglob("*") if path.is_file())


def test_a_damaged_a_missing_and_a_large_zip_are_told_apart(trained, tmp_path, monkeypatch):
    (tmp_path / "text.zip").write_text("a zip, honestly")
    archive = packed(tmp_path / "cut.zip", files_of(trained))
    archive.write_bytes(archive.read_bytes()[:-500])
    for name, message in (
        ("text.zip", "text.zip: not a readable zip file"),
        ("cut.zip", "cut.zip: not a readable zip file"),
        ("gone.zip", "gone.zip: no such file or directory .expected a ZIP file"),
    ):
        with pytest.raises(UserError, match=message):
            llm_jax.load(tmp_path / name)
    whole = packed(tmp_path / "run.zip", files_of(trained))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(zip_files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="bytes unpacked, 1,000 are free in .*; set LLM_JAX_CACHE"):
        llm_jax.load(whole)


def test_a_run_in_a_bucket_is_copied_once_with_its_last_checkpoint(trained, bucket, own_cache):
    for name, path in files_of(trained).items():
        bucket.pipe_file(f"/bucket/run/{name}", path.read_bytes())
        if name.startswith("checkpoints/8/") and not name.endswith("manifest.json"):
            bucket.pipe_file(f"/bucket/run/{name.replace('/8/', '/12/')}", b"still being written")
    expected = trees.fingerprint(llm_jax.load(trained).params)
    checkpoint = llm_jax.open("s3://bucket/run")
    assert trees.fingerprint(checkpoint.load().params) == expected
    assert checkpoint.name == "s3://bucket/run" and checkpoint.path.name == "8"
    copies = {path.name for path in own_cache.rglob("checkpoints/*")}
    assert copies == {"8"}
    before = checkpoint.path.stat().st_mtime_ns
    assert llm_jax.open("s3://bucket/run").path.stat().st_mtime_ns == before  # from the cache
    assert llm_jax.open("s3://bucket/run/checkpoints/8").config == checkpoint.config
    bucket.pipe_file("/bucket/run/config.json", json.dumps({"changed": 1}).encode())
    assert llm_jax.open("s3://bucket/run").path != checkpoint.path  # another object, another copy


def test_files_and_zips_in_a_bucket_and_what_is_not_there(trained, bucket, tmp_path):
    bucket.pipe_file("/bucket/run.zip", packed(tmp_path / "run.zip", files_of(trained)).read_bytes())
    assert llm_jax.open("s3://bucket/run.zip").form == "run"
    bucket.pipe_file("/bucket/small.gguf", b"GGUF")
    assert location.resolve("s3://bucket/small.gguf").read_bytes() == b"GGUF"
    with pytest.raises(UserError, match="s3://bucket/typo: nothing there; expected a run"):
        llm_jax.load("s3://bucket/typo")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/run", r"needs the package gcsfs; pip install 'llm_jax\[gcs\]'"),
        ("s3://bucket/run", r"needs the package s3fs; pip install 'llm_jax\[s3\]'"),
        ("s3:///run", "names no bucket; expected s3://BUCKET/PATH"),
    ],
)
def test_an_object_store_without_its_package_or_a_bucket_is_one_line(monkeypatch, address, message):
    def missing(scheme):
        raise ImportError("Please install it")

    monkeypatch.setattr(clients, "client", missing)
    with pytest.raises(UserError, match=f"^{address} *:?.*{message}$"):
        llm_jax.load(address)


def test_a_bucket_that_is_missing_or_refuses_is_one_line(bucket, monkeypatch):
    with pytest.raises(UserError, match="s3://typo/run: there is no bucket 'typo'; create it first"):
        llm_jax.load("s3://typo/run")

    def refuse(*arguments):
        raise error

    monkeypatch.setattr(store, "_LIST_ONE", {"gs": refuse, "s3": refuse})
    error = PermissionError("Access denied\nto the bucket")
    with pytest.raises(UserError, match=r"^s3://bucket/run: cannot be read \(Access denied\); give the account of"):
        llm_jax.load("s3://bucket/run")
    error = RuntimeError("Anonymous caller does not have access")
    with pytest.raises(UserError, match=r"cannot be read \(Anonymous caller.*\); run `gcloud auth"):
        llm_jax.load("gs://bucket/run")
    monkeypatch.setattr(store, "_ANSWER", 0.01)
    monkeypatch.setattr(store, "_LIST_ONE", {"gs": lambda *arguments: time.sleep(0.1)})
    with pytest.raises(UserError, match="gs://bucket/run: its store does not answer within 0 s; check the network"):
        llm_jax.load("gs://bucket/run")


def test_a_name_that_leads_out_of_the_directory_is_refused(bucket, tmp_path):
    with pytest.raises(UserError, match="leads out of the directory"):
        object_store.fetch(files.path("s3://bucket/x"), tmp_path / "a" / ".." / ".." / "x", tmp_path)
