"""word2vec and GloVe against the papers' formulas in loops of numpy."""

import dataclasses
import functools
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax import configuration as config_lib
from llm_jax.embeddings import glove, measure, word2vec
from llm_jax.embeddings import texts as corpora
from llm_jax.embeddings.texts import BREAK, WordCorpus
from llm_jax.errors import UserError
from llm_jax.schema import EmbeddingsConfig

ROOT = pathlib.Path(__file__).parents[2]


def load() -> EmbeddingsConfig:
    return config_lib.build(runpy.run_path(str(ROOT / "configs" / "word2vec.py"))["get_config"](), EmbeddingsConfig)


@pytest.fixture(scope="module")
def config() -> EmbeddingsConfig:
    return load()


def topics(seed: int = 0, sentences: int = 3000) -> WordCorpus:
    """Words 0 to 9 stand together, and words 10 to 19."""
    draw = np.random.default_rng(seed)
    rows = [np.append(draw.integers(0, 10, 12) + 10 * draw.integers(0, 2), BREAK) for _ in range(sentences)]
    ids = np.concatenate(rows).astype(np.int32)
    return WordCorpus(tuple(f"w{i}" for i in range(20)), np.bincount(ids[ids != BREAK], minlength=20), ids, "")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pairs(ids, windows) -> list[tuple[int, int]]:
    """(centre, context) places, by the definition."""
    return [
        (i, j)
        for i in range(len(ids))
        for j in range(max(0, i - windows[i]), min(len(ids), i + windows[i] + 1))
        if i != j and BREAK not in ids[min(i, j) : max(i, j) + 1]
    ]


@pytest.mark.parametrize("kind", ["skipgram", "cbow"])
@pytest.mark.parametrize("window", [1, 3, 5, 20])
def test_a_step_is_the_sum_of_the_gradients_of_its_pairs(kind, window):
    draw = np.random.default_rng(window)
    words, width, size, drawn, negatives = 30, 6, 64, 4, 5
    table = draw.normal(size=(words, 2 * width)).astype(np.float32)
    ids = draw.integers(0, words, size).astype(np.int32)
    ids[[0, 7, 8, 40, 62, 63]] = BREAK
    windows = draw.integers(1, window + 1, size).astype(np.int32)
    against = draw.integers(0, words, (size // 16, drawn)).astype(np.int32)
    rate = np.float32(0.1)
    expected, x, y = table.astype(np.float64), table[:, :width], table[:, width:]
    by_centre: dict[int, list[int]] = {}
    for i, j in pairs(ids, windows):
        by_centre.setdefault(i, []).append(j)
    for i, contexts in by_centre.items():
        mean = np.mean([x[ids[j]] for j in contexts], 0)
        # (input vector, words whose input rows get its gradient, target word)
        if kind == "skipgram":
            positives = [(x[ids[i]], [ids[i]], ids[j]) for j in contexts]
        else:
            positives = [(mean, [ids[j] for j in contexts], ids[i])]
        for h, owners, target in positives:
            parts = [(target, 1.0, 1.0)] + [(n, 0.0, negatives / drawn) for n in against[i // 16]]
            for word, label, weight in parts:
                g = rate * weight * (label - sigmoid(h @ y[word]))
                for owner in owners:
                    expected[owner, :width] += g * y[word]
                expected[word, width:] += g * h
    train_steps = jax.jit(functools.partial(word2vec._train_steps, kind, window, negatives, lambda array: array))
    found = train_steps(table, word2vec.word_windows(ids[None], window, 1), against[None], windows[None], rate[None])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@hypothesis.settings(max_examples=30)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), window=st.sampled_from([1, 2, 7, 15, 16, 20]))
def test_the_context_mask_has_exactly_the_pairs_of_the_definition(seed, window):
    draw = np.random.default_rng(seed)
    ids = np.where(draw.random(48) < 0.2, BREAK, draw.integers(0, 5, 48)).astype(np.int32)
    windows = draw.integers(1, window + 1, 48).astype(np.int32)
    (around,) = word2vec.word_windows(ids[None], window, 1)
    band = np.asarray(word2vec.context_mask(jnp.asarray(around), jnp.asarray(windows), window))
    found = {(g * 16 + b, g * 16 + c - window) for g, b, c in np.argwhere(band)}
    assert found == set(pairs(ids, windows))


@pytest.mark.parametrize("kind", ["skipgram", "cbow", "glove"])
def test_words_that_occur_together_become_similar(config, kind, tmp_path):
    corpus = topics()
    settings = dataclasses.replace(config, kind=kind, width=16, epochs=3)
    settings = dataclasses.replace(settings, word2vec=dataclasses.replace(config.word2vec, sample=0.0, chunk=16))
    told: list[int] = []
    if kind == "glove":
        counted = glove.cooccurrences(corpus, 5, 2**20, tmp_path)
        settings = dataclasses.replace(settings, epochs=60, glove=dataclasses.replace(config.glove, batch_size=64))
        found = glove.train(corpus, settings, counted, told.append)
        assert sum(told) == 60 * 200  # cells
    else:
        found = word2vec.train(corpus, settings, told.append)
        assert sum(told) == 3 * len(corpus.ids)
    unit = found.directions()
    cosines = unit @ unit.T - np.eye(20)
    within = (cosines[:10, :10].sum() + cosines[10:, 10:].sum()) / 180
    across = cosines[:10, 10:].mean()
    assert within > across + 0.5
    again = glove.train(corpus, settings, counted) if kind == "glove" else word2vec.train(corpus, settings)
    np.testing.assert_array_equal(found.matrix, again.matrix)


def test_several_devices_give_the_vectors_of_one_and_exchange_rows_only():
    full = [sys.executable, "-m", "tests.embeddings.on_devices"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(full, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    exchanged = found.pop("exchanged")
    for kind, seen in found.items():
        assert seen["apart"] < 1e-4 * seen["largest"], kind
    # 4 devices x (16 words + 10 around them + 16 negatives); the table has 5000 rows.
    assert {what for _, what in exchanged} == {"all-gather"} and {s.split("{")[0] for s, _ in exchanged} <= {
        "s32[168]",
        "f32[168,16]",
    }, exchanged


def test_subsampling_drops_frequent_words_and_keeps_rare_ones():
    counts = np.array([50_000, 1_000, 10])
    keep = word2vec.keep_probability(counts, 1e-3)
    share = counts / counts.sum()
    np.testing.assert_allclose(keep[:2], np.minimum(1, (np.sqrt(share / 1e-3) + 1) * 1e-3 / share)[:2])
    assert keep[0] < 0.2 and keep[2] == 1
    assert (word2vec.keep_probability(counts, 0.0) == 1).all()


def test_vectors_that_diverge_are_an_error_that_says_what_to_lower(config):
    wild = dataclasses.replace(config, width=16, word2vec=dataclasses.replace(config.word2vec, lr=50.0, sample=0.0))
    with pytest.raises(UserError, match=r"the vectors diverged; lower word2vec.chunk=256 .* or word2vec.lr=50.0"):
        word2vec.train(topics(), wild)


def test_glove_that_diverges_is_an_error_that_says_what_to_lower(config, tmp_path):
    corpus = topics(sentences=100)
    wild = dataclasses.replace(config, width=16, epochs=3, glove=dataclasses.replace(config.glove, lr=1e6))
    with pytest.raises(UserError, match=r"the vectors diverged; lower glove.lr=1000000.0"):
        glove.train(corpus, wild, glove.cooccurrences(corpus, 5, 2**20, tmp_path))


def test_a_chunk_that_is_no_multiple_of_the_blocks_is_refused(config):
    with pytest.raises(UserError, match=r"'word2vec.chunk' is 100; expected a multiple of 16"):
        word2vec.train(topics(), dataclasses.replace(config, word2vec=dataclasses.replace(config.word2vec, chunk=100)))


@pytest.mark.parametrize("memory", [2**12, 2**30])
def test_cooccurrences_are_those_of_a_loop_however_little_memory(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(glove, "_PIECE", 100)
    draw = np.random.default_rng(0)
    ids = np.where(draw.random(2000) < 0.1, BREAK, draw.integers(0, 12, 2000)).astype(np.int32)
    corpus = WordCorpus(tuple("abcdefghijkl"), np.bincount(ids[ids != BREAK]), ids, "")
    cells = np.fromfile(glove.cooccurrences(corpus, 4, memory, tmp_path), glove._CELL)
    expected: dict[int, float] = {}
    for i, j in pairs(ids, np.full(2000, 4)):
        cell = int(ids[i]) * 12 + int(ids[j])
        expected[cell] = expected.get(cell, 0.0) + 1 / abs(i - j)
    assert cells["cell"].tolist() == sorted(expected)
    np.testing.assert_allclose(cells["count"], [expected[c] for c in sorted(expected)], rtol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["cooccurrences"]


def test_a_text_without_pairs_is_one_clear_error(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\nb\n")
    with pytest.raises(UserError, match="no two words of the vocabulary occur in one paragraph"):
        glove.cooccurrences(corpora.build(str(tmp_path / "a.txt"), 1, 0, tmp_path), 10, 2**20, tmp_path)


@pytest.mark.parametrize("piece", [3, 4, 2**20])
def test_the_last_piece_may_be_shorter_than_the_window_and_have_no_pairs(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(glove, "_PIECE", piece)
    corpus = WordCorpus(("a", "b"), np.array([2, 1]), np.array([0, 1, BREAK, 0, BREAK], np.int32), "")
    # So little memory that the counts of a piece are a run of their own.
    cells = np.fromfile(glove.cooccurrences(corpus, 10, 1, tmp_path), glove._CELL)
    assert cells.tolist() == [(1, 1.0), (2, 1.0)]


def test_a_step_of_glove_is_that_of_the_paper():
    draw = np.random.default_rng(0)
    words, width = 9, 5
    table = np.concatenate([draw.normal(size=(18, width + 1)), 1 + draw.random((18, width + 1))], 1).astype(np.float32)
    word, context = np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7]) + words  # no word twice: the order does not matter
    count = np.array([3.0, 50.0, 0.5, 0.0], np.float32)  # the last is padding
    expected = table.astype(np.float64)
    for i, j, n in zip(word, context, count, strict=True):
        if not n:
            continue
        w, c = table[i, :width], table[j, :width]
        error = w @ c + table[i, width] + table[j, width] - np.log(n)
        slope = min(1.0, (n / 10) ** 0.75) * error
        for row, other in ((i, c), (j, w)):
            gradient = slope * np.append(other, 1.0)
            expected[row, : width + 1] -= 0.05 * gradient / np.sqrt(table[row, width + 1 :])
            expected[row, width + 1 :] += gradient**2
    train_steps = jax.jit(functools.partial(glove._train_steps, 10.0, 0.75, 0.05, lambda array: array))
    np.testing.assert_allclose(
        train_steps(table, word[None], context[None], count[None]), expected, rtol=1e-4, atol=1e-5
    )


def test_a_corpus_counts_lower_case_words_by_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("The cat's hat,\nthe HAT 42!\n\n\nA cat the rare\n")
    (tmp_path / "b.txt").write_text("the hat cat’s")
    found = corpora.build(str(tmp_path), 2, 0, tmp_path)
    assert found.words == ("the", "hat", "cat's") and found.counts.tolist() == [4, 3, 2] and found.num_words == 9
    assert found.ids.tolist() == [0, 2, 1, 0, 1, BREAK, 0, BREAK, 0, 1, 2, BREAK]
    assert corpora.build(str(tmp_path / "*.txt"), 1, 2, tmp_path).words == ("the", "hat")


@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(text=st.text("ab' \n\t", max_size=120), longest=st.sampled_from([5, 30, 1000]))
@hypothesis.example(text="aaaa\taaa\taa", longest=5)
def test_paragraphs_end_at_blank_lines_and_long_ones_between_words(text, longest, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(corpora, "_LONGEST", longest)
    words = [p for p in corpora.paragraphs(str(tmp_path / "a.txt")) if p]
    expected, paragraph = [], []
    for line in [*text.split("\n"), ""]:
        paragraph += corpora._WORD.findall(line)
        if not line.strip() and paragraph:
            expected.append(paragraph)
            paragraph = []
    if longest == 1000:
        assert words == expected
    elif max(map(len, text.split()), default=0) < longest:
        assert [w for p in words for w in p] == [w for p in expected for w in p]


def test_memory_does_not_grow_with_the_text(tmp_path):
    """A file of one line, as the usual corpora are."""
    peaks = []
    for megabytes in (1, 4):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text(" ".join(f"word{'abcdefghij'[i % 10]}" for i in range(megabytes * 170_000)))
        tracemalloc.start()
        found = corpora.build(str(path), 1, 0, tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.num_words == megabytes * 170_000
    assert peaks[1] < 1.2 * peaks[0], peaks


@pytest.mark.parametrize(("content", "message"), [(b"word", "fewer than two words"), (b"a\xff b", "not UTF-8")])
def test_a_corpus_without_words_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpora.build(str(tmp_path), 1, 0, tmp_path)


def test_the_commands_train_and_probe(command, text_file, tmp_path):
    flags = (f"--config.source={text_file}", "--config.width=8", "--config.epochs=1", "--config.min_count=1")
    for kind, name in (("cbow", "v.bin"), ("glove", "v.txt")):
        said = command("train_embeddings", *flags, f"--config.kind={kind}", f"--output={tmp_path / name}").stdout
        assert "8,000 words, vocabulary of 14" in said and "wrote" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.bin", "v.txt"]
    shown = command(
        "probe_embeddings", f"--vectors={tmp_path / 'v.bin'}", "--neighbours=token", f"--map={tmp_path / 'm.png'}"
    ).stdout
    assert shown.startswith("token: ") and shown.count(",") == 9 and (tmp_path / "m.png").stat().st_size > 1000
    assert (
        "'king' is not among the 14 words"
        in command("probe_embeddings", f"--vectors={tmp_path / 'v.txt'}", "--neighbours=king", code=2).stderr
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.epoch=3", "unknown config key 'epoch'; did you mean 'epochs'?"),
        ("--config.word2vec.window=0", "'word2vec.window' is 0; expected a number of at least 1"),
        ("--config.kind=fasttext", "config key 'kind' is 'fasttext'; expected one of cbow, glove, skipgram"),
        ("--config.source=/none", "no such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, flag, message):
    said = command("train_embeddings", flag, f"--output={tmp_path / 'v.txt'}", code=2).stderr
    assert message in said and not list(tmp_path.iterdir())


@pytest.mark.slow  # fetches 28 MB once; half a minute of training
def test_similarities_learned_from_real_text_correlate_with_ratings(config, tmp_path):
    from llm_jax.data import assets

    found = word2vec.train(corpora.build(config.source, config.min_count, 0, tmp_path), config)
    assert measure.agreement(found, assets.path("wordsim")).correlation > 0.12
    assert {"prince", "duke", "henry", "edward"} & {w for w, _ in measure.neighbours(found, "king")}


def test_negatives_are_drawn_in_proportion_to_counts_to_the_power_of_three_quarters(config):
    """Mikolov et al. 2013, arXiv:1310.4546, section 2.2: neither the counts themselves nor all words alike."""
    counts = np.array([1000, 200, 50, 10, 1])
    corpus = WordCorpus(tuple("abcde"), counts, np.repeat(np.arange(5), counts).astype(np.int32), "")
    options = dataclasses.replace(config.word2vec, sample=0.0)
    (step,) = word2vec._steps(corpus, options, np.random.default_rng(0))
    drawn = np.bincount(step[2].reshape(-1), minlength=5)
    expected = counts**0.75 / (counts**0.75).sum() * drawn.sum()
    assert stats.chisquare(drawn, expected).pvalue > 1e-3
    for power in (0.7, 0.8):
        other = counts**power / (counts**power).sum() * drawn.sum()
        assert stats.chisquare(drawn, other).pvalue < 1e-6


def test_the_learning_rate_falls_linearly_over_all_epochs(config, monkeypatch):
    seen: list[np.ndarray] = []

    def compiled(many, split):
        def record(table, ids, negatives, windows, rates):
            seen.append(np.asarray(rates))
            return table

        return record

    monkeypatch.setattr(word2vec.devices, "compiled", compiled)
    options = dataclasses.replace(config.word2vec, lr=0.1, final_lr=0.02, chunk=16, sample=0.0)
    word2vec.train(topics(), dataclasses.replace(config, epochs=4, word2vec=options))
    first_of_epoch = np.array([rates[0] for rates in seen[:: len(seen) // 4]])
    np.testing.assert_allclose(first_of_epoch, 0.1 - 0.08 * np.arange(4) / 4, atol=1e-6)
    rates = np.concatenate(seen)
    assert (np.diff(rates) < 1e-9).all() and 0.02 <= rates[-1] < 0.021
