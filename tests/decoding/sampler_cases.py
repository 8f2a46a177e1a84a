"""Decoding options, each with the equivalent class of transformers and its arguments."""

import numpy as np

from llm_jax.decoding.options import DecodingOptions

CASES = {
    "temperature": (DecodingOptions(temperature=0.7), "TemperatureLogitsWarper", {"temperature": 0.7}),
    "top_k": (DecodingOptions(top_k=7), "TopKLogitsWarper", {"top_k": 7}),
    "top_k_1": (DecodingOptions(top_k=1), "TopKLogitsWarper", {"top_k": 1}),
    "top_p": (DecodingOptions(top_p=0.9), "TopPLogitsWarper", {"top_p": 0.9}),
    "top_p_small": (DecodingOptions(top_p=0.05), "TopPLogitsWarper", {"top_p": 0.05}),
    "min_p": (DecodingOptions(min_p=0.1), "MinPLogitsWarper", {"min_p": 0.1}),
    "typical": (DecodingOptions(typical_p=0.6), "TypicalLogitsWarper", {"mass": 0.6}),
    "typical_small": (DecodingOptions(typical_p=0.1), "TypicalLogitsWarper", {"mass": 0.1}),
    "epsilon": (DecodingOptions(epsilon=0.02), "EpsilonLogitsWarper", {"epsilon": 0.02}),
    "epsilon_all": (DecodingOptions(epsilon=0.99), "EpsilonLogitsWarper", {"epsilon": 0.99}),
    "eta": (DecodingOptions(eta=0.05), "EtaLogitsWarper", {"epsilon": 0.05}),
    "repetition": (DecodingOptions(repetition_penalty=1.3), "RepetitionPenaltyLogitsProcessor", {"penalty": 1.3}),
    "no_repeat_1": (DecodingOptions(no_repeat_ngram=1), "NoRepeatNGramLogitsProcessor", {"ngram_size": 1}),
    "no_repeat_2": (DecodingOptions(no_repeat_ngram=2), "NoRepeatNGramLogitsProcessor", {"ngram_size": 2}),
    "no_repeat_3": (DecodingOptions(no_repeat_ngram=3), "NoRepeatNGramLogitsProcessor", {"ngram_size": 3}),
    "bias": (
        DecodingOptions(logit_bias=((3, 2.5), (40, -7.0))),
        "SequenceBiasLogitsProcessor",
        {"sequence_bias": {(3,): 2.5, (40,): -7.0}},
    ),
}


def tokens_and_logits():
    """ids int32 (8, 24) of few kinds, so that n-grams repeat; lengths (8,); logits float32 (8, 50), flat to steep."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 4, (8, 24)).astype(np.int32)
    lengths = draw.integers(2, 25, 8).astype(np.int32)
    logits = (draw.normal(size=(8, 50)) * np.linspace(0.1, 6, 8)[:, None]).astype(np.float32)
    return ids, lengths, logits
