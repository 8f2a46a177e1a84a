import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import lora
from llm_jax.decoding import loop
from llm_jax.decoding.options import DecodingOptions
from llm_jax.decoding.prefix import PrefixCache, cached_ids, common_length
from tests.lora import cases

SYSTEM, QUESTION, NEXT = list(range(10, 22)), [30, 31, 32, 33], [40, 41, 42, 43, 44, 45, 46]
KINDS = {
    "rope, int8, local": ({"kind": "rope"}, {"kv_cache": "int8", "layer_pattern": ("local", "global"), "window": 5}),
    "dynamic rope": (
        {"kind": "rope", "scaling": "dynamic", "scaling_factor": 2.0, "original_length": 20},
        {"num_layers": 1},
    ),
    "shaw": ({"kind": "shaw"}, {}),
    **{kind: ({"kind": kind}, {"kv_cache": "int8"}) for kind in ("alibi", "learned", "none", "sinusoidal", "t5")},
}
IN_THE_GATE = ("rope, int8, local", "dynamic rope")


@pytest.fixture(params=[kind if kind in IN_THE_GATE else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def model_and_params(request, make, tiny):
    position, changes = KINDS[request.param]
    return make(position=dataclasses.replace(tiny.model.position, **position), scan_layers=False, **changes)


def test_answers_are_those_without_a_prefix_and_only_new_tokens_are_prefilled(model_and_params):
    """Over three requests: a longer one, which makes the cache larger, and one that leaves an earlier answer out."""
    model, params = model_and_params
    sampler = DecodingOptions(repetition_penalty=1.3).sampler()
    prefix, prompt = PrefixCache(), [*SYSTEM, *QUESTION]

    def answer():
        (alone,) = loop.generate(model, params, [prompt], sampler, max_new_tokens=12)
        (row,) = loop.generate(model, params, [prompt], sampler, max_new_tokens=12, prefix=prefix)
        assert row.ids == alone.ids
        np.testing.assert_allclose(row.log_probabilities, alone.log_probabilities, atol=2e-5)
        return row.ids

    first = answer()
    assert (prefix.reused, prefix.prefilled) == (0, len(prompt))
    prompt = [*SYSTEM, *QUESTION, *first, *NEXT, *NEXT]
    answer()
    # The last token of an answer was drawn, and not computed.
    assert prefix.prefilled == 1 + 2 * len(NEXT) and prefix.reused == len(prompt) - prefix.prefilled
    prompt = [*SYSTEM, *NEXT]
    answer()
    # With dynamic scaling the cached keys are those of a longer text.
    shorter = 0 if model.config.position.scaling == "dynamic" else len(SYSTEM)
    assert (prefix.reused, prefix.prefilled) == (shorter, len(prompt) - shorter)
    answer()
    reused = 0 if model.config.position.scaling == "dynamic" else len(prompt) - 1  # the last one is for its logits
    assert (prefix.reused, prefix.prefilled) == (reused, len(prompt) - reused)


def test_an_interrupted_request_leaves_a_usable_prefix(make):
    model, params = make(scan_layers=False)
    prefix, sampler = PrefixCache(), DecodingOptions(temperature=0).sampler()

    def interrupt(rows):
        if len(rows[0].ids) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.generate(model, params, [SYSTEM], sampler, max_new_tokens=8, watch=interrupt, prefix=prefix)
    (row,) = loop.generate(model, params, [SYSTEM], sampler, max_new_tokens=8, prefix=prefix)
    (alone,) = loop.generate(model, params, [SYSTEM], sampler, max_new_tokens=8)
    assert prefix.reused == 0 and row.ids == alone.ids
    np.testing.assert_allclose(row.log_probabilities, alone.log_probabilities, atol=2e-5)
    (ended,) = loop.generate(
        model, params, [SYSTEM], sampler, max_new_tokens=8, watch=lambda rows: len(rows[0].ids) == 3, prefix=prefix
    )
    assert ended.ids == row.ids[:3] and prefix.reused == len(SYSTEM) - 1
    assert cached_ids(prefix._state) == [*SYSTEM, *row.ids[:2]]


def test_other_adapters_over_one_base_reuse_nothing_of_a_prefix(make, tiny):
    """The keys and values in the cache are those of the adapters before."""
    model, base = make(scan_layers=False, num_layers=1)
    combined = lora.combine(cases.made(base, cases.config(tiny)))
    adapted, plain = (lora.attach(base, lora.mix(combined, jnp.array([weight]))) for weight in (1.0, 0.0))
    prefix, sampler = PrefixCache(), DecodingOptions(temperature=0).sampler()
    for params, reused in (
        (adapted, 0),
        (adapted, len(SYSTEM) - 1),
        (plain, 0),
        (plain, len(SYSTEM) - 1),
        (adapted, 0),
    ):
        (alone,) = loop.generate(model, params, [SYSTEM], sampler, max_new_tokens=8, prefix=PrefixCache())
        (row,) = loop.generate(model, params, [SYSTEM], sampler, max_new_tokens=8, prefix=prefix)
        assert (row.ids, prefix.reused) == (alone.ids, reused)
        np.testing.assert_allclose(row.log_probabilities, alone.log_probabilities, atol=2e-5)


@pytest.mark.parametrize(("a", "b", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 4, 3], 1)])
def test_common_length(a, b, length):
    assert common_length(a, b) == common_length(b, a) == length
