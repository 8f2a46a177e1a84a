import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.decoding import compiled, loop
from llm_jax.decoding.compiled import _MODELS
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError


@pytest.fixture(params=["rope", "learned", "alibi"])
def model_and_params(request, make, tiny):
    return make(position=dataclasses.replace(tiny.model.position, kind=request.param), scan_layers=False)


def plain_greedy(model, params, prompt, count, length=64):
    """The whole sequence anew for every token, without a cache."""
    forward = jax.jit(lambda p, ids: model.apply({"params": p}, ids))
    ids, logs = list(prompt), []
    for _ in range(count):
        padded = jnp.asarray([ids + [0] * (length - len(ids))])  # what comes after is not seen
        logits = forward(params, padded)[0, len(ids) - 1]
        ids.append(int(jnp.argmax(logits)))
        logs.append(float(jax.nn.log_softmax(logits)[ids[-1]]))
    return ids[len(prompt) :], logs


def test_batched_cached_bucketed_greedy_equals_the_plain_loop(model_and_params):
    model, params = model_and_params
    prompts = [[5], [7, 8, 9, 10, 11], list(range(20, 60))]
    made = loop.generate(model, params, prompts, DecodingOptions(temperature=0).sampler(), max_new_tokens=6)
    for prompt, one in zip(prompts, made, strict=True):
        ids, logs = plain_greedy(model, params, prompt, 6)
        assert one.ids == ids and one.stop == "length"
        np.testing.assert_allclose(one.log_probabilities, logs, atol=1e-4)


def test_eos_ends_a_row_and_not_its_neighbours(make):
    model, params = make(scan_layers=False)
    free = loop.generate(model, params, [[5], [9]], DecodingOptions().sampler(), max_new_tokens=8, seeds=[1, 2])
    eos = free[0].ids[2]
    cut = loop.generate(model, params, [[5], [9]], DecodingOptions().sampler(), max_new_tokens=8, eos=eos, seeds=[1, 2])
    first = free[0].ids.index(eos)
    assert (cut[0].ids, cut[0].stop) == (free[0].ids[:first], "eos")
    if eos not in free[1].ids:
        assert (cut[1].ids, cut[1].stop) == (free[1].ids, "length")


def test_a_rows_text_depends_on_its_seed_only(make):
    model, params = make(scan_layers=False)
    alone = loop.generate(model, params, [[5, 6]], DecodingOptions().sampler(), max_new_tokens=8, seeds=[3])
    among = loop.generate(
        model, params, [[9], [5, 6], [7]], DecodingOptions().sampler(), max_new_tokens=8, seeds=[1, 3, 2]
    )
    other = loop.generate(model, params, [[5, 6]], DecodingOptions().sampler(), max_new_tokens=8, seeds=[4])
    assert among[1].ids == alone[0].ids != other[0].ids


def test_other_lengths_and_settings_do_not_compile_again(make):
    model, params = make(scan_layers=False)

    def call(length, count, **options):
        sampler = DecodingOptions(**options).sampler(all_filters=True)
        loop.generate(model, params, [[5] * length], sampler, max_new_tokens=count)

    def sizes():
        functions = [f.of_model(model) for f in (loop.prefill_and_draw, loop.advance)]
        return [function._cache_size() for function in functions]

    call(3, 4, temperature=0.5, top_p=0.9)
    before = sizes()
    assert min(before) > 0
    call(30, 31, temperature=0.7, top_k=8)
    call(1, 1, temperature=0, repetition_penalty=1.2, logit_bias=((3, 1.0),))
    assert sizes() == before


def test_one_token_needs_no_loop(make):
    """The prefill draws the first token: its time is that of one compilation, and of one pass through the model."""
    model, params = make(scan_layers=False)
    model = model.clone(config=dataclasses.replace(model.config, norm_eps=1.5e-5))  # not compiled by another test
    sampler = DecodingOptions().sampler()
    (first,) = loop.generate(model, params, [[5, 6]], sampler, max_new_tokens=1)
    assert loop.advance.of_model(model)._cache_size() == 0
    (several,) = loop.generate(model, params, [[5, 6]], sampler, max_new_tokens=4)
    assert loop.advance.of_model(model)._cache_size() == 1 and len(first.ids) == 1
    assert (several.ids[:1], several.log_probabilities[:1]) == (first.ids, first.log_probabilities)
    (ended,) = loop.generate(model, params, [[5, 6]], sampler, max_new_tokens=4, eos=first.ids[0])
    assert (ended.ids, ended.stop, ended.log_probabilities) == ([], "eos", first.log_probabilities)


@pytest.mark.uncached  # the cache of the tests keeps executables in memory
def test_compiled_code_of_many_geometries_does_not_stay_in_memory(make):
    """Executables of the models of a sweep are freed, but for those of the last few."""

    def alive():
        gc.collect()
        return len(jax.devices()[0].client.live_executables())

    counts = {}
    for size in range(_MODELS + 6):
        model, _ = make(scan_layers=False)
        model = model.clone(config=dataclasses.replace(model.config, norm_eps=1e-5 * (size + 2)))
        assert int(add_width(model, jnp.int32(1))) == 1 + model.config.width
        if size in (0, _MODELS - 1, _MODELS, _MODELS + 5):  # to collect garbage takes a third of a second
            counts[size] = alive()
    assert counts[_MODELS - 1] - counts[0] == _MODELS - 1  # each model has code of its own
    assert max(counts[_MODELS], counts[_MODELS + 5]) <= counts[_MODELS - 1] + 1


@compiled.jit()
def add_width(model, x):
    return x + model.config.width


@pytest.mark.parametrize(("prompts", "count"), [([[]], 4), ([[5], []], 4), ([[259]], 4), ([[5]], 0), ([], 4)])
def test_bad_requests_are_refused(make, prompts, count):
    model, params = make(scan_layers=False)
    with pytest.raises(UserError):
        loop.generate(model, params, prompts, DecodingOptions().sampler(), max_new_tokens=count)


def test_generating_past_a_learned_table_is_refused(make, tiny):
    model, params = make(
        position=dataclasses.replace(tiny.model.position, kind="learned", max_length=8), scan_layers=False
    )
    with pytest.raises(UserError, match="exceed the 8 positions"):
        loop.generate(model, params, [[5] * 5], DecodingOptions().sampler(), max_new_tokens=4)
    assert loop.generate(model, params, [[5] * 5], DecodingOptions().sampler(), max_new_tokens=3)[0].ids


def test_padding_to_a_bucket_stays_within_a_learned_table(make, tiny):
    position = dataclasses.replace(tiny.model.position, kind="learned", max_length=16)  # less than a bucket
    model, params = make(position=position, scan_layers=False)
    prompts = [[5, 6, 7], [8] * 12]
    made = loop.generate(model, params, prompts, DecodingOptions(temperature=0).sampler(), max_new_tokens=4)
    for prompt, one in zip(prompts, made, strict=True):
        ids, logs = plain_greedy(model, params, prompt, 4, length=16)
        assert one.ids == ids
        np.testing.assert_allclose(one.log_probabilities, logs, atol=1e-4)


def test_ids_past_the_tokenizers_vocabulary_are_never_drawn(make):
    model, params = make(scan_layers=False)
    (one,) = loop.generate(
        model, params, [[5]], DecodingOptions(temperature=50.0).sampler(), max_new_tokens=200, vocab_size=9
    )
    assert max(one.ids) < 9


def test_log_probabilities_sum_to_the_score_of_the_sequence_eos_included(make):
    model, params = make(scan_layers=False)
    free = loop.generate(model, params, [[5]], DecodingOptions().sampler(), max_new_tokens=8)[0].ids
    eos = free[4]
    (one,) = loop.generate(model, params, [[5]], DecodingOptions().sampler(), max_new_tokens=8, eos=eos)
    ids = [5, *one.ids, eos]
    scores = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, jnp.asarray([ids]))[0])
    expected = sum(float(scores[t, ids[t + 1]]) for t in range(len(ids) - 1))
    assert len(one.log_probabilities) == len(one.ids) + 1
    np.testing.assert_allclose(sum(one.log_probabilities), expected, atol=1e-4)


@pytest.mark.parametrize("seeds", [[-1], [2**32], [1, 2]])
def test_bad_seeds_are_refused(make, seeds):
    model, params = make(scan_layers=False)
    with pytest.raises(UserError, match="seeds"):
        loop.generate(model, params, [[5]], DecodingOptions().sampler(), max_new_tokens=2, seeds=seeds)
