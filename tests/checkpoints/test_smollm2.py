"""The GGUF file of SmolLM2-135M-Instruct: ids, logits and text equal those of transformers (make_smollm2_golden.py)."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoints, configuration
from llm_jax.decoding import loop
from llm_jax.decoding.options import DecodingOptions
from llm_jax.tokenizers import chat_template
from llm_jax.training import start

GOLDEN = json.loads(pathlib.Path(__file__).with_name("smollm2_golden.json").read_text())["cases"]
pytestmark = pytest.mark.slow  # fetches 90 MB once, and runs 135 M parameters


@pytest.fixture(scope="module")
def loaded():
    return checkpoints.load("asset:smollm2-135m-instruct")


def test_the_sentiment_recipe_has_the_model_of_init_from():
    config = start.find(configuration.load("sentiment_lora")).config
    changes = {"vocab_size": 49152, "width": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
    changes |= {"mlp_dim": 1536, "qk_norm": False, "position.base": 100000.0, "position.max_length": 8192}
    assert config.model == configuration.replace(configuration.default("model"), changes, "model.")
    assert config.tokenizer.kind == "hub" and config.tokenizer.vocab_size == 49152


def test_texts_have_the_ids_of_transformers(loaded):
    for case in GOLDEN:
        assert loaded.tokenizer.encode(case["prompt"]) == case["ids"]
        assert loaded.tokenizer.decode(case["ids"]) == case["prompt"]


def test_logits_equal_those_of_transformers(loaded):
    for case in GOLDEN:
        logits = np.asarray(loaded.model.apply({"params": loaded.params}, jnp.asarray([case["ids"]]))[0, -1])
        np.testing.assert_allclose(logits[case["top"]], case["logits"], atol=2e-3)
        assert np.argsort(-logits)[:3].tolist() == case["top"][:3]


def test_greedy_continuations_are_those_of_transformers(loaded):
    greedy = DecodingOptions(temperature=0).sampler()
    prompts = [case["ids"] for case in GOLDEN]
    made = loop.generate(loaded.model, loaded.params, prompts, greedy, max_new_tokens=64, eos=None)
    for case, one in zip(GOLDEN, made, strict=True):
        assert one.ids == case["continuation"], case["prompt"]


def test_special_tokens_in_plain_text_are_text_and_in_a_chat_are_not(loaded):
    tokenizer = loaded.tokenizer
    marked = chat_template.render(tokenizer.special, [{"role": "user", "content": "Hi"}])
    assert marked.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    start = tokenizer.encode_chat("<|im_start|>")
    assert len(start) == 1 and len(tokenizer.encode("<|im_start|>")) > 1
    assert tokenizer.decode(tokenizer.encode("<|im_start|>")) == "<|im_start|>"
    assert tokenizer.encode_chat(marked).count(start[0]) == 3
