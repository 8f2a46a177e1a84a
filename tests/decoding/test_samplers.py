import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm_jax.decoding import penalties, samplers
from llm_jax.decoding.options import DecodingOptions, parse_bias
from llm_jax.errors import UserError
from tests.decoding.sampler_cases import CASES, tokens_and_logits

PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.1])
NOTHING = samplers.History(jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
GOLDEN = np.load(pathlib.Path(__file__).with_name("sampler_golden.npz"))


draw_each = jax.jit(lambda sampler, logits, keys: sampler(logits, keys, NOTHING))  # one program for a chain of filters


def draws(sampler, probabilities=PROBABILITIES, count=20_000):
    logits = jnp.broadcast_to(jnp.log(probabilities), (count, len(probabilities)))
    keys = jax.random.split(jax.random.key(0), count)
    return np.bincount(draw_each(sampler, logits, keys), minlength=len(probabilities))


def renormalized(keep, power=1.0):
    p = np.where(keep, PROBABILITIES**power, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0}, np.array([1.0, 0, 0, 0])),
        ({"temperature": 0.5}, renormalized([1, 1, 1, 1], 2)),
        ({"temperature": 2.0}, renormalized([1, 1, 1, 1], 0.5)),
        ({"top_k": 2}, renormalized([1, 1, 0, 0])),
        ({"top_k": 9}, PROBABILITIES),
        ({"top_p": 0.69}, renormalized([1, 1, 0, 0])),
        ({"top_p": 0.71}, renormalized([1, 1, 1, 0])),
        ({"top_p": 0.01}, renormalized([1, 0, 0, 0])),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.5}, renormalized([1, 0, 0, 0])),
        ({"min_p": 0.45}, renormalized([1, 1, 1, 0])),
        ({"min_p": 1.0}, renormalized([1, 0, 0, 0])),
        # The entropy is 1.28 nats: 0.3 (1.20) is the most typical, then 0.2 (1.61), 0.4 (0.92), 0.1 (2.30).
        ({"typical_p": 0.29}, renormalized([0, 1, 0, 0])),
        ({"typical_p": 0.45}, renormalized([0, 1, 1, 0])),
        ({"typical_p": 0.55}, renormalized([1, 1, 1, 0])),
        ({"epsilon": 0.15}, renormalized([1, 1, 1, 0])),
        ({"epsilon": 0.9}, renormalized([1, 0, 0, 0])),
        # min(0.4, sqrt(0.4) exp(-1.28)) = 0.176
        ({"eta": 0.4}, renormalized([1, 1, 1, 0])),
    ],
    ids=str,
)
def test_samplers_have_the_support_and_the_frequencies(options, expected):
    counts = draws(DecodingOptions(**options).sampler())
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(expected))
    kept = expected > 0
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept], counts.sum() * expected[kept]).pvalue > 1e-3


def test_draws_over_many_blocks_have_their_frequencies():
    draw = np.random.default_rng(1)
    probabilities = draw.dirichlet(np.full(1000, 0.05))
    probabilities[200:600] = 0  # a block of nothing
    probabilities /= probabilities.sum()
    counts = draws(samplers.Sampler(), probabilities, 60_000)
    assert counts[200:600].sum() == 0
    often = probabilities * counts.sum() >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(probabilities[often], probabilities[~often].sum()) * counts.sum()
    assert stats.chisquare(observed, expected).pvalue > 1e-3


last_stage = jax.jit(lambda sampler, logits, history: sampler.stages(logits, history)[-1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("all_filters", [False, True])
def test_filters_are_those_of_transformers(name, all_filters):
    ids, lengths, logits = tokens_and_logits()
    history = samplers.History(jnp.asarray(ids), jnp.asarray(lengths), jnp.asarray(lengths))
    ours = np.asarray(last_stage(CASES[name][0].sampler(all_filters), jnp.asarray(logits), history))
    all_banned = np.isinf(GOLDEN[name]).all(-1)
    assert not all_banned.any()
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(GOLDEN[name]))
    np.testing.assert_allclose(ours, GOLDEN[name], rtol=1e-5, atol=1e-6)


def test_the_chain_runs_in_the_order_that_is_promised():
    chain = DecodingOptions(
        logit_bias=((1, 2.0),), repetition_penalty=2.0, presence_penalty=1.0, no_repeat_ngram=3, temperature=0.5,
        top_k=3, top_p=0.9, min_p=0.1, typical_p=0.9, epsilon=0.01, eta=0.01,
    )  # fmt: skip
    names = [type(f).__name__ for f in chain.sampler().filters]
    assert names == [
        "Bias", "Repetition", "PresenceFrequency", "NoRepeatNgram", "Temperature",
        "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta",
    ]  # fmt: skip


best = jax.jit(lambda one, logits: one(logits, NOTHING))


@settings(max_examples=60)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=40), st.integers(1, 45), st.floats(0.01, 1.0))
def test_top_k_and_top_p_keep_what_sorting_would(values, k, p):
    logits = np.asarray(values + [-np.inf] * (40 - len(values)), np.float32)[None]
    kept = np.isfinite(np.asarray(best(samplers.TopK(k), logits)))[0, : len(values)]
    logits = logits[:, : len(values)]
    assert (kept == (logits[0] >= np.sort(logits[0])[::-1][min(k, len(values)) - 1])).all()
    probabilities = np.exp(logits[0].astype(np.float64)) / np.exp(logits[0].astype(np.float64)).sum()
    padded = np.pad(logits, ((0, 0), (0, 40 - len(values))), constant_values=-np.inf)
    kept = np.isfinite(np.asarray(best(samplers.TopP(p), padded)))[0, : len(values)]
    assert kept.any() and (logits[0][kept].min() > logits[0][~kept].max(initial=-np.inf))
    above = kept & (logits[0] > logits[0][kept].min())
    assert probabilities[kept].sum() >= p - 1e-5 and probabilities[above].sum() < p + 1e-5


def test_presence_and_frequency_count_what_was_drawn_and_not_the_prompt():
    history = samplers.History(jnp.asarray([[0, 0, 1, 2, 1, 3]]), jnp.asarray([5]), jnp.asarray([2]))
    found = penalties.PresenceFrequency(0.5, 0.25)(jnp.zeros((1, 4)), history)
    np.testing.assert_allclose(found, [[0.0, -1.0, -0.75, 0.0]])  # 1 came twice, 2 once, 3 lies past the end


def test_repetition_leaves_out_what_lies_past_the_end():
    history = samplers.History(jnp.asarray([[0, 3]]), jnp.asarray([1]), jnp.asarray([1]))
    found = penalties.Repetition(2.0)(jnp.asarray([[4.0, 1.0, -1.0, 3.0]]), history)
    np.testing.assert_allclose(found, [[2.0, 1.0, -1.0, 3.0]])


def test_no_repeat_ngram_removes_no_token_if_it_would_remove_all():
    history = samplers.History(jnp.asarray([[0, 1]]), jnp.asarray([2]), jnp.asarray([2]))
    np.testing.assert_allclose(penalties.NoRepeatNgram(1)(jnp.asarray([[1.0, 2.0]]), history), [[1.0, 2.0]])


@pytest.mark.parametrize(
    "pair",
    [
        ({"top_k": 3}, {"top_k": 40}), ({"top_p": 0.3}, {"top_p": 0.9}), ({"typical_p": 0.3}, {"typical_p": 0.9}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram": 3}), ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.5}),
        ({"logit_bias": ((1, 2.0),)}, {"logit_bias": ((5, -2.0),)}),
    ],
    ids=str,
)  # fmt: skip
def test_other_numbers_do_not_compile_again(pair):
    ids, lengths, logits = tokens_and_logits()
    history = samplers.History(jnp.asarray(ids), jnp.asarray(lengths), jnp.asarray(lengths))
    compiled = jax.jit(lambda sampler, logits: sampler.stages(logits, history)[-1])
    first, second = (np.asarray(compiled(DecodingOptions(**options).sampler(), logits)) for options in pair)
    assert compiled._cache_size() == 1 and (first != second).any()


ALL = (
    {"temperature": 0}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.5, "min_p": 0.2}, {"typical_p": 0.5, "eta": 0.3},
    {"epsilon": 0.2, "repetition_penalty": 2}, {"presence_penalty": 1, "no_repeat_ngram": 1},
    {"logit_bias": ((5, -2.0), (7, 1.0))}, {"temperature": 0, "frequency_penalty": 0.5}, {},
)  # fmt: skip


def test_a_sampler_with_all_filters_draws_the_same_and_compiles_once():
    ids, lengths, logits = tokens_and_logits()
    history = samplers.History(jnp.asarray(ids), jnp.asarray(lengths), jnp.asarray(lengths))
    keys = jax.random.split(jax.random.key(3), len(ids))
    draw = jax.jit(lambda sampler: sampler(jnp.asarray(logits), keys, history))
    log_probabilities = jax.jit(lambda sampler: sampler.log_probabilities(jnp.asarray(logits), history))
    drawn, logs = [], []
    for options in ALL:
        drawn.append(np.asarray(draw(DecodingOptions(**options).sampler(all_filters=True))))
        logs.append(np.asarray(log_probabilities(DecodingOptions(**options).sampler(all_filters=True))))
    assert draw._cache_size() == log_probabilities._cache_size() == 1
    for options, ids, some in zip(ALL, drawn, logs, strict=True):
        sampler = DecodingOptions(**options).sampler()
        np.testing.assert_array_equal(ids, draw(sampler))
        np.testing.assert_allclose(some, log_probabilities(sampler), atol=1e-6)
    assert len({tuple(ids) for ids in drawn}) > 4


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1},
        {"top_k": 51, "contrastive": 0.5}, {"epsilon": 2},
        {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"typical_p": 0},
        {"repetition_penalty": 0}, {"no_repeat_ngram": -1}, {"max_new_tokens": 0}, {"seed": -1}, {"seed": 2**32},
        {"stop": ("",)}, {"eos": (50,)}, {"logit_bias": ((50, 1.0),)}, {"logit_bias": ((1, float("nan")),)},
        {"truncate": "middle"}, {"alternatives": 51}, {"n": 0},
        {"temperature": 1e-40}, {"top_p": 1e-40}, {"presence_penalty": 1e39}, {"logit_bias": ((1, 1e39),)},
        {"temperature": 0, "top_k": 3}, {"temperature": 0, "min_p": 0.1}, {"temperature": 0, "n": 2},
        {"beams": 2, "temperature": 0.5}, {"beams": 2, "top_p": 0.5}, {"beams": 2, "n": 3},
        {"beams": 2, "seed": 3}, {"beams": 3, "beam_groups": 2}, {"diversity": 1.0, "beams": 2}, {"early_stop": True},
        {"length_penalty": 2.0}, {"beams": 2, "draft": "prompt"}, {"contrastive": 0.6}, {"draft_tokens": 3},
        {"top_p": 0.5, "contrastive": 0.6, "top_k": 4}, {"alternatives": 3, "beams": 2},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_or_against_each_other_are_refused(bad):
    with pytest.raises(UserError, match=f"--{next(iter(bad))}"):
        DecodingOptions(**bad).check(vocab_size=50)


def test_top_k_above_the_vocabulary_is_accepted():
    DecodingOptions(top_k=51).check(vocab_size=50)


@pytest.mark.parametrize(
    "good",
    [{}, {"temperature": 0, "repetition_penalty": 1.2}, {"beams": 4, "n": 4, "beam_groups": 2, "diversity": 0.5},
     {"contrastive": 0.6, "top_k": 4}, {"draft": "prompt", "top_p": 0.9}, {"top_k": 50}],
    ids=str,
)  # fmt: skip
def test_options_that_go_together_are_taken(good):
    DecodingOptions(**good).check(vocab_size=50)


@pytest.mark.parametrize("bad", ["", "3", "a:1", "1:b", "1.5:2"])
def test_an_invalid_bias_is_rejected(bad):
    with pytest.raises(UserError, match="ID:BIAS"):
        parse_bias(bad)


def test_a_bias_is_read():
    assert parse_bias("42:-5") == (42, -5.0)
