import bz2
import gzip
import importlib
import json
import lzma
import sys
import types

import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.data import catalog, readers, records
from llm_jax.data.corpus import Source
from llm_jax.errors import UserError
from llm_jax.schema import DataConfig
from tests.data.configs import data_config

TEXTS = [f"text {i} é日😀\r\n\u2028 with \x00 and breaks\n" * (1 + i % 7) for i in range(300)]
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def zstd(data: bytes) -> bytes:
    return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd").compress(
        data
    )


def config(path, tmp_path, **changes) -> DataConfig:
    return data_config(path, tmp_path / "cache", **changes)


def texts(path, tmp_path, **changes) -> list[str]:
    source = Source(config(path, tmp_path, **changes))
    return list(source.catalog.texts(np.arange(len(source.catalog))))


def sides(source: Source) -> np.ndarray:
    """Which documents are held out."""
    return source.held_out(source.catalog[np.arange(len(source.catalog))])


def json_lines(found=TEXTS, field="text") -> bytes:
    return "".join(
        json.dumps({"id": i, field: t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(found)
    ).encode()


def parquet(path, found=TEXTS, **options) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": range(len(found)), "text": found}), path, **options)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_json_lines_give_their_texts_and_the_same_tokens_packed_or_not(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes((PACK | {"": bytes, ".zst": zstd})[suffix](json_lines()))
    assert texts(path, tmp_path) == TEXTS
    plain = tmp_path / "plain" / "a.jsonl"
    plain.parent.mkdir()
    plain.write_bytes(json_lines())
    byte = tokenizers.get("byte").train([], 0)
    one, other = (Source(config(p, p.parent / "of_its_own")).corpus(byte) for p in (path, plain))
    assert one.sha256 == other.sha256
    for a, b in ((one.train, other.train), (one.validation, other.validation)):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.offsets, b.offsets)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_packed_text_is_cut_and_held_out_as_the_plain_text_is(tmp_path, suffix):
    text = "\n".join(TEXTS).encode()
    plain, packed = tmp_path / "a.txt", tmp_path / f"a.txt{suffix}"
    plain.write_bytes(text)
    packed.write_bytes((PACK | {".zst": zstd})[suffix](text))
    one, other = (Source(config(p, tmp_path)) for p in (plain, packed))
    held = [{s.catalog.name(i) for i in np.flatnonzero(sides(s))} for s in (one, other)]
    assert held[0] == held[1] and sorted(texts(plain, tmp_path)) == sorted(texts(packed, tmp_path))
    assert "".join(texts(packed, tmp_path)).encode() == text


@pytest.mark.parametrize("options", [{}, {"row_group_size": 50}, {"compression": "gzip", "row_group_size": 7}])
def test_parquet_gives_its_column_and_leaves_out_what_is_empty(tmp_path, options):
    parquet(tmp_path / "a.parquet", [*TEXTS, None, ""], **options)
    assert texts(tmp_path / "a.parquet", tmp_path) == TEXTS
    source = Source(config(tmp_path / "a.parquet", tmp_path))
    some = np.arange(3, len(source.catalog), 41)
    assert list(source.catalog.texts(some)) == [TEXTS[i] for i in some]
    whole = list(catalog.read(str(tmp_path / "a.parquet"), "", str(tmp_path), 1)[0].texts(np.arange(9)))
    assert [json.loads(record) for record in whole] == [{"id": i, "text": TEXTS[i]} for i in range(9)]


def test_a_directory_holds_files_of_every_format(tmp_path):
    (tmp_path / "in").mkdir()
    parquet(tmp_path / "in" / "a.parquet", TEXTS[:9])
    (tmp_path / "in" / "b.jsonl").write_bytes(json_lines(TEXTS[9:20]))
    (tmp_path / "in" / "c.txt").write_text("c\n")
    (tmp_path / "in" / "d.gz").write_bytes(gzip.compress(b"d\n"))
    assert texts(tmp_path / "in", tmp_path) == [*TEXTS[:20], "c\n", "d\n"]
    assert texts(tmp_path / "in" / "*.jsonl", tmp_path) == TEXTS[9:20]


@pytest.mark.live
def test_a_data_set_of_datasets_gives_its_column(tmp_path):
    importlib.import_module("datasets")  # a missing peer fails
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "train.parquet")
    parquet(tmp_path / "set" / "test.parquet", TEXTS[:7])
    assert texts(f"hf:{tmp_path / 'set'}", tmp_path) == TEXTS
    assert texts(f"hf:{tmp_path / 'set'}:test", tmp_path) == TEXTS[:7]
    assert texts(f"hf:{tmp_path / 'set'}:default:test", tmp_path) == TEXTS[:7]
    with pytest.raises(UserError, match=r"the column 'words' is not in it; it has id, text"):
        texts(f"hf:{tmp_path / 'set'}", tmp_path, field="words")
    with pytest.raises(UserError, match="cannot be loaded"):
        texts(f"hf:{tmp_path / 'nothing'}", tmp_path)


def test_the_name_of_a_data_set_has_its_configuration_and_its_split(monkeypatch):
    def load_dataset(path, config, split):
        if path == "several" and config is None:
            raise ValueError("Config name is missing.")
        return path, config, split

    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, disable_progress_bars=lambda: None)
    )
    assert records.load_data_set("org/a") == ("org/a", None, "train")
    assert records.load_data_set("org/a:test") == ("org/a", None, "test")
    assert records.load_data_set("several:v1:train[:10%]") == ("several", "v1", "train[:10%]")
    with pytest.raises(UserError, match=r"hf:several:test .*Config name is missing.*expected hf:NAME:CONFIG:SPLIT"):
        records.load_data_set("several:test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff" * 3, "a.txt: not UTF-8 text at byte 2; convert it"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl: not UTF-8 text at byte 24"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]', "a.jsonl, line 2: expected a JSON object, found list"),
        ("a.jsonl", b'{"words": "a", "n": 1}', "line 1: the field 'text' is not in it; it has words, n. Name"),
        ("a.jsonl", b'{"text": 5}', "line 1: the field 'text' is int; expected text"),
        ("a.jsonl", rb'{"text": "\ud800"}', "line 1: an unpaired surrogate at character 0"),
        ("a.jsonl", b"[" * 10**6, "line 1: not JSON"),
        ("a.jsonl", b'{"text": ""}\n\n', "contains no text"),
        ("a.txt.gz", gzip.compress(b"text\n" * 10**5)[:-20], "a.txt.gz: truncated or damaged"),
        ("a.txt.gz", b"no gzip", "a.txt.gz: truncated or damaged"),
        ("a.txt.bz2", bz2.compress(b"text\n" * 10**5)[:-20], "a.txt.bz2: truncated or damaged"),
        ("a.txt.bz2", b"no bzip2", "a.txt.bz2: truncated or damaged"),
        ("a.txt.xz", lzma.compress(b"text\n" * 10**5)[:-20], "a.txt.xz: truncated or damaged"),
        ("a.txt.xz", b"no xz", "a.txt.xz: truncated or damaged"),
        ("a.txt.zst", None, "a.txt.zst: truncated or damaged"),
        ("a.txt.zst", b"no zstd", "a.txt.zst: truncated or damaged"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: not a readable Parquet file"),
    ],
)
def test_unreadable_files_are_one_line_errors_and_leave_no_cache(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if content is not None else zstd(b"text\n" * 10**5)[:-9])
    with pytest.raises(UserError, match=message) as error:
        Source(config(tmp_path / name, tmp_path))
    assert "\n" not in str(error.value) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty", r"data.source=empty: contains no text \(no file, or only hidden files\)"),
        ("hidden", r"contains no text \(no file, or only hidden files\)"),
        ("blank", r"data.source=blank: contains no text \(2 files without text\)"),
        ("/", "data.source=/: this is the whole file system; expected a directory with text"),
        ("closed", "closed: cannot be read .Permission denied.; data.source=closed names all files below"),
        ("pictures", "pictures/a.png: not UTF-8 text at byte 0; convert it or leave it out .a glob such as"),
        ("tables", "the field 'text' is not in it; it has word, n. Name the field|the column 'text' is not in it"),
    ],
)
def test_directories_without_readable_text(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    files = {"hidden/.a.txt": b"text", "blank/a.txt": b"", "blank/b.jsonl": b"\n", "pictures/a.png": b"\x89PNG"}
    files |= {
        "closed/a.txt": b"text",
        "empty": None,
        "tables/a.jsonl": b'{"text": "a"}',
        "tables/b.csv": b"word,n\na,1",
    }
    for name, content in files.items():
        path = tmp_path / name
        (path.parent if content is not None else path).mkdir(exist_ok=True)
        if content is not None:
            path.write_bytes(content)

    def closed(path, onerror):
        onerror(PermissionError(13, "Permission denied", "closed"))

    if source == "closed":  # root, which tests may run as, can read everything
        monkeypatch.setattr("os.walk", closed)
    with pytest.raises(UserError, match=message) as error:
        Source(config(source, tmp_path))
    assert "\n" not in str(error.value)


def test_a_directory_of_several_formats_is_read_by_the_suffix_of_each_file(tmp_path):
    (tmp_path / "mixed" / ".cache").mkdir(parents=True)
    contents = {"a.jsonl": '{"text": "one"}', "b.txt": "two", "c.csv": "text,label\nthree,1", ".cache/d.txt": "hidden"}
    for name, content in contents.items():
        (tmp_path / "mixed" / name).write_text(content)
    assert sorted(texts(tmp_path / "mixed", tmp_path)) == ["one", "three", "two"]


def test_a_column_that_is_not_there_or_holds_no_text_is_named(tmp_path):
    parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="the column 'words' is not in it; it has id, text. Name the field"):
        texts(tmp_path / "a.parquet", tmp_path, field="words")
    with pytest.raises(UserError, match="row 0: the field 'id' is int; expected text"):
        texts(tmp_path / "a.parquet", tmp_path, field="id")


@pytest.mark.parametrize(
    ("module", "name"), [("pyarrow", "a.parquet"), ("backports.zstd", "a.txt.zst"), ("datasets", "hf:a")]
)
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, module, name):
    for missing in (module, "compression.zstd"):
        monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=f"pip install {module}"):
        texts(name if name.startswith("hf:") else tmp_path / name, tmp_path)


def test_a_text_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines())
    source = Source(config(path, tmp_path))
    path.write_bytes(json_lines([t[::-1] + "x" for t in TEXTS]))
    with pytest.raises(UserError, match=r"a.jsonl.*(changed while it was being read|not JSON)"):
        source.corpus(tokenizers.get("byte").train([], 0))
    path.write_bytes(json_lines())
    source = Source(config(path, tmp_path))
    path.write_bytes(json_lines([t.replace("text", "TEXT") for t in TEXTS]))  # of the same size everywhere
    with pytest.raises(UserError, match="changed while it was being tokenized"):
        source.corpus(tokenizers.get("byte").train([], 0))


def test_a_scan_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    import os

    (tmp_path / "in").mkdir()
    for name in "abc":
        path = tmp_path / "in" / f"{name}.jsonl"
        path.write_bytes(json_lines([name, name * 2]))
        os.utime(path, (10**9, 10**9))
    scanned = []
    real = readers.FORMATS["jsonl"]
    spy = readers.FileFormat(lambda path, field: scanned.append(path[-7]) or real.scan(path, field), real.read)
    monkeypatch.setitem(readers.FORMATS, "jsonl", spy)
    first = Source(config(tmp_path / "in", tmp_path))
    again = Source(config(tmp_path / "in", tmp_path))
    assert scanned == ["a", "b", "c"] and again.sha256 == first.sha256 and (sides(again) == sides(first)).all()
    (tmp_path / "in" / "b.jsonl").write_bytes(json_lines(["B", "bb"]))
    changed = Source(config(tmp_path / "in", tmp_path))
    assert scanned[3:] == ["b"] and changed.sha256 != first.sha256
    Source(config(tmp_path / "in", tmp_path))
    assert scanned[4:] == ["b"]  # changed just now: it may change again under the same time
    for path in (tmp_path / "cache" / "scans").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert Source(config(tmp_path / "in", tmp_path)).sha256 == changed.sha256


def test_catalog_reads_documents_in_any_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS[:50]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS[50:])))
    found, _ = catalog.read(f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl.gz'}", "text", str(tmp_path / "m"), 1)
    assert found.source_ends == (50, 300)
    for some in (np.array([3, 49, 50, 51, 299]), np.array([], np.int64), np.arange(0, 300, 7)):
        assert list(found.texts(some)) == [TEXTS[i] for i in some]


# ---------------------------------------------------------------- files are read as what they are

HARD = [f'text {i}\u2028second\u2029third\x85fourth\x0bfifth, "quoted"\tand more' for i in range(300)]


def delimited(found, delimiter) -> bytes:
    import csv
    import io

    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([("id", "text"), *enumerate(found)])
    return file.getvalue().encode()


CONTENTS = {
    "array.json": json.dumps([{"id": i, "text": t} for i, t in enumerate(HARD)], indent=1).encode(),
    "array_in_a_line.json": json.dumps([{"text": t} for t in HARD], ensure_ascii=False).encode(),
    "lines.json": json_lines(HARD),
    "bom.json": b"\xef\xbb\xbf" + json.dumps([{"text": t} for t in HARD]).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + json_lines(HARD),
    "crlf.jsonl": json_lines(HARD).replace(b"\n", b"\r\n"),
    "blank.jsonl": b"\n" + json_lines(HARD) + b"\n  \n\r\n",
    "no_newline.jsonl": json_lines(HARD).rstrip(b"\n"),
    "upper.JSONL": json_lines(HARD),
    "table.csv": delimited(HARD, ","),
    "bom.csv": b"\xef\xbb\xbf" + delimited(HARD, ","),
    "table.tsv": delimited(HARD, "\t"),
    "packed.csv.gz": gzip.compress(delimited(HARD, ",")),
    "packed.json.gz": gzip.compress(json.dumps([{"text": t} for t in HARD]).encode()),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_records_are_read_whatever_their_form(tmp_path, name):
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert texts(tmp_path / name, tmp_path) == HARD
    source = Source(config(tmp_path / name, tmp_path))
    some = np.arange(3, 300, 41)
    assert list(source.catalog.texts(some)) == [HARD[i] for i in some]
    records = Source(config(tmp_path / name, tmp_path, kind="instructions")).catalog.texts(np.arange(9))
    assert [json.loads(record)["text"] for record in records] == HARD[:9]


def test_values_of_a_table_may_have_line_breaks(tmp_path):
    (tmp_path / "a.csv").write_bytes(delimited(TEXTS, ","))
    assert texts(tmp_path / "a.csv", tmp_path) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"data": [{"text": "a"}]}\n', "the field 'text' is not in it; it has data"),
        ("a.json", b'{\n "data": [{"text": "a"}]\n}', "expected an array of JSON objects, or one object a line"),
        ("a.json", b'["a", "b"]', "expected an array of JSON objects, or one object a line"),
        ("a.json", b'[{"text": "a"}, 5]', "row 1: expected a JSON object, found int"),
        ("a.json", b'[{"text": "a"}, {"words": "b"}]', "row 1: the field 'text' is not in it; it has words"),
        ("a.json", b'[{"text": "a"}', "not JSON"),
        ("a.csv", b"id,words\n1,a\n", "line 2: the column 'text' is not in it; it has id, words. Name the field"),
        ("a.csv", b"id,text\n1,a\n2\n", r"line 3: 1 values; expected 2 \(id, text\)"),
        ("a.csv", b"text,text\na,b\n", "two columns of the first line have the same name"),
        ("a.csv", b'id,text\n1,"a" b\n', "record at byte 8: not CSV"),
        ("a.tsv", b'id\ttext\n1\t"a\n2\tb\n', "record at byte 8: not TSV"),
    ],
)
def test_records_that_cannot_be_read_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Source(config(tmp_path / name, tmp_path))
    assert "\n" not in str(error.value)


def test_json_of_another_form_in_a_directory_is_text(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "package.json").write_text('{\n "name": "a"\n}\n')
    (tree / "records.json").write_text('[{"text": "b"}]')
    assert texts(tree, tmp_path) == ['{\n "name": "a"\n}\n', "b"]
