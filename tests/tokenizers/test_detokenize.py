"""A continuation is what the whole text has beyond the prompt's, and a stream is the text of the unstreamed call."""

import random

import hypothesis
import hypothesis.strategies as st
import pytest

from llm_jax.tokenizers import detokenize
from tests.tokenizers import forms

TEXTS = st.text(st.sampled_from("theca sorn.\n\té漢😀▁"), max_size=20)
FAST = hypothesis.settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module", params=forms.FORMS)
def tokenizer(request):
    return forms.form(request.param)


@pytest.mark.parametrize("name", forms.SENTENCEPIECE)
def test_a_continuation_keeps_its_first_space(name):
    tokenizer = forms.form(name)
    for prompt, new in (("the cat", " sat on"), ("the cat", " "), ("hello\n", "    return x"), ("the c", "at sat")):
        begin, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + new)
        if ids[: len(begin)] == begin:
            assert detokenize.after(tokenizer, begin).text(ids[len(begin) :]) == new
    ids = tokenizer.encode("the cat sat")
    after = detokenize.after(tokenizer, ids[:2])
    assert tokenizer.decode(ids[:2]) + after.text(ids[2:]) == "the cat sat"


def ids_of(tokenizer, text, seed):
    """Ids of a text, and a few of any ids among them: models generate what no text encodes to."""
    draw = random.Random(seed)
    ids = tokenizer.encode(text)
    for _ in range(seed % 4):
        ids.insert(draw.randrange(len(ids) + 1), draw.randrange(tokenizer.vocab_size))
    return ids


@FAST
@hypothesis.given(text=TEXTS, seed=st.integers(0, 10_000), cut=st.integers(0, 40))
@hypothesis.example(text="the 😀é漢", seed=0, cut=3)
@hypothesis.example(text="the 😀é漢", seed=0, cut=5)
@hypothesis.example(text="the cat sat on the mat. " * 20 + "é漢😀", seed=0, cut=200)
def test_prompt_and_continuation_are_the_whole_text(tokenizer, text, seed, cut):
    ids = ids_of(tokenizer, text, seed)
    prompt, new = ids[:cut], ids[cut:]
    whole, before = tokenizer.decode(ids), tokenizer.decode(prompt)
    expected = whole[len(detokenize.common_prefix(before, whole)) :]
    assert detokenize.after(tokenizer, prompt).text(new) == expected


@FAST
@hypothesis.given(text=TEXTS, seed=st.integers(0, 10_000), cut=st.integers(0, 10), step=st.integers(1, 5))
@hypothesis.example(text="the 😀é漢", seed=0, cut=0, step=1)
@hypothesis.example(text="a😀", seed=0, cut=1, step=1)
def test_the_stable_prefix_is_never_changed(tokenizer, text, seed, cut, step):
    ids = ids_of(tokenizer, text, seed)
    decode, new = detokenize.after(tokenizer, ids[:cut]), ids[cut:]
    shown = ""
    for count in range(0, len(new) + 1, step):
        settled = decode.stable_prefix(new[:count])
        assert settled.startswith(shown)
        shown = settled
    assert decode.text(new).startswith(shown)


@pytest.mark.parametrize("name", forms.FORMS)
def test_a_stream_is_not_held_back_to_its_end(name):
    tokenizer = forms.form(name)
    ids = tokenizer.encode("the cat sat on the mat. a dog ran")
    decode = detokenize.after(tokenizer, ids[:1])
    for count in range(len(ids)):
        assert decode.stable_prefix(ids[1:count]) == decode.text(ids[1:count])


def test_a_long_prompt_is_not_decoded_with_every_token():
    tokenizer = forms.form("model")
    ids = tokenizer.encode("the cat sat on the mat. " * 100)
    assert len(detokenize.after(tokenizer, ids).context) < 30
