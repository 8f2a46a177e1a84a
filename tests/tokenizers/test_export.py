"""What `convert --to=hf` writes of a tokenizer: the `tokenizers` library, and transformers, read the same ids."""

import io
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece
import tokenizers as library

from llm_jax import tokenizers
from llm_jax.errors import UserError
from llm_jax.tokenizers import export
from llm_jax.tokenizers.sentencepiece_json import from_model
from tests.tokenizers import forms

TEXTS = [
    "",
    " ",
    "the  cat ",
    " a\tdog\n\n    ran\n        to\r\n",
    "\n \n\n\n     \t\t x",
    "👩‍👩‍👧 e\u0301 naïve \ufeff\ufffd 日本語",
    "\u2581 a\u2581\u2581 b \u2581",
    "<0x41> x<0x41><unused> <|x|>",
    "##a ## ### #",
    " " * 77 + "a" * 150 + "\n" * 9,
    "\x00\x01 \x7f \u2028\x85",
    forms.TEXT[:500],
]
ALPHABET = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\tabcdeth_.#👩é漢\u2581"), st.sampled_from(" \n ")
)


def written(name: str, family: str = "llama") -> dict[str, bytes]:
    return export.transformers_files(forms.form(name), family)


def special_names(tokenizer: library.Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


@pytest.mark.parametrize("name", ["bytelevel", "model"])
def test_ids_that_end_a_text_are_written(name):
    original = forms.form(name)
    ends = {"eos_ids": [7, 9]}
    config = json.dumps(original.special | ends).encode()
    tokenizer = type(original).from_files(original.files() | {"tokenizer_config.json": config})
    again = tokenizers.from_files(export.transformers_files(tokenizer, "llama"))
    assert tokenizers.eos_ids(again) == tokenizers.eos_ids(tokenizer) == [original.eos, 7, 9]


@pytest.mark.parametrize("name", forms.FORMS)
def test_the_library_reads_the_same_ids(name):
    ours = forms.form(name)
    theirs = library.Tokenizer.from_str(written(name)["tokenizer.json"].decode())
    names = special_names(theirs)

    @hypothesis.settings(max_examples=60)
    @hypothesis.given(text=st.lists(ALPHABET, max_size=40).map("".join))
    def check(text):
        if not any(name in text for name in names):
            ids = theirs.encode(text).ids
            assert ids == tokenizers.prompt(ours, text)
            if ours.unk not in ids:
                assert theirs.decode(ids) == ours.decode(ids)

    for text in TEXTS:
        hypothesis.example(text=text)(check)
    check()


def test_equally_likely_segmentations_of_a_unigram_model_are_told_apart_as_sentencepiece_does():
    ours = tokenizers.get("unigram").train(["The tokenizer reads text.\n    def token(text):\n\treturn 42\n" * 20], 298)
    theirs = library.Tokenizer.from_str(export.transformers_files(ours, "llama")["tokenizer.json"].decode())
    for count in range(1, 120):
        for text in (" " * count, "x\n" + " " * count + "e" * count, "text " * count):
            assert theirs.encode(text).ids == tokenizers.prompt(ours, text)


@pytest.mark.parametrize("name", forms.FORMS)
def test_our_loader_reads_the_same_tokenizer(name, tmp_path):
    for path, content in written(name).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    ours, again = forms.form(name), tokenizers.from_directory(tmp_path)
    assert [tokenizers.prompt(again, text) for text in TEXTS] == [tokenizers.prompt(ours, text) for text in TEXTS]
    assert (again.kind, again.bos, again.eos) == (ours.kind, ours.bos, ours.eos)
    if ours.kind != "hub":
        assert tokenizers.digest(again) == tokenizers.digest(ours)


@pytest.mark.parametrize("name", forms.FORMS)
def test_special_tokens_are_named(name):
    ours, config = forms.form(name), json.loads(written(name)["tokenizer_config.json"])
    theirs = library.Tokenizer.from_str(written(name)["tokenizer.json"].decode())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert theirs.token_to_id(config["eos_token"]) == ours.eos
    assert ours.bos is None or theirs.token_to_id(config["bos_token"]) == ours.bos
    if ours.unk is not None or name in ("model", "prepend", "metaspace", "gguf"):
        assert config["unk_token"] == "<unk>"
    names = {key: token for key, token in config.items() if key.endswith("_token") and key != "add_bos_token"}
    assert set(names.values()) <= set(special_names(theirs))


def test_bert_tokenizers_name_their_special_tokens():
    model = library.models.WordPiece(
        {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5}, unk_token="[UNK]"
    )
    bert = library.Tokenizer(model)
    bert.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    pair = [("[CLS]", 2), ("[SEP]", 3)]
    bert.post_processor = library.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=pair)
    ours = tokenizers.from_files({"tokenizer.json": bert.to_str().encode()})  # no file names the special tokens
    files = export.transformers_files(ours, "bert")
    config = json.loads(files["tokenizer_config.json"])
    assert [config[f"{name}_token"] for name in ("unk", "cls", "sep", "mask")] == ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert config["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]
    assert library.Tokenizer.from_str(files["tokenizer.json"].decode()).encode("a").ids == [2, 5, 3]


def test_bos_is_added_or_not_as_the_files_state():
    def first(add_bos: bool) -> list[int]:
        config = json.dumps(forms.NAMES | {"add_bos_token": add_bos}).encode()
        ours = tokenizers.from_files({"tokenizer.json": text.encode(), "tokenizer_config.json": config})
        files = export.transformers_files(ours, "llama")
        return library.Tokenizer.from_str(files["tokenizer.json"].decode()).encode("a").ids[:1]

    plain = library.Tokenizer.from_str(forms.llama_json(True))
    text = plain.to_str()
    bos, other = plain.token_to_id("<s>"), plain.encode("a").ids[0]
    assert (first(True), first(False)) == ([bos], [other])
    plain.post_processor = library.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    text = plain.to_str()
    assert (first(True), first(False)) == ([bos], [other])


def test_notes_tell_what_transformers_reads_differently():
    unigram = tokenizers.from_files({"tokenizer.model": model(model_type="unigram", vocab_size=300)})
    assert "another one of equally likely segmentations" in export.notes(unigram)[0]
    assert not any(export.notes(forms.form(name)) for name in forms.FORMS)

    class Own(tokenizers.get("byte")):
        kind = "own.py:Own"

    assert "transformers reads no own.py:Own tokenizer" in export.notes(Own())[0]
    assert set(export.transformers_files(Own(), "llama")) == {"tokenizer/kind.json"}


def model(**options) -> bytes:
    out = io.BytesIO()
    default = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity"}
    default |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(forms.TEXT.splitlines()[:40]), model_writer=out, **(default | options)
    )
    return out.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": True, "model_type": "unigram"},
        {"user_defined_symbols": ["<main>", "[INST]", "   "], "control_symbols": ["<ctl>"]},
        {"user_defined_symbols": ["<main>", "[INST]", "   "], "add_dummy_prefix": False},
        {"user_defined_symbols": ["<main>", "[INST]"], "model_type": "unigram"},
        {"byte_fallback": False, "vocab_size": 80},
        {"byte_fallback": False, "vocab_size": 80, "model_type": "unigram"},
        {"add_dummy_prefix": False, "bos_id": -1, "eos_id": -1},
    ],
    ids=str,
)
def test_sentencepiece_models_of_other_options(options):
    serialized = model(**options)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=serialized), from_model(serialized)
    texts = [*TEXTS, "ﬁne ①２３ ｶ ẞ", "<main> the [INST]cat<main><main>  x[INST]", "zero\u200bwidth"]
    for text in texts:
        if theirs.get_piece_size() > 80 or not any(name in text for name in special_names(ours)):
            assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


@pytest.mark.parametrize("options", [{"treat_whitespace_as_suffix": True}, {"model_type": "char", "vocab_size": 300}])
def test_what_tokenizer_json_cannot_express_is_refused(options):
    ours = tokenizers.from_files({"tokenizer.model": model(**options)})
    with pytest.raises(UserError, match="tokenizer.json cannot express this tokenizer.model: expected"):
        export.transformers_files(ours, "llama")


def test_only_the_tokenizer_of_qwen2_keeps_the_class_that_transformers_has_for_it():
    """Without auto_map, AutoTokenizer reads any other one beside a qwen2 with the pre-tokenizer of Qwen 2."""
    qwen = library.Tokenizer.from_str(forms.bytelevel_json())
    expression = export._REPLACED["qwen2"]
    split = library.pre_tokenizers.Split(library.Regex(expression), "isolated")
    level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    qwen.pre_tokenizer = library.pre_tokenizers.Sequence([split, level])
    qwen.normalizer = library.normalizers.NFC()
    own = tokenizers.from_files({"tokenizer.json": qwen.to_str().encode()})

    def has_map(tokenizer, family):
        files = export.transformers_files(tokenizer, family)
        return "auto_map" in json.loads(files["tokenizer_config.json"])

    assert not has_map(own, "qwen2") and has_map(forms.form("bytelevel"), "qwen2")
    assert not has_map(forms.form("bytelevel"), "qwen3")
