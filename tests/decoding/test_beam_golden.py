"""Beams equal those of transformers (make_beam_golden.py): length penalty and early stopping of every kind."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from llm_jax.checkpoints import huggingface
from llm_jax.decoding import beam
from llm_jax.decoding.options import DecodingOptions
from llm_jax.model.transformer import Transformer

HERE = pathlib.Path(__file__).with_name("beam_golden")
CASES = json.loads((HERE / "cases.json").read_text())["cases"]
EOS = 1
KEYS = ("beams", "length_penalty", "early_stop", "limit")
GROUPS = sorted({tuple(c[key] for key in KEYS) for c in CASES}, key=str)


@functools.cache
def network():
    kind, config = huggingface.read_config(HERE)
    model = Transformer(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = functools.partial(jax.tree.map, lambda _: device)
    return model, huggingface.load_params(HERE, kind, config, shardings)


@pytest.mark.parametrize(("beams", "penalty", "early_stop", "limit"), GROUPS)
def test_beams_are_those_of_transformers(beams, penalty, early_stop, limit):
    cases = [c for c in CASES if tuple(c[key] for key in KEYS) == (beams, penalty, early_stop, limit)]
    options = DecodingOptions(beams=beams, n=beams, length_penalty=penalty, early_stop=early_stop, max_new_tokens=limit)
    options.check(6)
    results = beam.search(*network(), [c["prompt"] for c in cases], options, eos=EOS)
    for case, found in zip(cases, results, strict=True):
        texts = [[*b.generated.ids, EOS] if b.generated.stop == "eos" else b.generated.ids for b in found]
        assert texts == case["texts"], case["prompt"]
        np.testing.assert_allclose([b.score for b in found], case["scores"], atol=1e-4)
