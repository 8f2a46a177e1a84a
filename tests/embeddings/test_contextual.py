"""Vectors in context: layer by layer, padded or not; the real MiniLM beside transformers (make_minilm_golden.py)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoints, tokenizers
from llm_jax.checkpoints import Loaded
from llm_jax.embeddings import contextual
from llm_jax.errors import UserError

GOLDEN = json.loads(pathlib.Path(__file__).with_name("minilm_golden.json").read_text())["cases"]
TEXTS = ["a bank", "the bank of a river", "x" * 40, "b"]


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def loaded(make, request):
    changes = {"causal": True} if request.param == "decoder" else {"causal": False, "norm_placement": "post"}
    model, params = make(scan_layers=False, **changes)
    return Loaded(model, params, tokenizers.get("byte").train([], 0))


def test_the_last_layer_is_what_the_head_reads_and_the_first_the_embeddings(loaded):
    features_of = jax.jit(lambda params, tokens: loaded.model.apply({"params": params}, tokens, method="features"))
    for text, layers in zip(TEXTS, contextual.token_vectors(loaded, TEXTS), strict=True):
        ids = contextual.ids(loaded, text)
        assert ids[0] == loaded.tokenizer.bos and layers.shape == (3, len(ids), 32)
        features, _ = features_of(loaded.params, jnp.asarray([ids]))
        np.testing.assert_allclose(layers[-1], features[0], atol=1e-5)
        table = np.asarray(loaded.params["embed"]["table"])
        np.testing.assert_allclose(layers[0], table[ids], atol=1e-6)


def test_the_middle_layer_is_that_of_a_model_cut_there(make):
    post = {"causal": False, "norm_placement": "post", "scan_layers": False}
    (whole, params), (cut, _) = make(**post), make(**post, num_layers=1)
    tokenizer, text = tokenizers.get("byte").train([], 0), TEXTS[1]
    one = {**params, "layers": {"0": params["layers"]["0"]}}
    ours = contextual.token_vectors(Loaded(whole, params, tokenizer), [text])[0]
    np.testing.assert_allclose(ours[1], contextual.token_vectors(Loaded(cut, one, tokenizer), [text])[0][1], atol=1e-5)


def test_a_decoder_sees_back_and_an_encoder_both_ways(loaded):
    one, other = contextual.token_vectors(loaded, ["the bank of a river", "the bank of a rivet"])
    same = np.abs(one[-1][:-1] - other[-1][:-1]).max()
    assert (same < 1e-6) == loaded.model.config.causal
    np.testing.assert_array_equal(one[0][:-1], other[0][:-1])  # a table knows no context


def test_sentences_are_pooled_whatever_stands_beside_them(loaded):
    for pool in contextual.POOLS:
        for layer in (0, 1, -1):
            together = contextual.sentence_vectors(loaded, TEXTS * 20, layer, pool)
            alone = contextual.sentence_vectors(loaded, TEXTS[1:2], layer, pool)
            np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    plain = contextual.sentence_vectors(loaded, TEXTS, normalize=False)
    np.testing.assert_allclose(plain[1], contextual.token_vectors(loaded, TEXTS)[1][-1].mean(0), atol=1e-6)


def test_token_ids_replace_a_text_and_get_no_special_tokens(loaded):
    ids = [contextual.ids(loaded, text) for text in TEXTS]
    for layer in (0, 1, -1):
        of_texts, of_ids = (contextual.sentence_vectors(loaded, rows, layer) for rows in (TEXTS, ids))
        np.testing.assert_array_equal(of_ids, of_texts)
    assert [len(layers[0]) for layers in contextual.token_vectors(loaded, [row[1:] for row in ids])] == [
        len(row) - 1 for row in ids
    ]
    with pytest.raises(UserError, match="no tokens"):
        contextual.sentence_vectors(loaded, [[1], []])


def test_unsupported_requests_are_one_line_errors(loaded):
    for wrong in ({"layer": 3}, {"layer": -4}, {"pool": "max"}):
        with pytest.raises(UserError, match="layer=|'pool'"):
            contextual.sentence_vectors(loaded, TEXTS, **wrong)


@pytest.mark.slow  # fetches 80 MB once
def test_minilm_equals_transformers():
    loaded = checkpoints.load("asset:minilm-l6-v2")
    sentences = [case["sentence"] for case in GOLDEN]
    for case, layers in zip(GOLDEN, contextual.token_vectors(loaded, sentences), strict=True):
        assert contextual.ids(loaded, case["sentence"]) == case["ids"]
        np.testing.assert_allclose(layers[:, :, :8], case["layers"], atol=1e-4)
    vectors = contextual.sentence_vectors(loaded, sentences)
    np.testing.assert_allclose(vectors, [case["vector"] for case in GOLDEN], atol=1e-4)
