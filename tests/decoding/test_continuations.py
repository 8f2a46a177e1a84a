"""Texts of `complete` by every form of vocabulary: what is added to the prompt, streams, stop strings, special tokens.

Given ids play the model's part; they go through the loop, the stop strings and the stream as generated ones do.
"""

import dataclasses
import random
import types

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.decoding import loop
from llm_jax.decoding.complete import complete
from llm_jax.decoding.continuations import run
from llm_jax.decoding.options import DecodingOptions
from llm_jax.training import evaluator
from tests.tokenizers import forms

TEXTS = st.text(st.sampled_from("theca sorn.\n\té漢😀"), min_size=1, max_size=20)
STOPS = st.lists(st.text(st.sampled_from("the c\né😀"), min_size=1, max_size=3), max_size=2)


@dataclasses.dataclass(frozen=True)
class Replayed:
    """The fields of a state that `continuations.run` reads."""

    ids: jnp.ndarray
    log_probabilities: jnp.ndarray
    alternative_ids: jnp.ndarray
    alternative_logs: jnp.ndarray
    count: jnp.ndarray
    done: jnp.ndarray


def replay(model, params, rows, *, continuations, max_new_tokens, eos, stop, watch=None, **_):
    """Stands in for `loop.generate`: the "generated" ids of each row are those of `continuations`."""
    n = len(rows)
    ids = np.zeros((n, max_new_tokens), np.int32)
    ends = np.zeros(n, np.int32)
    for row, new in enumerate(continuations):
        at = next((i + 1 for i, index in enumerate(new) if index in eos), len(new))
        ids[row, :at], ends[row] = new[:at], at
    settings = loop.draw_settings(model, DecodingOptions().sampler(), [0] * n, eos)
    empty = np.zeros((n, max_new_tokens, 0))
    state = Replayed(ids, np.zeros(ids.shape), empty, empty, np.zeros(n, np.int32), np.zeros(n, bool))

    def step(state, until):
        count = np.where(state.done, state.count, np.minimum(int(until), ends))
        at_eos = np.array([int(i[c - 1]) in eos if c else False for i, c in zip(ids, count, strict=True)])
        return dataclasses.replace(state, count=count, done=np.asarray(state.done) | at_eos)

    return run(step, state, settings.eos, max_new_tokens, stop, watch)


@pytest.fixture(scope="module")
def network(make):
    return make(vocab_size=512, num_layers=1, scan_layers=False)


def ask(network, monkeypatch, tokenizer, prompt, new, stream=False, **options):
    """(the completion, the texts that were shown) of the prompt's ids where the model generates the ids `new`."""
    shown: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "generate", lambda *a, **k: replay(*a[:3], continuations=[new], **k))
        ((completion,),) = complete(
            *network,
            tokenizer,
            [prompt],
            DecodingOptions(max_new_tokens=len(new), **options),
            show=(lambda row, text: shown.append(text)) if stream else None,
        )
    return completion, shown


@pytest.mark.parametrize("name", forms.FORMS)
def test_a_continuation_with_a_stop_string_that_begins_with_a_space(network, monkeypatch, name):
    tokenizer = forms.form(name)
    prompt, ids = tokenizer.encode("the cat"), tokenizer.encode("the cat sat on the mat.")
    assert ids[: len(prompt)] == prompt
    completion, shown = ask(network, monkeypatch, tokenizer, prompt, ids[len(prompt) :], stream=True)
    assert completion.text == "".join(shown) == " sat on the mat."
    completion, shown = ask(network, monkeypatch, tokenizer, prompt, ids[len(prompt) :], stop=(" the",))
    assert (completion.text, completion.generated.stop) == (" sat on", "stop")


@hypothesis.settings(max_examples=40, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(prompt=TEXTS, text=TEXTS, stops=STOPS, seed=st.integers(0, 10_000))
@hypothesis.example(prompt="the", text=" 😀é漢x", stops=["😀"], seed=0)
@pytest.mark.parametrize("name", forms.FORMS)
def test_a_stream_is_the_text_of_the_unstreamed_call(network, monkeypatch, name, prompt, text, stops, seed):
    tokenizer, draw = forms.form(name), random.Random(seed)
    begin = tokenizer.encode(prompt)
    new = tokenizer.encode(prompt + text)[len(begin) :] or tokenizer.encode(text)
    for _ in range(seed % 4):  # ids that no text encodes to
        new.insert(draw.randrange(len(new) + 1), draw.randrange(tokenizer.vocab_size))
    stops = tuple(s for s in stops if s in tokenizer.decode(tokenizer.encode("a" + s)) and len(s) <= len(new))
    completion, shown = ask(network, monkeypatch, tokenizer, begin, new, stream=True, stop=stops)
    unstreamed, _ = ask(network, monkeypatch, tokenizer, begin, new, stop=stops)
    assert "".join(shown) == completion.text == unstreamed.text
    assert completion.generated == unstreamed.generated
    whole = tokenizer.decode(begin + completion.generated.ids)
    if completion.generated.stop != "stop" and whole.startswith(tokenizer.decode(begin)):
        assert tokenizer.decode(begin) + completion.text == whole


@pytest.mark.parametrize(("name", "token"), [("bytelevel", "<|im_end|>"), ("bytelevel", "<|im_start|>"),
                                             ("model", "</s>"), ("prepend", "<s>"), ("bpe", "<eos>")])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_special_token_as_a_stop_string_stops(network, monkeypatch, name, token, stream):
    tokenizer = forms.form(name)
    index = next(i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == token)
    prompt, yes = tokenizer.encode("the cat"), tokenizer.encode("the cat sat")
    new = [*yes[len(prompt) :], index, *tokenizer.encode(" no maybe")]
    completion, shown = ask(network, monkeypatch, tokenizer, prompt, new, stream=stream, stop=(token,), ignore_eos=True)
    assert (completion.text, completion.generated.stop) == (" sat", "stop")
    assert completion.generated.ids == new[: new.index(index) + 1] and (not stream or "".join(shown) == " sat")


def test_a_special_token_written_as_text_is_a_stop_string_too(network, monkeypatch):
    tokenizer = forms.form("bytelevel")
    new = tokenizer.encode(" sat<|im_end|> no")
    completion, _ = ask(network, monkeypatch, tokenizer, tokenizer.encode("the cat"), new, stop=("<|im_end|>",))
    assert (completion.text, completion.generated.stop) == (" sat", "stop")


def test_the_names_of_ends_end_a_text_and_the_prompt_is_decoded_with_it(network, monkeypatch):
    tokenizer = forms.form("bytelevel")  # its EOS is <|endoftext|>, and no file names <|im_end|>
    new = [*tokenizer.encode(" yes"), *tokenizer.encode_chat("<|im_end|><|im_start|>"), *tokenizer.encode(" maybe")]
    completion, _ = ask(network, monkeypatch, tokenizer, tokenizer.encode("the cat"), new)
    assert (completion.text, completion.generated.stop) == (" yes", "eos")


@pytest.mark.parametrize("form", [*forms.SENTENCEPIECE, "bytelevel"])
def test_samples_of_training_are_whole_texts(monkeypatch, form):
    tokenizer = forms.form(form)
    prompt, whole = (tokenizers.prompt(tokenizer, text) for text in ("the cat", "the cat sat on the mat"))
    options = types.SimpleNamespace(prompts=("the cat",), max_new_tokens=4)
    stub = types.SimpleNamespace(
        _local_params=lambda state: None,
        _decoder=None,
        _setup=types.SimpleNamespace(config=types.SimpleNamespace(eval=options)),
        _data=types.SimpleNamespace(tokenizer=tokenizer),
    )
    generated = [types.SimpleNamespace(ids=whole[len(prompt) :])]
    monkeypatch.setattr(evaluator.loop, "generate", lambda *_, **__: generated)
    assert evaluator.Evaluator.sample(stub, "step 1", None) == "----- step 1\nthe cat sat on the mat"
