"""Vocabularies of GGUF files: pre-tokenizers as in llama.cpp, and every kind of vocabulary there and back."""

import json
import pathlib

import pytest
import tokenizers as library

from llm_jax import tokenizers
from llm_jax.errors import UserError
from llm_jax.tokenizers import pre_tokenizers
from llm_jax.tokenizers.hub import HubTokenizer
from tests.tokenizers import forms
from tests.tokenizers.make_pre_tokenizers_golden import metadata

GOLDEN = json.loads(pathlib.Path(__file__).with_name("pre_tokenizers_golden.json").read_text())
KEY = "tokenizer.ggml."


@pytest.mark.parametrize("pre", pre_tokenizers.PRE_TOKENIZERS)
def test_every_pre_tokenizer_gives_the_ids_of_llama_cpp(pre):
    tokenizer = HubTokenizer.from_gguf(metadata(GOLDEN, pre))
    for text, expected in zip(GOLDEN["texts"], GOLDEN["ids"][pre], strict=True):
        assert expected is None or tokenizer.encode(text) == expected, text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def words(pre, text):
    pieces = pre_tokenizers.build(pre_tokenizers.sequence(pre)).pre_tokenize_str(text)
    return [text[begin:end] for _, (begin, end) in pieces]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        # What llama.cpp approximates: upper case outside ASCII, marks, and the digits of a number.
        ("tekken", "ÉcoleÉCOLE 12", ["École", "ÉCOLE", " ", "1", "2"]),
        ("gpt-4o", "ÉcoleÉCOLE's 1234", ["École", "ÉCOLE's", " ", "123", "4"]),
        ("llama4", "camelCase e\u0301x", ["camel", "Case", " e\u0301x"]),
        ("kimi-k2", "camelCase é中文a's 1234", ["camel", "Case", " é", "中文", "a's", " ", "123", "4"]),
        ("afmoe", "1234567 中文a", ["1", "234", "567", " ", "中文", "a"]),
        ("youtu", "camelCase ㄱ", ["camel", "Case", " ", "ㄱ"]),
        ("deepseek-llm", "12 ab", ["1", "2", " ab"]),
        # What the ids of the golden texts do not show.
        ("deepseek-llm", "a ¡  ", ["a", " ¡", "  "]),
        ("ufakzeka", "I'llama", ["I", "'llama"]),
        ("qwen2", "I'llama", ["I", "'ll", "ama"]),
    ],
)
def test_words_are_those_of_the_original_expressions(pre, text, expected):
    assert words(pre_tokenizers.canonical(pre), text) == expected


def test_an_alias_is_a_pre_tokenizer_by_which_llama_cpp_gives_the_same_ids():
    assert GOLDEN["aliases"].keys() == pre_tokenizers.ALIASES.keys()
    assert not set(pre_tokenizers.ALIASES) & set(pre_tokenizers.PRE_TOKENIZERS)
    for alias, same in GOLDEN["aliases"].items():
        assert pre_tokenizers.canonical(alias) in same, alias
    one, other = (HubTokenizer.from_gguf(metadata(GOLDEN, pre)) for pre in ("exaone", "smollm"))
    assert tokenizers.digest(one) == tokenizers.digest(other)


@pytest.mark.parametrize("pre", pre_tokenizers.PRE_TOKENIZERS)
def test_what_is_written_names_the_pre_tokenizer(pre):
    tokenizer = HubTokenizer.from_gguf(metadata(GOLDEN, pre))
    again = HubTokenizer.from_gguf(tokenizer.to_gguf(tokenizer.vocab_size))
    assert tokenizers.digest(again) == tokenizers.digest(tokenizer)


def test_llama_pre_tokenizers_add_bos_and_others_do_not():
    ids = {KEY + "bos_token_id": 3}
    begin = {
        pre: HubTokenizer.from_gguf(metadata(GOLDEN, pre) | ids).bos for pre in ("falcon3", "tekken", "glm4", "dbrx")
    }
    assert begin == {"falcon3": 3, "tekken": 3, "glm4": None, "dbrx": None}
    silenced = metadata(GOLDEN, "falcon3") | ids | {KEY + "add_bos_token": False}
    assert HubTokenizer.from_gguf(silenced).bos is None


@pytest.mark.parametrize("pre", ["whitespace", "unknown"])
def test_other_pre_tokenizers_are_refused(pre):
    with pytest.raises(UserError, match=f"tokenizer.ggml.pre is '{pre}'; expected one of gpt-2"):
        HubTokenizer.from_gguf(metadata(GOLDEN, pre))


def test_a_token_that_ends_a_text_is_no_text_whatever_its_type():
    golden = metadata(GOLDEN, "gpt-2")
    tokens, types = golden[KEY + "tokens"], golden[KEY + "token_type"]
    end, size = "<|im_end|>", len(tokens)
    for kind in (1, 3, 4):  # normal, control, user-defined
        changes = {KEY + "tokens": [*tokens, end, "</s>"], KEY + "token_type": [*types, kind, 1]}
        tokenizer = tokenizers.from_gguf(golden | changes)
        assert tokenizer.encode_chat(f"the{end}")[-1] == size and size not in tokenizer.encode(f"the{end}")
        assert size + 1 not in tokenizer.encode_chat("</s>") and tokenizers.eos_ids(tokenizer) == [size]


SENTENCES = ("the cat sat on the mat.", "a dog\n\nran  to   the park 日é", "x; yes no maybe", "")


@pytest.mark.parametrize("form", ["prepend", "metaspace"])
def test_sentencepiece_like_tokenizer_json_becomes_the_vocabulary_of_its_model(form):
    original, model = forms.form(form), forms.form("model")
    written = original.to_gguf(original.vocab_size + 3)
    assert written[KEY + "model"] == "llama" and written[KEY + "add_space_prefix"] is True
    expected = model.to_gguf(original.vocab_size + 3)
    assert written[KEY + "tokens"] == expected[KEY + "tokens"]
    assert written[KEY + "token_type"] == expected[KEY + "token_type"]
    again = tokenizers.from_gguf(written)
    for text in SENTENCES:
        assert again.encode(text) == original.encode(text) == model.encode(text), text
    assert (again.bos, again.eos) == (original.bos, original.eos)


def test_a_directory_with_both_files_becomes_gguf():
    files = {"tokenizer.json": forms.llama_json(False).encode(), "tokenizer.model": forms.sentencepiece_model()}
    both = tokenizers.from_files(files | {"tokenizer_config.json": json.dumps(forms.NAMES).encode()})
    again = tokenizers.from_gguf(both.to_gguf(both.vocab_size))
    model = tokenizers.from_files({"tokenizer.model": files["tokenizer.model"]})
    for text in (*SENTENCES, "  def f(x):\n    return x"):
        assert again.encode(text) == model.encode(text)


def test_unicode_normalization_is_said_to_be_left_out(capsys):
    state = json.loads(forms.bytelevel_json()) | {"normalizer": {"type": "NFC"}}
    written = HubTokenizer(json.dumps(state), {}).to_gguf(360)
    assert written[KEY + "pre"] == "gpt-2" and "does not apply the NFC" in capsys.readouterr().out


def json_with(change):
    """The tokenizer.json of the form "prepend" after `change` of its state, and its name for GGUF."""
    state = json.loads(forms.llama_json(True))
    change(state)
    return HubTokenizer(json.dumps(state), {"unk_token": "<unk>"}).to_gguf(len(state["model"]["vocab"]))


def test_merges_into_added_tokens_have_no_order():
    """Gemma's: runs of spaces and line breaks, all of one score."""
    merges = [("".join(pair), pair) for pair in json.loads(forms.llama_json(True))["model"]["merges"]]
    token = next(token for token, _ in merges if "▁" in token and sum(t == token for t, _ in merges) > 1)

    def added(state):
        index = state["model"]["vocab"][token]
        state["added_tokens"].append(state["added_tokens"][-1] | {"id": index, "content": token, "special": False})
        state["model"]["merges"].append(state["model"]["merges"].pop([t for t, _ in merges].index(token)))

    written = json_with(added)
    assert written[KEY + "token_type"][written[KEY + "tokens"].index(token.replace("▁", " "))] == 4


def test_merges_that_no_scores_give_are_refused():
    def swapped(state):  # one of the two pairs of a token is merged last
        merges = state["model"]["merges"]
        pairs = ["".join(pair) for pair in merges]
        first = next(i for i in range(len(pairs)) if pairs[i] == pairs[i + 1])
        merges.append(merges.pop(first))

    def dropped(state):
        state["model"]["merges"].pop()

    def lowercase(state):
        state["normalizer"]["normalizers"].append({"type": "Lowercase"})

    for change in (swapped, dropped, lowercase):
        with pytest.raises(UserError, match="cannot become GGUF: .* whose merges are those of SentencePiece"):
            json_with(change)


def gemma4():
    """The metadata of a vocabulary of Gemma 4's kind: merges on UTF-8, and bytes for other characters."""
    pairs = ["t h", "th e", "▁ the", "▁ ▁", "\n \n", "c a", "ca t", "▁ cat"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"thecat▁\n"]
    pieces += ["<turn|>"]
    tokens = list(dict.fromkeys([*pieces, *(pair.replace(" ", "") for pair in pairs)]))
    types = [2 if t == "<unk>" else 6 if t.startswith("<0x") else 3 if t[0] == "<" else 1 for t in tokens]
    said = {"model": "gemma4", "tokens": tokens, "token_type": types, "merges": pairs, "add_bos_token": False}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0}
    return {KEY + name: value for name, value in (said | ids).items()}


def test_gemma_4_is_read_as_llama_cpp_reads_it():
    tokenizer = tokenizers.from_gguf(gemma4())
    text = "the cat  the\n\n\ncé"
    pieces = ["the", "▁cat", "▁", "▁the", "\n\n", "\n", "c", "<0xC3>", "<0xA9>"]
    assert [tokenizer.piece(i) for i in tokenizer.encode(text)] == pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bos == 2  # whatever add_bos_token
    assert tokenizers.eos_ids(tokenizer) == [1, gemma4()[KEY + "tokens"].index("<turn|>")]
    again = tokenizers.from_gguf(tokenizer.to_gguf(tokenizer.vocab_size))
    assert [again.encode(t) for t in (text, " the", "a")] == [tokenizer.encode(t) for t in (text, " the", "a")]
    with pytest.raises(UserError, match="unknown_token_id or a byte token is missing"):
        tokenizers.from_gguf({k: v for k, v in gemma4().items() if "unknown" not in k})


def unordered():
    """`gemma4` with merges that no scores give, so that it is not written as SentencePiece's form."""
    changes = {KEY + "merges": ["h e", "t he"], KEY + "tokens": ["he"], KEY + "token_type": [1]}
    return gemma4() | {key: [*gemma4()[key], *more] for key, more in changes.items()}


@pytest.mark.parametrize(
    ("names", "bos", "written"),
    [
        ({}, 2, ("gemma4", None)),
        ({KEY + "model": "gpt2", KEY + "pre": "granite-embed-multi-311m"}, 2, ("gemma4", None)),
        ({KEY + "model": "gpt2", KEY + "pre": "sarvam-moe"}, None, ("gpt2", "sarvam-moe")),
        ({KEY + "model": "gpt2", KEY + "pre": "sarvam-moe", KEY + "add_bos_token": True}, 2, ("gemma4", None)),
    ],
)
def test_the_form_of_gemma_4_by_its_names(names, bos, written):
    tokenizer, text = tokenizers.from_gguf(unordered() | names), "the cat  the he\n\n\ncé"
    expected = tokenizers.from_gguf(gemma4()).encode("the cat  the")
    assert tokenizer.encode("the cat  the") == expected and tokenizer.bos == bos
    saved = tokenizer.to_gguf(tokenizer.vocab_size)
    assert (saved[KEY + "model"], saved.get(KEY + "pre")) == written
    again = tokenizers.from_gguf(saved)
    assert again.encode(text) == tokenizer.encode(text) and again.bos == bos


PIECES = [
    "[PAD]",
    "[unused0]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdehnost,!",
    "the",
    "cat",
    "##s",
    "##th",
    "Cat",
]


def wordpiece(lowercase=True):
    """BERT's tokenizer, with a small vocabulary."""
    tokenizer = library.Tokenizer(library.models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    marks = [("[CLS]", 3), ("[SEP]", 4)]
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=marks
    )
    tokenizer.decoder = library.decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return HubTokenizer(tokenizer.to_str(), {"unk_token": "[UNK]", "pad_token": "[PAD]"})


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece_goes_into_gguf_and_comes_back(lowercase):
    original = wordpiece(lowercase)
    written = original.to_gguf(len(PIECES))
    tokens = written[KEY + "tokens"]
    assert written[KEY + "model"] == "bert" and written[KEY + "normalizer.lowercase"] is lowercase
    assert tokens[:2] == ["[PAD]", "▁[unused0]"] and tokens[-5:] == ["▁the", "▁cat", "s", "th", "▁Cat"]
    names = ("bos", "cls", "seperator", "unknown", "padding", "mask")  # llama.cpp takes [CLS] from the first
    assert [written[f"{KEY}{name}_token_id"] for name in names] == [3, 3, 4, 2, 0, 5]
    again = tokenizers.from_gguf(written)
    for text in ("The cats, a Cat! [MASK]", "thé 日 cath", "dog", ""):
        assert again.encode(text) == original.encode(text)
        assert again.encode_with_special_tokens(text) == original.encode_with_special_tokens(text)
        assert again.decode(again.encode(text)) == original.decode(original.encode(text))
    assert (again.bos, again.unk, again.mask, again.special["pad_token"]) == (None, 2, 5, "[PAD]")
    assert again.special_ids == original.special_ids
    assert tokenizers.digest(tokenizers.from_gguf(again.to_gguf(len(PIECES)))) == tokenizers.digest(again)


def test_wordpiece_of_older_files_has_bare_brackets():
    written = wordpiece().to_gguf(len(PIECES))
    older = [token.removeprefix("▁") if "[" in token else token for token in written[KEY + "tokens"]]
    kept = {k: v for k, v in written.items() if "_token_id" not in k} | {KEY + "tokens": older}  # ids by name, too
    assert tokenizers.from_gguf(kept).encode_with_special_tokens("the cats") == wordpiece().encode_with_special_tokens(
        "the cats"
    )
    with pytest.raises(UserError, match="tokenizer.ggml.seperator_token_id is missing"):
        tokenizers.from_gguf(kept | {KEY + "tokens": [t.replace("[SEP]", "[X]") for t in older]})


def test_padding_of_the_unknown_type_and_spaces_of_user_defined_tokens():
    model = forms.form("model")
    written = model.to_gguf(model.vocab_size)
    tokens, types, scores = (written[KEY + name] for name in ("tokens", "token_type", "scores"))
    size, types = len(tokens), [3 if kind == 2 else kind for kind in types]  # <unk> as in Phi-3's files
    more = {"tokens": ["[PAD0]", "[PAD1]", " " * 9], "token_type": [2, 2, 4], "scores": [0.0] * 3}
    changes = {
        KEY + name: [*old, *more[name]] for name, old in (("tokens", tokens), ("token_type", types), ("scores", scores))
    }
    tokenizer = tokenizers.from_gguf(written | changes | {KEY + "unknown_token_id": 0})
    text = "the cat sat" + " " * 9 + "on 日"
    assert tokenizer.encode("the cat") == model.encode("the cat")
    assert size + 2 in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.to_gguf(size + 3)[KEY + "tokens"] == [*tokens, *more["tokens"]]  # found in text as it is


def test_symbols_that_sentencepiece_never_matches_are_not_matched():
    """Symbols with spaces of our own vocabularies: sentencepiece escapes the spaces of a text before it searches."""
    ours = tokenizers.get("bpe").train(["def main(self):\n    return 1, größe\n"] * 50, 320)
    written = tokenizers.exportable(ours).to_gguf(320)
    assert {k for t, k in zip(written[KEY + "tokens"], written[KEY + "token_type"], strict=True) if t == "\n    "} == {
        5
    }
