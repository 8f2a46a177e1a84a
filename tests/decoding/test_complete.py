"""`complete`: stop strings, streaming, seeds, truncation, and the table of --explain."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import llm_jax
from llm_jax import lora, tokenizers
from llm_jax.decoding import explain, stops
from llm_jax.decoding.complete import complete, note_length, note_special, note_unknown
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers import detokenize
from llm_jax.tokenizers.byte import ByteTokenizer
from llm_jax.tokenizers.hub import HubTokenizer
from tests.lora import cases
from tests.tokenizers import forms

BYTES = ByteTokenizer()
# Letters only, so that texts are readable: every other id is made impossible.
LETTERS = tuple((i, -1e9) for i in range(259) if not 97 <= i - 3 <= 100)


@pytest.fixture(scope="module")
def ask(make):
    """ask(prompts, **options) -> completions of the tiny model with the byte tokenizer."""
    model, params = make(scan_layers=False)

    def call(prompts, show=None, **options):
        return complete(model, params, BYTES, prompts, DecodingOptions(**options), show=show)

    return call


def test_a_stop_string_ends_a_text_also_when_tokens_cut_it_and_not_its_neighbours(ask):
    common = {"logit_bias": LETTERS, "max_new_tokens": 40, "ignore_eos": True}
    free = [c[0] for c in ask(["a", "bcd"], **common)]
    stop = free[0].text[20:23]  # three tokens of the byte tokenizer; past the first look at the text
    cut = [c[0] for c in ask(["a", "bcd"], stop=(stop, "never"), **common)]
    end = free[0].text.find(stop)
    assert (cut[0].text, cut[0].generated.stop) == (free[0].text[:end], "stop")
    assert (
        cut[0].generated.ids == free[0].generated.ids[: end + 3] and len(cut[0].generated.log_probabilities) == end + 3
    )
    other = free[1].text.find(stop)
    assert cut[1].text == (free[1].text if other < 0 else free[1].text[:other])


def test_streaming_shows_the_text_piece_by_piece_and_nothing_that_changes(ask):
    for options in ({"stop": ("ab", "dd")}, {}, {"draft": "prompt"}, {"contrastive": 0.5, "top_k": 3}):
        pieces: dict[int, list[str]] = {0: [], 1: []}
        common = {"logit_bias": LETTERS, "max_new_tokens": 24, "ignore_eos": True, **options}
        made = ask(["a", "bcd"], show=lambda row, text, to=pieces: to[row].append(text), **common)
        for row in pieces:
            assert "".join(pieces[row]) == made[row][0].text
        if "stop" not in options:
            assert max(map(len, pieces.values())) > 5  # not all at the end


TEXTS = st.text(st.sampled_from("ab\n é漢😀"), max_size=12)


@given(TEXTS, st.lists(st.text(st.sampled_from("ab\né😀"), min_size=1, max_size=3), max_size=2))
@example("a😀a", ["😀", "a😀a"])  # the one that begins later is whole first
def test_streamed_text_is_final_and_valid_unicode(text, stop_strings):
    ids, shown = BYTES.encode(text), ""
    decode = detokenize.after(BYTES, BYTES.encode("é"))
    for n in range(len(ids) + 1):
        so_far = stops.showable(decode.stable_prefix(ids[:n]), stop_strings)
        assert so_far.startswith(shown) and "�" not in so_far
        shown = so_far
    whole = stops.truncate_at_stop(text, stop_strings)
    assert whole.startswith(shown) and len(whole) - len(shown) < max([1, *map(len, stop_strings)])


@given(TEXTS, st.lists(st.text(st.sampled_from("ab\né"), min_size=1, max_size=3), min_size=1, max_size=2))
def test_a_stop_is_found_at_the_token_that_completes_it(text, stop_strings):
    ids = BYTES.encode(text)
    found = stops.stop_fn(BYTES, stop_strings, 100, [[]])(0, ids, 0)
    plain = next((n for n in range(len(ids) + 1) if any(s in BYTES.decode(ids[:n]) for s in stop_strings)), None)
    assert found == plain


def test_invalid_bytes_are_shown_at_the_end_of_a_stream():
    decode, ids = detokenize.after(BYTES, []), [i + 3 for i in b"a\xffb"]
    assert [decode.stable_prefix(ids[:n]) for n in range(4)] == ["", "a", "a", "a�b"]


def test_alternatives_are_the_most_likely_tokens_of_each_step(ask):
    ((greedy,),) = ask(["a"], temperature=0, alternatives=3, max_new_tokens=5, ignore_eos=True)
    for index, log, others in zip(
        greedy.generated.ids, greedy.generated.log_probabilities, greedy.generated.alternatives, strict=True
    ):
        assert len(others) == 3 and max(others.values()) == pytest.approx(log) and index in others


def test_n_draws_are_those_of_their_seeds(ask):
    common = {"max_new_tokens": 8, "ignore_eos": True}
    three = ask(["ab"], n=3, seed=5, **common)[0]
    alone = [ask(["ab"], seed=5 + i, **common)[0][0] for i in range(3)]
    assert [t.text for t in three] == [t.text for t in alone] and len({tuple(t.generated.ids) for t in three}) == 3


def test_continuations_of_one_prompt_use_its_adapter(make, tiny):
    model, base = make(num_layers=1)
    combined = lora.combine(cases.made(base, cases.config(tiny)))

    def texts(mixture):
        params = lora.attach(base, lora.mix(combined, jnp.array(mixture)))
        made = complete(model, params, BYTES, ["ab", "ab"], DecodingOptions(n=2, seed=3, max_new_tokens=6))
        return [[one.text for one in row] for row in made]

    adapted, plain = texts([1.0]), texts([0.0])
    assert texts([[1.0], [0.0]]) == [adapted[0], plain[1]]
    assert adapted[0] != plain[0] and adapted[1] != plain[1]


def test_several_token_ids_can_end_a_text(ask):
    free = ask(["ab"], max_new_tokens=8, ignore_eos=True)[0][0].generated.ids
    cut = ask(["ab"], max_new_tokens=8, eos=(free[5], free[3]))[0][0].generated
    first = min(free.index(free[5]), free.index(free[3]))
    assert (cut.ids, cut.stop) == (free[:first], "eos")


def test_a_prompt_too_long_is_refused_or_cut_where_it_is_said(ask):
    common = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    with pytest.raises(UserError, match="7 tokens.*leaves 6.*--truncate"):
        ask(["abcdef"], context=10, **common)  # BOS is the seventh
    left, short = ask(["abcdef"], context=8, truncate="left", **common), ask([BYTES.encode("cdef")], **common)
    right, begun = ask(["abcdef"], context=8, truncate="right", **common), ask(["abc"], **common)
    assert (
        left[0][0].generated.ids == short[0][0].generated.ids and right[0][0].generated.ids == begun[0][0].generated.ids
    )
    with pytest.raises(UserError, match="fills the context"):
        ask(["a"], context=4, truncate="left", **common)


@pytest.mark.parametrize("prompts", ["ab", [3]])
def test_one_prompt_without_a_list_is_refused(ask, prompts):
    with pytest.raises(UserError, match="expected a list of texts or of lists of token ids"):
        ask(prompts)


def test_prompts_that_cannot_be_continued_are_refused(ask, make):
    with pytest.raises(UserError, match="empty"):
        ask([[]])
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        ask([[300]])
    with pytest.raises(UserError, match=r"a prompt is a list of messages; .*llm_jax.apply_chat_template"):
        ask([[{"role": "user", "content": "a"}]])
    with pytest.raises(UserError, match=r"expected text, or a list of token ids"):
        ask([["a", "b"]])
    with pytest.raises(UserError, match="does not fit"):
        ask(["a"], stop=("abc",), max_new_tokens=2)
    with pytest.raises(UserError, match="no text before the search ends"):
        ask(["a"], beams=2, show=print)
    with pytest.raises(UserError, match="draft="):
        ask(["a"], draft="some/model")


class Upper(ByteTokenizer):
    """Cannot write small letters."""

    def encode(self, text):
        return super().encode(text.upper())


def test_a_stop_string_that_the_vocabulary_cannot_write_is_refused():
    with pytest.raises(UserError, match="cannot write"):
        stops.stop_fn(Upper(), ["ab"], 10, [[]])
    assert stops.stop_fn(Upper(), ["AB"], 10, [[]])


def test_explain_says_what_each_filter_removed(make):
    model, params = make(scan_layers=False)
    options = DecodingOptions(top_k=20, top_p=0.5, max_new_tokens=3)
    steps = list(explain.explain(model, params, [5, 6], options, seed=3, candidates=30))
    (same,) = complete(model, params, BYTES, [[5, 6]], dataclasses.replace(options, seed=3, ignore_eos=True))[0]
    assert [s.chosen for s in steps] == same.generated.ids
    for step, log in zip(steps, same.generated.log_probabilities, strict=True):
        first, second = step.effects
        assert (first.filter, first.tokens, second.filter) == ("TopK", 259 - 20, "TopP")
        model_p, final = np.array(step.model), np.array(step.final)
        assert (np.diff(model_p[:-1]) <= 0).all()
        assert model_p[step.candidates.index(step.chosen)] == pytest.approx(np.exp(log), rel=1e-3)
        assert list(step.removed_by[20:]) == ["TopK"] * 10
        kept = np.array([not f for f in step.removed_by])
        assert kept.sum() == 20 - second.tokens and (final[~kept] == 0).all() and final.sum() == pytest.approx(1)
        top = model_p[:20] / model_p[:20].sum()
        assert second.mass == pytest.approx(top[~kept[:20]].sum(), rel=1e-3)
        text = explain.table(BYTES, 1, step)
        assert "removed by TopK" in text and f"TopK removed 239 tokens of probability {first.mass:.4f}" in text


def test_explain_refuses_a_beam_search(make):
    with pytest.raises(UserError, match="the method is beam"):
        next(explain.explain(*make(scan_layers=False), [5], DecodingOptions(beams=2)))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--top_p=1.5"], "--top_p=1.5; expected a number in (0, 1]"),
        (["--contrastive=0.5", "--top_k=1000"], "--top_k=1000 is more than the 259 tokens"),
        (["--temperature=0", "--top_p=0.5"], "--temperature=0 is greedy; --top_p would have no effect"),
        (["--beams=2", "--stream"], "no text before the search ends"),
        (["--stream", "--json"], "use only one"),
        (["--logit_bias=x"], "expected ID:BIAS"),
        (["--eos=999"], "--eos has the token id 999; expected an id from 0 to 258"),
        (["--seed=-1"], "--seed=-1; expected a number in [0, 4294967295]"),
        (["--context=20"], "fills the context"),
    ],
)
def test_invalid_flags_are_one_line_errors(trained, command, flags, says):
    done = command("generate", f"--checkpoint={trained}", "--prompt=ab", *flags, code=2)
    assert says in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_the_command_and_the_library_give_the_same(trained, command):
    import llm_jax

    model, params, tokenizer = llm_jax.load(trained)
    options = DecodingOptions(max_new_tokens=8, top_k=40, n=2, seed=3, alternatives=2)
    flags = ["--max_new_tokens=8", "--top_k=40", "--n=2", "--seed=3", "--alternatives=2"]
    done = command("generate", f"--checkpoint={trained}", "--prompt=the model", "--prompt=a", *flags, "--json")
    said = [json.loads(line) for line in done.stdout.splitlines()]
    ours = [c for several in complete(model, params, tokenizer, ["the model", "a"], options) for c in several]
    assert [(s["text"], s["ids"]) for s in said] == [(c.text, c.generated.ids) for c in ours]
    assert len(said[0]["alternatives"][0]) == 2
    streamed = command("generate", f"--checkpoint={trained}", "--prompt=a", "--max_new_tokens=8", "--stream")
    plain = command("generate", f"--checkpoint={trained}", "--prompt=a", "--max_new_tokens=8")
    assert streamed.stdout == plain.stdout


def test_a_draft_has_the_same_tokenizer_and_may_have_more_rows(command, trained, tmp_path, monkeypatch):
    model, params, tokenizer = llm_jax.load(trained)
    rows = model.config.vocab_size + 5
    padded = jax.tree.map(lambda w: jnp.pad(w, [(0, 5 * (n == rows - 5)) for n in w.shape]), params)
    wider = model.clone(config=dataclasses.replace(model.config, vocab_size=rows))
    llm_jax.save(wider, padded, tokenizer, tmp_path / "padded")
    other = tokenizers.get("char").train(["the model"], 64)
    llm_jax.save(wider, padded, other, tmp_path / "other")

    def generate(draft, code=2):
        return command("generate", f"--checkpoint={trained}", f"--draft={draft}", "--prompt=a", code=code).stderr

    assert f"--draft={tmp_path / 'other'} has another tokenizer than {trained}" in generate(tmp_path / "other")

    def refuse(*_, draft, **others):
        raise UserError(f"a draft of {draft[0].config.vocab_size} rows")

    monkeypatch.setattr("llm_jax.decoding.complete.complete", refuse)
    assert f"a draft of {rows} rows" in generate(tmp_path / "padded")


def test_only_rotary_positions_have_a_length_beyond_which_texts_are_noted(tiny, capsys):
    def note(kind, max_length):
        position = dataclasses.replace(tiny.model.position, kind=kind, max_length=max_length)
        model = Transformer(dataclasses.replace(tiny.model, position=position))
        note_length(model, [[1] * 4], DecodingOptions(max_new_tokens=73))
        return capsys.readouterr().err

    assert note("rope", 76).startswith("note: prompt and max_new_tokens=73 may exceed the 76 positions")
    assert not note("rope", 77)
    for kind in ("t5", "shaw", "sinusoidal", "alibi", "none"):
        assert not note(kind, 75)


def test_characters_of_a_prompt_that_the_vocabulary_does_not_have_are_named(capsys):
    tokenizer = tokenizers.get("char").train(["the model"], 64)
    note_unknown(tokenizer, ["the model", "hello"])
    assert not capsys.readouterr().err
    note_unknown(tokenizer, ["the", "m\u20acZ\u20ac"])
    assert capsys.readouterr().err.startswith("note: the tokenizer has no token for '\u20ac', 'Z' of the prompt; ")
    note_unknown(tokenizers.get("byte")(), ["\u20ac"])
    assert not capsys.readouterr().err


def test_the_name_of_a_special_token_in_a_prompt_is_noted(capsys):
    tokenizer = HubTokenizer(forms.bytelevel_json(), {})
    special = next(iter(tokenizer._tokenizer.get_added_tokens_decoder().values())).content
    note_special(tokenizer, ["hello", "a < b | c >"])
    note_special(BYTES, [special])
    assert not capsys.readouterr().err
    note_special(tokenizer, ["hello", f"{special}user"])
    error = capsys.readouterr().err
    assert error.startswith(f"note: {special!r} in the prompt is read as text") and error.count("\n") == 1
    note_special(tokenizer, [special])
    assert not capsys.readouterr().err  # once
