import json

import hypothesis
import hypothesis.strategies as st
import pytest

from llm_jax import tokenizers
from llm_jax.errors import UserError

SIZES = {"word": 28, "wordpiece": 127, "char_bpe": 88, "unigram": 311}  # what TEXT allows; others: 320
TEXT = ["The tokenizer reads text.\n\n    def token(text):\n\treturn 42\n" * 20, "Größe: 3 µm, naïve café 😀\r\n" * 20]


# Other people's, which are not trained here: tests/checkpoints and test_foreign.py.
@pytest.fixture(scope="module", params=tokenizers.TRAINED)
def tokenizer(request):
    return train(request.param)


def train(kind: str):
    return tokenizers.get(kind).train(TEXT, SIZES.get(kind, 320))


def test_the_texts_it_was_trained_on_come_back(tokenizer):
    for text in [*TEXT, ""]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids) and not {0, tokenizer.bos, tokenizer.eos} & set(ids)


@hypothesis.settings(max_examples=200)
@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis.example(text="\u2581 a\u2581\u2581 b")
@hypothesis.example(text="\x00\x1b[0m \r\n  \n\n\n\t ")
@hypothesis.example(text="👩‍👩‍👧 e\u0301 \ufeff\ufffd")
def test_any_text_comes_back_from_the_exact_kinds(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {0, tokenizer.bos, tokenizer.eos} & set(ids)
    if tokenizer.exact or tokenizer.unk not in ids:
        assert tokenizer.decode(ids) == text
    if tokenizer.exact:
        assert tokenizer.unk is None


@hypothesis.settings(max_examples=200)
@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis.example(text="\u2581 a\u2581\u2581 b \x00 \r\n\n 👩‍👩‍👧 <unk><bos> ##a")
def test_spans_tile_the_text_and_are_what_the_tokens_decode_to(tokenizer, text):
    ids, spans, whole = tokenizer.encode(text), tokenizer.spans(text), text.encode()
    assert len(ids) == len(spans)
    assert [0, *(end for _, end in spans)] == [*(begin for begin, _ in spans), len(whole)]
    for index, (begin, end) in zip(ids, spans, strict=True):
        if index != tokenizer.unk:
            assert tokenizer.decode([index]) == whole[begin:end].decode(errors="replace")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_spaces_that_the_training_text_lacks_come_back(kind):
    """Without a piece of its own a space would be spelled in the bytes of the character that stands for it."""
    texts = ["".join(chr(0x4E00 + (i * j) % 97) for j in range(200)) for i in range(1, 40)]
    tokenizer, text = tokenizers.get(kind).train(texts, 420), "\u4e00 \u4e01 hello  \u2581 world "
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.encode(" ") != tokenizer.encode("\u2581")
    assert tokenizer.spans(text)[-1][1] == len(text.encode())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_size_that_the_text_does_not_allow_is_told_with_one_that_it_does(kind):
    with pytest.raises(
        UserError, match=f"a {kind} vocabulary of 5000 is larger than this text allows, which is"
    ) as error:
        tokenizers.get(kind).train(TEXT, 5000)
    assert tokenizers.get(kind).train(TEXT, int(str(error.value).split()[-1])).vocab_size < 5000
    with pytest.raises(UserError, match="the text is empty"):
        tokenizers.get(kind).train([], 400)


@pytest.fixture(scope="module")
def exact_tokenizers():
    return [train(kind) for kind in tokenizers.TRAINED if tokenizers.get(kind).exact]


@pytest.mark.slow
@hypothesis.settings(max_examples=10_000)
@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=20))
def test_many_more_texts_come_back_from_the_exact_kinds(exact_tokenizers, text):
    for tokenizer in exact_tokenizers:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unpaired_surrogates_are_refused(tokenizer):
    with pytest.raises(UserError, match="unpaired surrogate at character 2"):
        tokenizer.encode("ab\ud800c")


def test_special_ids_decode_to_nothing_and_broken_bytes_to_a_mark(tokenizer):
    assert tokenizer.decode([*tokenizers.document(tokenizer, "text"), 0]) == "text"
    if tokenizer.exact:
        broken = tokenizer.encode("🦜")[:-1]
        assert "\ufffd" in tokenizer.decode(broken)
    assert tokenizer.piece(tokenizer.bos) == "<bos>" and tokenizer.piece(tokenizer.encode("The")[0]).startswith("T")


def test_characters_never_seen_are_unknown():
    tokenizer = tokenizers.get("char").train(["abc"], 100)
    assert tokenizer.encode("axb")[1] == tokenizer.unk and tokenizer.decode(tokenizer.encode("axb")) == "a\ufffdb"


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizers.save(tokenizer, tmp_path)
    again = tokenizers.load(tmp_path)
    assert tokenizers.digest(again) == tokenizers.digest(tokenizer)
    assert again.encode(TEXT[0]) == tokenizer.encode(TEXT[0])


@pytest.mark.parametrize("harm", ["kind.json", "bpe.model", "kind"])
def test_a_changed_file_is_refused(tmp_path, harm):
    tokenizers.save(tokenizers.get("bpe").train(TEXT, 320), tmp_path)
    if harm == "kind":
        (tmp_path / "kind.json").write_text('{"kind": "wordz", "sha256": ""}')
    else:
        (tmp_path / harm).write_bytes((tmp_path / harm).read_bytes()[:-3])
    with pytest.raises(UserError):
        tokenizers.load(tmp_path)


def test_digests_tell_vocabularies_apart():
    train = tokenizers.get("bpe").train
    assert tokenizers.digest(train(TEXT, 320)) != tokenizers.digest(train(TEXT, 325))


LEARNED = [kind for kind in tokenizers.TRAINED if kind not in ("byte", "char")]


@pytest.mark.parametrize(
    ("kind", "size", "texts"),
    [
        ("char", 4, TEXT),
        ("char", 9, []),
        ("word", 4, TEXT),
        ("wordpiece", 7, TEXT),
        ("char_bpe", 5, TEXT),
        ("bpe", 100, TEXT),
        ("unigram", 100, TEXT),
        ("byte_bpe", 259, TEXT),
        *((kind, size, texts) for kind in LEARNED for size, texts in ((5000, TEXT), (300, []), (300, ["word"] * 9))),
    ],
)
def test_invalid_vocabulary_sizes_are_one_line_errors(kind, size, texts):
    with pytest.raises(UserError, match="vocabulary") as error:
        tokenizers.get(kind).train(texts, size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", tokenizers.SIZED)
def test_a_text_that_allows_fewer_ids_gives_the_largest_vocabulary_on_request(kind):
    with pytest.raises(tokenizers.VocabularyTooLarge) as error:
        tokenizers.get(kind).train(TEXT, 5000)
    largest = error.value.largest()
    assert isinstance(largest, tokenizers.get(kind)) and f"{largest.vocab_size}" in str(error.value)
    assert largest.decode(largest.encode(TEXT[0])) == TEXT[0]
    if kind in ("bpe", "unigram", "word", "byte_bpe"):  # the alphabet of others depends on the size
        again = tokenizers.get(kind).train(TEXT, largest.vocab_size)
        assert [again.piece(i) for i in range(again.vocab_size)] == [largest.piece(i) for i in range(again.vocab_size)]


def test_wordpiece_keeps_known_characters_beside_unknown_ones():
    texts = ["the model reads 日本語 text, and 日本 too; " * 20]
    wordpiece = tokenizers.get("wordpiece").train(texts, 56)
    for text, unknown in (("re𝕏ads the", 1), ("𝕏𝕐 日本𝕏 model", 3), ("the 日本語 model 語", 0), ("a" * 250, 0)):
        ids = wordpiece.encode(text)
        assert ids.count(wordpiece.unk) == unknown
        assert wordpiece.decode(ids) == text.replace("𝕏", "\ufffd").replace("𝕐", "\ufffd")
    assert pieces(wordpiece, "日本語")[:3] == ["日", "本", "語"]  # every ideograph is a word


def test_vocabularies_of_version_0_1_encode_as_they_did():
    """Their file has their own pre-tokenizer, under which a word with an unknown character is unknown."""
    state = json.loads(tokenizers.get("wordpiece").train(TEXT, SIZES["wordpiece"]).files()["wordpiece.json"])
    pattern = {"Regex": r" ?\w+| ?[^\w\s]|\s"}
    state["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    old = tokenizers.get("wordpiece").from_files({"wordpiece.json": json.dumps(state).encode()})
    assert old.encode("te𝕏t")[0] == old.unk and len(old.encode("te𝕏t")) == 1


def test_an_unknown_kind_names_the_choices():
    with pytest.raises(UserError, match="expected one of bpe, byte, byte_bpe, char"):
        tokenizers.get("words")


def test_the_same_text_gives_the_same_vocabulary_in_another_process():
    import subprocess
    import sys

    code = (
        "from llm_jax import tokenizers as t; import sys; text = [sys.stdin.read()];"
        f"print([t.digest(t.get(kind).train(text, 306)) for kind in {LEARNED}])"
    )
    text = "".join(f"def function_{i}(argument):\n    return argument * {i} + välue_{i % 7}\n" for i in range(300))
    digests = {
        subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(digests) == 1


def test_the_sample_is_fair_and_the_same_every_time():
    from llm_jax.tokenizers.pieces import sample

    lines = [str(i) for i in range(10_000)]
    kept = sample(iter(lines), 1000)
    assert len(set(kept)) == 1000 and kept == sample(iter(lines), 1000)
    assert 4500 < sum(map(int, kept)) / 1000 < 5500
    assert sample(iter(lines), 20_000) == lines


@pytest.mark.parametrize("kind", ["hub", "sentencepiece"])
def test_other_peoples_tokenizers_are_not_trained(kind):
    with pytest.raises(UserError, match=f"tokenizer.kind={kind} is read from a checkpoint"):
        tokenizers.get(kind).train(TEXT, 320)


def pieces(tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(i).strip() for i in tokenizer.encode(text)]


def test_the_worked_examples_of_t4():
    corpus = ["Tokenization is essential.", "Fine-tuning is fun"] * 10
    word = tokenizers.get("word").train(corpus, 10)
    assert pieces(word, "Tokenization is essential.") == ["Tokenization", "is", "essential", "."]
    assert pieces(word, "Fine-tuning is fun") == ["Fine-tuning", "is", "fun"]
    for kind, size in (("wordpiece", 69), ("char_bpe", 51)):
        subword = tokenizers.get(kind).train(corpus, size)
        assert pieces(subword, "Fine-tuning is fun") == ["Fine", "-", "tuning", "is", "fun"]
        assert pieces(subword, "Tokenization is essential.") == ["Tokenization", "is", "essential", "."]


def test_unseen_words_are_unknown_to_word_tokenizers_only(tokenizer):
    """T3: pieces hold words out of the vocabulary, here of letters that TEXT has."""
    word = "tokenreaders"
    ids = tokenizer.encode(word)
    assert (tokenizer.unk in ids) == (tokenizer.kind == "word")
    assert (tokenizer.decode(ids) == word) == (tokenizer.kind != "word")
