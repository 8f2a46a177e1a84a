import collections
import dataclasses
import hashlib
import unittest.mock

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.data import catalog, sources, split
from llm_jax.data.corpus import Source, Split
from llm_jax.data.rows import Rows, Shuffled, batch, batches
from llm_jax.errors import UserError
from llm_jax.schema import DataConfig, TokenizerConfig
from tests.data.configs import data_config

BOS, EOS = 1, 2


def stream(*lengths: int) -> Split:
    """Documents whose token k is 100 * document + k, between BOS and EOS."""
    documents = [[BOS, *(100 * (i + 1) + k for k in range(n - 2)), EOS] for i, n in enumerate(lengths)]
    offsets = np.cumsum([0, *lengths])
    return Split(np.concatenate(documents).astype(np.uint16), offsets, int(sum(lengths)))


def test_positions_restart_and_targets_stay_within_documents():
    rows = Rows(stream(5, 4, 9), 6)
    first = rows[0]
    np.testing.assert_array_equal(first["inputs"], [BOS, 100, 101, 102, EOS, BOS])
    np.testing.assert_array_equal(first["targets"], [100, 101, 102, EOS, BOS, 200])
    np.testing.assert_array_equal(first["positions"], [0, 1, 2, 3, 4, 0])
    np.testing.assert_array_equal(first["segments"], [1, 1, 1, 1, 1, 2])
    np.testing.assert_array_equal(first["mask"], [1, 1, 1, 1, 0, 1])
    np.testing.assert_array_equal(rows[1]["positions"], [0, 1, 2, 0, 1, 2])


def test_every_token_but_bos_is_a_target_exactly_once():
    split = stream(5, 4, 9, 30, 3)
    rows = Rows(split, 7)
    targets = np.concatenate([rows[i]["targets"][rows[i]["mask"] == 1] for i in range(len(rows))])
    np.testing.assert_array_equal(targets, split.tokens[split.tokens != BOS])
    assert not rows[len(rows) + 3]["mask"].any() and rows[len(rows) + 3]["inputs"].shape == (7,)


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_a_sliding_window_counts_each_target_once_with_context_before_it(stride):
    split = stream(5, 4, 9, 30, 3)
    rows = Rows(split, 7, stride)
    found = [rows[i] for i in range(len(rows))]
    targets = np.concatenate([row["targets"][row["mask"] == 1] for row in found])
    np.testing.assert_array_equal(targets, split.tokens[split.tokens != BOS])
    far = next(row for row in found if 415 in row["targets"][row["mask"] == 1])
    end = int(np.flatnonzero(far["mask"])[-1])
    assert end == 6 and far["mask"].sum() == stride  # full rows of context once the stream is that long


def test_each_epoch_is_another_permutation_and_a_function_of_the_seed():
    rows = Rows(stream(201), 4)
    epoch = lambda e, seed: [int(Shuffled(rows, seed)[50 * e + i]["inputs"][0]) for i in range(50)]  # noqa: E731
    everything = sorted(int(rows[i]["inputs"][0]) for i in range(50))
    assert sorted(epoch(0, 1)) == sorted(epoch(1, 1)) == everything
    assert epoch(0, 1) == epoch(0, 1) != epoch(1, 1)
    assert epoch(0, 1) != epoch(0, 2)


def test_a_batch_is_a_function_of_the_step():
    rows = Shuffled(Rows(stream(400), 8), 3)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    streamed = list(batches(rows, 2, 6, 4, sharding))
    for step, got in enumerate(streamed, 2):
        jax.tree.map(np.testing.assert_array_equal, got, batch(rows, step, 4, sharding))
        np.testing.assert_array_equal(got["inputs"][1], rows[4 * step + 1]["inputs"])


def config(path, cache, fraction=0.1, workers=0) -> DataConfig:
    return data_config(path, cache, validation_fraction=fraction, workers=workers)


def read(source: str, cache) -> catalog.Catalog:
    return catalog.read(source, "text", cache, 1)[0]


def test_a_file_is_cut_into_documents_and_nothing_is_lost(tmp_path):
    path = tmp_path / "text"
    text = "\r\n".join(f"line {i} é😀" for i in range(3000)) + "x" * 5000 + "é" * 5000
    path.write_bytes(text.encode())
    found = read(str(path), tmp_path)
    in_place = np.argsort(found[np.arange(len(found))]["start"])
    texts = list(found.texts(np.arange(len(found))))
    assert len(found) > 10 and "".join(texts[i] for i in in_place) == text


def groups(sizes: list[int], names: list[str]) -> catalog.Catalog:
    """Documents of these sizes and groups, in files of one each."""
    files = tuple(sources.File(f"{i}", name, "", "text") for i, name in enumerate(names))
    hashes = [int.from_bytes(hashlib.sha256(n.encode()).digest()[:8]) for n in names]
    count, records = len(sizes), np.zeros(len(sizes), catalog.RECORD)
    records["size"], records["group"] = sizes, hashes
    return catalog.Catalog(("x",), files, np.arange(1, count + 1), (records,), (count,), "text", "")


def held_out(found: catalog.Catalog, fraction: float) -> np.ndarray:
    return split.held_out(found, fraction)(found[np.arange(len(found))])


def test_the_split_holds_out_whole_groups_of_about_the_share():
    names = [f"group{i // 3}" for i in range(600)]
    held = held_out(groups([100] * 600, names), 0.1)
    assert {n for n, h in zip(names, held, strict=True) if h}.isdisjoint(
        n for n, h in zip(names, held, strict=True) if not h
    )
    assert 50 <= held.sum() <= 60
    assert (held_out(groups([100] * 600, names[::-1]), 0.1) == held[::-1]).all()


@hypothesis.given(
    st.lists(
        st.tuples(st.integers(1, 50), st.sampled_from("abcdefg"), st.booleans()),
        min_size=2,
        max_size=60,
    ).filter(lambda found: len({g if shared else i for i, (_, g, shared) in enumerate(found)}) > 1),
    st.floats(0.001, 0.9),
    st.sampled_from([2, 8, 2**16]),
    st.sampled_from([1, 3, 2**17]),
    st.sampled_from([1, 7, 2**14]),
)
def test_the_split_takes_groups_one_by_one_in_the_order_of_their_hash(found, fraction, bins, few, block):
    names = [g if shared else f"own{i}" for i, (_, g, shared) in enumerate(found)]
    total = collections.Counter()
    for (size, *_), group in zip(found, names, strict=True):
        total[group] += size
    room, expected = fraction * sum(total.values()), set()
    for group in sorted(total, key=lambda g: hashlib.sha256(g.encode()).digest()):
        if total[group] <= room:
            expected.add(group)
            room -= total[group]
    corpus = groups([size for size, *_ in found], names)
    # A group of one document is one that its file does not name, or does; the hash is the same.
    files = [
        f if shared else dataclasses.replace(f, group="", name=f.group)
        for f, (*_, shared) in zip(corpus.files, found, strict=True)
    ]
    corpus = dataclasses.replace(corpus, files=tuple(files))
    expected = expected or {min(total, key=lambda g: (total[g], g))}
    with (
        unittest.mock.patch.multiple(split, _BINS=bins, _BATCH=few),
        unittest.mock.patch.object(catalog, "_BLOCK", block),
    ):
        held = held_out(corpus, fraction)
    assert held.tolist() == [name in expected for name in names]


def test_stdlib_has_no_tests_in_it():
    names = [f.name for f in sources.files("stdlib", prefix=False)]
    assert "argparse.py" in names and len(set(names)) == len(names) > 400
    assert not any("test" in n.split("/")[:-1] for n in names)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_the_cache_holds_what_the_tokenizer_says_and_is_used_again(tmp_path, text_file, kind, monkeypatch):
    source = Source(config(text_file, tmp_path))
    tokenizer = source.tokenizer(TokenizerConfig(kind, 300, "", ""))
    corpus = source.corpus(tokenizer)
    texts = list(source.texts(held_out=False, limit=10**9))
    expected = [i for text in texts for i in (BOS, *tokenizer.encode(text), EOS)]
    np.testing.assert_array_equal(corpus.train.tokens, expected)
    assert corpus.train.num_bytes == sum(len(t.encode()) for t in texts)
    monkeypatch.setattr(type(tokenizer), "encode", None)
    monkeypatch.setattr(type(tokenizer), "train", None)
    again = Source(config(text_file, tmp_path))
    assert tokenizers.digest(again.tokenizer(TokenizerConfig(kind, 300, "", ""))) == tokenizers.digest(tokenizer)
    np.testing.assert_array_equal(again.corpus(tokenizer).train.tokens, expected)


def test_a_changed_text_is_another_cache(tmp_path):
    path = tmp_path / "text"
    path.write_text("one line\n" * 2000)
    first = Source(config(path, tmp_path / "c")).corpus(tokenizers.get("byte").train([], 0))
    path.write_text("one life\n" * 2000)
    second = Source(config(path, tmp_path / "c")).corpus(tokenizers.get("byte").train([], 0))
    assert first.sha256 != second.sha256 and (first.train.tokens[:9] != second.train.tokens[:9]).any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "no text"),
        (b"abc\xff\xfe" * 2000, "not UTF-8 text at byte 3"),
        (b"short", "one document"),
    ],
)
def test_text_that_is_not_utf8_is_a_one_line_error(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Source(config(path, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fraction", [1, -0.5, 2])
def test_a_fraction_outside_0_to_below_1_is_refused(tmp_path, text_file, fraction):
    with pytest.raises(UserError, match="validation_fraction"):
        Source(config(text_file, tmp_path, fraction))


def test_a_text_file_is_one_document_where_it_is_not_cut(tmp_path):
    """Also in a directory by itself; the caches of both are apart, though the text is the same."""
    path = tmp_path / "in" / "a.txt"
    path.parent.mkdir()
    path.write_text("one line of text\n" * 100)
    settings, byte = [config(p, tmp_path / "c") for p in (path, path.parent)], tokenizers.get("byte").train([], 0)
    counts = [
        len(source.corpus(byte).validation.offsets) - 1
        for source in (
            Source(settings[0], whole=True),
            Source(settings[0], whole=True, split_single_file=False),
            Source(settings[1], whole=True),
            Source(settings[0], whole=True),
        )
    ]
    assert counts == [2, 1, 1, 2]


@pytest.mark.parametrize("split_single_file", [(True, False), (False, True)])
def test_several_files_cut_and_whole_have_caches_of_their_own(tmp_path, split_single_file):
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in paths:
        path.write_text("one line of text\n" * 100)
    settings = config(",".join(map(str, paths)), tmp_path / "c")
    byte = tokenizers.get("byte").train([], 0)
    for cut in split_single_file:
        source = Source(settings, whole=True, split_single_file=cut)
        assert len(source.corpus(byte).validation.offsets) - 1 == (4 if cut else 2)


def test_a_damaged_cache_says_what_to_delete(tmp_path, text_file):
    source = Source(config(text_file, tmp_path))
    tokenizer = tokenizers.get("byte").train([], 0)
    source.corpus(tokenizer)
    (file,) = tmp_path.glob("corpora/*/train/tokens.bin")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated; delete this directory"):
        source.corpus(tokenizer)


def test_a_killed_build_leaves_no_cache(tmp_path, text_file, monkeypatch):
    source = Source(config(text_file, tmp_path))
    tokenizer = tokenizers.get("byte").train([], 0)
    calls = []

    def fail(self, text):
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [5]

    monkeypatch.setattr(type(tokenizer), "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        source.corpus(tokenizer)
    assert not [p for p in (tmp_path / "corpora").iterdir() if not p.name.startswith(".")]


def test_too_little_text_for_a_sequence_is_refused():
    with pytest.raises(UserError, match="fewer than one sequence of train.seq_len=64"):
        Shuffled(Rows(stream(10), 64), 0)
    assert dataclasses.replace(Rows(stream(10), 64), seq_len=8).num_full == 1
