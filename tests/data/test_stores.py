"""Corpora in object stores or built by another engine, in memory; `test_ray_live.py` does so on a cluster."""

import gzip
import json
import pickle
import sys

import numpy as np
import pytest

from llm_jax import files, tokenizers
from llm_jax.data import build, catalog, ray_engine, sources
from llm_jax.data.corpus import Source
from llm_jax.errors import UserError
from llm_jax.schema import TokenizerConfig
from tests.data.configs import data_config

SOURCE = "s3://bucket/texts"


def documents(start: int, kind: str = "text") -> bytes:
    def record(i):
        answer = f"document {i} " + "with words é " * (i % 30)
        return {"text": answer} if kind == "text" else {"prompt": f"which is number {i}?", "answer": answer}

    return "".join(json.dumps(record(i)) + "\n" for i in range(start, start + 300)).encode()


def byte_tokenizer():
    return tokenizers.get("byte").train([], 0)


def contents(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def inline(work, jobs, costs, title, parts):
    """Like `ray_engine.run_jobs`, in this process and from the last job to the first."""
    for i in reversed(range(len(jobs))):
        yield i, pickle.loads(pickle.dumps(work(*pickle.loads(pickle.dumps(jobs[i])))))


@pytest.mark.parametrize("kind", ["text", "instructions"])
def test_another_engine_writes_the_same_bytes(tmp_path, monkeypatch, kind):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_bytes(documents(0, kind))
    (texts / "b.jsonl.gz").write_bytes(gzip.compress(documents(300, kind)))
    monkeypatch.setattr(build, "_SMALLEST", 5_000)
    monkeypatch.setattr(ray_engine, "run_jobs", inline)
    written = {}
    for engine in ("local", "ray"):
        source = Source(data_config(texts, tmp_path / engine, kind=kind), engine=engine)
        with monkeypatch.context() as patch:
            if engine == "ray":
                patch.setattr(
                    build.local_engine, "run_jobs", None
                )  # nothing is tokenized in this process or its children
            source.corpus(byte_tokenizer())
        written[engine] = contents(tmp_path / engine / "corpora")
    assert written["local"] == written["ray"]
    names = {name.split("/", 1)[1] for name in written["ray"] if "/" in name}
    assert {"train/tokens.bin", "train/offsets.npy", "validation/bytes.npy"} <= names
    assert ("train/mask.bin" in names) == (kind == "instructions")


@pytest.fixture
def texts(bucket, monkeypatch, tmp_path):
    """Two files of documents below `SOURCE`, and a hidden one."""
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "one"))
    files.write(files.path(f"{SOURCE}/a.jsonl"), documents(0))
    files.write(files.path(f"{SOURCE}/more/b.jsonl.gz"), gzip.compress(documents(300)))
    files.write(files.path(f"{SOURCE}/.hidden.jsonl"), b"not JSON")
    return SOURCE


def test_a_corpus_of_a_bucket_is_built_once_for_all_machines(texts, tmp_path, monkeypatch):
    def corpus():
        source = Source(data_config(texts, "s3://bucket/cache"))
        return source.corpus(source.tokenizer(TokenizerConfig("char", 300, "", "")))

    one = corpus()
    local = tmp_path / "texts"
    (local / "more").mkdir(parents=True)
    (local / "a.jsonl").write_bytes(documents(0))
    (local / "more" / "b.jsonl.gz").write_bytes(gzip.compress(documents(300)))
    source = Source(data_config(local, tmp_path / "disk"))
    disk = source.corpus(source.tokenizer(TokenizerConfig("char", 300, "", "")))
    np.testing.assert_array_equal(one.train.tokens, disk.train.tokens)
    np.testing.assert_array_equal(one.validation.offsets, disk.validation.offsets)
    assert one.sha256 == disk.sha256

    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "two"))  # another machine
    monkeypatch.setattr("llm_jax.data.corpus.build", None)
    monkeypatch.setattr(tokenizers.get("char"), "train", None)
    other = corpus()
    first_names, second_names = (
        {name for name in contents(tmp_path / machine / "shared") if not name.endswith(".lock")}
        for machine in ("one", "two")
    )
    assert first_names == second_names and len(first_names) > 8
    np.testing.assert_array_equal(one.train.tokens, other.train.tokens)
    np.testing.assert_array_equal(one.train.offsets, other.train.offsets)


@pytest.mark.parametrize("removed", [("manifest.json", "train/tokens.bin"), ("train/tokens.bin",)])
def test_an_incomplete_corpus_in_the_bucket_is_not_used(texts, bucket, tmp_path, monkeypatch, removed):
    config = data_config(texts, "s3://bucket/cache")
    Source(config).corpus(byte_tokenizer())
    (manifest,) = [name for name in bucket.find("bucket/cache/corpora") if name.endswith("manifest.json")]
    for name in removed:
        bucket.rm_file(manifest.replace("manifest.json", name))
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "two"))
    Source(config).corpus(byte_tokenizer())
    assert bucket.exists(manifest) and bucket.exists(manifest.replace("manifest.json", "train/tokens.bin"))


def test_objects_are_named_by_directory_glob_and_address(texts):
    def names(source):
        return [(file.name, file.path) for file in sources.files(source)]

    assert names(f"{texts}/") == [("a.jsonl", f"{texts}/a.jsonl"), ("more/b.jsonl.gz", f"{texts}/more/b.jsonl.gz")]
    assert names(f"{texts}/a.jsonl") == [("a.jsonl", f"{texts}/a.jsonl")]
    assert names(f"{texts}/**/*.gz") == [(f"{texts}/more/b.jsonl.gz", f"{texts}/more/b.jsonl.gz")]
    with pytest.raises(UserError, match="s3://bucket/other: no such object or directory"):
        sources.files("s3://bucket/other")
    with pytest.raises(UserError, match="--input=s3://bucket/texts: expected files, .* not objects of a bucket"):
        sources.paths(texts, "--input")


def test_an_object_that_changes_is_read_again(texts, tmp_path):
    config = data_config(texts, tmp_path)
    before = Source(config)
    files.write(files.path(f"{texts}/a.jsonl"), documents(900))
    assert before._scans[0].changed() == f"{texts}/a.jsonl"
    assert Source(config).sha256 != before.sha256


def test_the_command_prints_what_it_has_written(command, text_file, tmp_path, monkeypatch):
    flags = [f"--config.data.source={text_file}", f"--config.data.cache_dir={tmp_path}", "--config=tests/tiny.py"]
    done = command("tokenize", *flags)
    assert "tokens for training" in done.stdout and contents(tmp_path / "corpora")
    monkeypatch.setattr(catalog.local_engine, "run_jobs", None)  # everything is in the cache
    assert command("tokenize", *flags).stdout == done.stdout
    monkeypatch.setitem(sys.modules, "ray", None)
    flags[1] = f"--config.data.cache_dir={tmp_path / 'new'}"
    refused = command("tokenize", *flags, "--engine=ray", code=2)
    assert refused.stderr == "error: --engine=ray needs the package ray; pip install 'llm_jax[ray]'\n"
    labelled = command("tokenize", *flags, "--engine=ray", "--config.data.kind=labelled", code=2)
    assert "--engine=ray has no effect where data.kind is labelled" in labelled.stderr
