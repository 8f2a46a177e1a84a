"""Data formats of the user's own: `data.format=FILE:NAME(OPTIONS)`."""

import contextlib
import json
import linecache
import pickle
import shutil
import sys
import types

import numpy as np
import pytest

from llm_jax import extensions, tokenizers
from llm_jax.data import build, kinds, local_engine, ray_engine, readers, rows
from llm_jax.data import catalog as catalog_lib
from llm_jax.data.corpus import Source
from llm_jax.errors import UserError
from tests.data.configs import data_config
from tests.data.test_stores import contents, inline

FORMAT = """
from llm_jax.data.streams import open_stream

def pages(path, separator="%", prefix=""):
    with open_stream(path) as file:
        for page in file.read().decode().split(separator):
            yield prefix + page.strip()

def records(path, kind="text"):
    for page in pages(path):
        question, _, answer = page.partition(" ")
        yield {
            "text": {"text": page},
            "instructions": {"prompt": question, "answer": answer},
            "preferences": {"prompt": question, "chosen": answer, "rejected": "no"},
            "labelled": {"text": page, "label": "ab"[len(page) % 2]},
        }[kind]

def number(path): return 3
def one_text(path): return "abc"
def integers(path): yield from (1, 2)
def objects(path): yield {"text": "a", "set": {1}}
def fails(path):
    yield "a"
    raise KeyError("x")
def ends(path):
    yield "a"
    raise SystemExit(3)
calls = []
def counts(path):
    calls.append(path)
    yield from ["a" * len(calls), "b" * 3]
def fewer(path):
    calls.append(path)
    yield from ["a", "b", "c"][: 4 - len(calls)]
"""
PAGES = [f"page {i} " + "has some words é 😀\n" * (1 + i % 9) for i in range(400)]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """The current directory, with the file of the formats and a file in their format."""
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "own_cache"))
    (tmp_path / "my_pages.py").write_text(FORMAT)
    (tmp_path / "a.pages").write_text("%".join(PAGES))
    with contextlib.chdir(tmp_path):
        yield tmp_path


def config(form, source="a.pages", cache="cache", **changes):
    return data_config(source, cache, format=form, **changes)


def texts(*arguments, **changes):
    source = Source(config(*arguments, **changes), whole=True)
    return list(source.catalog.texts(np.arange(len(source.catalog))))


def byte():
    return tokenizers.get("byte").train([], 0)


def refused(function) -> str:
    with pytest.raises(UserError) as error:
        function()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_documents_are_those_that_the_function_yields(directory):
    stripped = [page.strip() for page in PAGES]
    assert texts("my_pages.py:pages") == stripped
    assert texts("my_pages.py:pages(separator='#')") == ["%".join(PAGES).strip()]
    assert texts("my_pages:pages(prefix='> ')") == [f"> {page}" for page in stripped]
    assert texts("my_pages.py:records") == stripped  # the field data.field of a record
    assert "'title' is not in it; it has text" in refused(lambda: texts("my_pages.py:records", field="title"))


def test_some_documents_of_a_file_are_read_alone(directory):
    source = Source(config("my_pages.py:pages"))
    for indices in ([0], [399], [3, 4, 200]):
        assert list(source.catalog.texts(np.array(indices))) == [PAGES[i].strip() for i in indices]


def test_a_built_in_format_is_selected_by_name(directory):
    (directory / "a.data").write_text(json.dumps({"text": "first"}) + "\n" + json.dumps({"text": "second"}))
    assert texts("jsonl", "a.data") == ["first", "second"]
    assert len(texts("auto", "a.data")) == 1 and texts("text", "a.pages") == ["%".join(PAGES)]
    message = refused(lambda: texts("jsnl"))
    assert (
        message.startswith("config key 'data.format' is 'jsnl'; expected one of auto, csv, ") and "'jsonl'?" in message
    )
    assert "data.format=csv applies to files; data.source=hf:x is a data set" in refused(lambda: texts("csv", "hf:x"))


@pytest.mark.parametrize("kind", ["text", "instructions", "preferences", "labelled"])
def test_every_kind_of_data_reads_the_records(directory, kind):
    source = kinds.open_source(config(f"my_pages.py:records(kind={kind!r})", kind=kind))
    corpus = source.corpus(byte())
    assert len(corpus.train.tokens) and len(corpus.validation.tokens)
    row = rows.ROWS[kind](corpus.train, 256)[0]
    assert row["mask"].any()


def test_another_version_of_the_file_or_other_options_use_no_cached_tokens(directory):
    """The version that is edited yields texts of the same sizes, so that only the hash of the source differs."""
    first = Source(config("my_pages.py:pages"))
    tokens = [first.corpus(byte()).train.tokens.copy(), first.sha256]
    assert Source(config("my_pages.py:pages")).sha256 == first.sha256
    (directory / "my_pages.py").write_text(FORMAT.replace("page.strip()", "page.strip().swapcase()"))
    second = Source(config("my_pages.py:pages"))
    assert not np.array_equal(second.corpus(byte()).train.tokens, tokens[0]) and second.sha256 != tokens[1]
    (directory / "my_pages.py").write_text(FORMAT + "# the same texts by other code\n")
    assert Source(config("my_pages.py:pages")).sha256 not in (first.sha256, second.sha256)
    assert Source(config("my_pages.py:pages(prefix='')")).sha256 != Source(config("my_pages.py:pages")).sha256


def test_a_file_that_changes_while_it_is_used_is_refused(directory):
    source = Source(config("my_pages.py:pages"))
    readers._custom.cache_clear()  # as in another process
    (directory / "my_pages.py").write_text(FORMAT.replace("strip", "rstrip"))
    assert "my_pages.py has changed since" in refused(lambda: source.corpus(byte()))
    readers._custom.cache_clear()
    (directory / "my_pages.py").unlink()
    assert "no file or module 'my_pages.py'" in refused(lambda: source.corpus(byte()))


def test_several_processes_and_another_engine_write_the_same_bytes(directory, monkeypatch):
    for name in "bc":
        (directory / f"{name}.pages").write_text("%".join(reversed(PAGES)) + name)
    monkeypatch.setattr(build, "_SMALLEST", 5_000)
    source = "*.pages"
    for workers in (1, 2):
        Source(config("my_pages.py:pages", source, str(workers), workers=workers)).corpus(byte())
    monkeypatch.setattr(ray_engine, "run_jobs", inline)
    Source(config("my_pages.py:pages", source, "ray"), engine="ray").corpus(byte())
    written = [contents(directory / name / "corpora") for name in ("1", "2", "ray")]
    assert written[0] and written[0] == written[1] == written[2]


def test_a_file_is_read_once_for_all_of_its_documents(directory, monkeypatch):
    """A function reads from the beginning, so that a file is one job."""
    monkeypatch.setattr(build, "_SMALLEST", 5_000)
    source, jobs = Source(config("my_pages.py:pages")), []
    monkeypatch.setattr(build.local_engine, "run_jobs", lambda work, todo, *rest, **more: jobs.extend(todo) or ())
    with contextlib.suppress(OSError, UserError):  # the parts are missing
        source.corpus(byte())
    assert len(jobs) == 2  # the two sides of the split


def test_a_machine_of_a_cluster_gets_the_file(directory, tmp_path, monkeypatch):
    source = Source(config("my_pages.py:pages"))
    (specification,) = {file.format for file in source.catalog.files}
    sources = ray_engine._sources([specification, "jsonl"])
    assert sources == (("my_pages.py", FORMAT.encode()),)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy("a.pages", elsewhere)
    monkeypatch.setenv("LLM_JAX_CACHE", str(elsewhere / "cache"))
    monkeypatch.setenv("LLM_JAX_ALLOW", "")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    readers._custom.cache_clear()
    row = {"index": 0, "job": pickle.dumps((source.catalog.files[0], "text"))}
    with contextlib.chdir(elsewhere):
        missing, _ = pickle.loads(ray_engine._result(catalog_lib._scan_remotely, (), row)["result"])
        error, (digest, _) = pickle.loads(ray_engine._result(catalog_lib._scan_remotely, sources, row)["result"])
    assert "no file or module 'my_pages.py'" in missing and not error
    assert digest == source._scans[0].digests[0]
    assert ray_engine._sources(["../up.py:f", "/absolute.py:f"]) == ()


CASES = {
    "my_pages.py:number": "a.pages: the function returns int; expected an iterator of texts or records",
    "my_pages.py:one_text": "a.pages: the function returns str; expected an iterator of texts or records",
    "my_pages.py:integers": "a.pages, document 0 is int; expected text (str) or a record (dict)",
    "my_pages.py:fails": "a.pages: fails after 1 documents (KeyError: 'x', my_pages.py line",
    "my_pages.py:ends": "a.pages: fails after 1 documents (SystemExit: 3, my_pages.py line",
    "my_pages.py:pages(separater='#')": "it has no option 'separater'; its options are separator, prefix",
    "my_pages.py:pages(separator=3)": "option 'separator' is 3; expected str",
    "my_pages.py:missing": "my_pages.py defines no 'missing'",
    "no_such.py:f": "no file or module 'no_such.py'",
    "my_pages.py": "expected FILE:NAME, with the name of a class or function in the file",
    "my_pages.py:counts": "does not yield the same documents as before; it must not depend on anything but the content",
    "my_pages.py:fewer": "a.pages, document 2: the function does not yield the same documents as before",
}


@pytest.mark.parametrize("form", CASES)
def test_refused(directory, form):
    message = refused(lambda: (texts(form), texts(form)))
    assert message.startswith("data.format=") and CASES[form] in message


def test_records_are_checked(directory):
    kind = "instructions"
    assert "document 0 is str; expected a record (dict), which this data.kind consists of" in refused(
        lambda: texts("my_pages.py:pages", kind=kind)
    )
    assert "with values that JSON cannot hold" in refused(lambda: texts("my_pages.py:objects", kind=kind))
    with_hash = readers.resolve("my_pages.py:pages")
    assert "must record the hash" in refused(lambda: readers.get(with_hash.partition("#")[0]))


def test_a_function_of_a_notebook_is_read_by_this_process_alone(directory, monkeypatch):
    """The kernel's `__main__` has no file; the sources of cells are in linecache, by the file name of their code."""
    notebook = types.ModuleType("__main__")

    def run(cell):
        name = f"<cell {hash(cell)}>"
        linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
        exec(compile(cell, name, "exec"), vars(notebook))
        return Source(config("__main__:pages", workers=2))

    monkeypatch.setitem(sys.modules, "__main__", notebook)
    first, second = run(FORMAT), run(FORMAT.replace("page.strip()", "page.strip().swapcase()"))
    assert first.sha256 != second.sha256
    monkeypatch.setattr(local_engine.multiprocessing, "get_context", None)  # no other process starts
    assert len(second.corpus(byte()).train.tokens)
    assert "only this process has this part" in refused(lambda: Source(config("__main__:pages"), engine="ray"))
    assert extensions.module_name(second.catalog.files[0].format) == "__main__"
