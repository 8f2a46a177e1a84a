"""tokenizer.json with the tokens and settings of other files: first space, BERT's normalizer; as transformers 5.24."""

import itertools
import json

import pytest
import tokenizers as library

from llm_jax import checkpoints, tokenizers
from llm_jax.errors import UserError
from llm_jax.tokenizers import pre_tokenizers
from tests.tokenizers import forms

SIZE = 317  # of the vocabulary of `forms.bytelevel_json`


def read(content, **files):
    """The tokenizer of a tokenizer.json with files beside it, by name without .json."""
    others = {f"{name}.json": json.dumps(value).encode() for name, value in files.items()}
    return tokenizers.from_files({"tokenizer.json": content.encode()} | others)


def pieces(tokenizer, text):
    return [tokenizer.piece(i) for i in tokenizer.encode_chat(text)]


TURN = {"content": "<|turn|>", "special": True, "lstrip": False, "rstrip": True, "normalized": False}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<|turn|>", "added_tokens_decoder": {str(SIZE): TURN}}},
        {"tokenizer_config": {"eos_token": "<|turn|>"}},
        {"special_tokens_map": {"eos_token": TURN}},
        {"tokenizer_config": {}, "added_tokens": {"<|turn|>": SIZE}, "generation_config": {"eos_token_id": SIZE}},
    ],
)
def test_tokens_that_only_other_files_name_are_tokens(files):
    tokenizer = read(forms.bytelevel_json(), **files)
    assert tokenizer.vocab_size == SIZE + 1 and tokenizer.eos == SIZE
    assert tokenizer.encode_chat("<|turn|>") == [SIZE] and tokenizer.decode([SIZE]) == ""
    assert len(tokenizer.encode("<|turn|>")) > 1  # as text it is text
    again = type(tokenizer).from_files(tokenizer.files())
    assert tokenizers.digest(again) == tokenizers.digest(tokenizer) and again.encode_chat("<|turn|>") == [SIZE]


def test_order_and_flags_of_added_tokens():
    names = {"eos_token": "<|end|>", "additional_special_tokens": ["[ENT]"]}
    tokenizer = read(forms.bytelevel_json(), tokenizer_config=names | {"added_tokens_decoder": {str(SIZE): TURN}})
    assert tokenizer.encode_chat("[ENT]<|turn|>  <|end|>") == [SIZE + 2, SIZE, SIZE + 1]  # rstrip takes the spaces


def test_tokens_without_a_row_in_the_model_are_left_out_and_wrong_ids_refused():
    tokens = {str(SIZE): TURN, str(SIZE + 1): TURN | {"content": "<|past|>"}}
    config = {"added_tokens_decoder": tokens}
    tokenizer = read(forms.bytelevel_json(), tokenizer_config=config, config={"vocab_size": SIZE + 1})
    assert tokenizer.vocab_size == SIZE + 1 and len(tokenizer.encode_chat("<|past|>")) > 1
    with pytest.raises(UserError, match=r"the token '<\|turn\|>' has the id 370; expected 317"):
        read(forms.bytelevel_json(), tokenizer_config={"added_tokens_decoder": {"370": TURN}})


def test_space_before_the_first_word():
    spaced = {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}
    assert pieces(read(forms.bytelevel_json(), tokenizer_config=spaced), "cat sat") == ["Ġcat", "Ġsat"]
    assert pieces(read(forms.bytelevel_json()), "cat sat")[-1] == "Ġsat"
    assert pieces(read(forms.bytelevel_json()), "cat sat")[0] != "Ġcat"
    bare = forms.NAMES | {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}
    for prepend in (True, False):
        tokenizer = read(forms.llama_json(prepend), tokenizer_config=bare)
        assert "".join(pieces(tokenizer, "x cat")) == "x▁cat"
        assert tokenizer.decode(tokenizer.encode(" x cat")) == " x cat"


def test_bert_settings_beside_tokenizer_json():
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "the", "The", "cafe", "café"])}
    bert = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
    bert.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    bert.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    cases = [
        ({}, [1, 3]),
        ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, [2, 4]),
        ({"tokenizer_class": "BertTokenizer", "strip_accents": False}, [1, 4]),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}, [1, 3]),  # not BERT's class
    ]
    for config, ids in cases:
        assert read(bert.to_str(), tokenizer_config=config).encode("The café") == ids, config


def test_dropout_of_merges_is_off():
    content = json.loads(forms.bytelevel_json())
    content["model"]["dropout"] = 0.5
    tokenizer = read(json.dumps(content))
    assert {tuple(tokenizer.encode("the cat sat on the mat")) for _ in range(8)} == {
        tuple(read(forms.bytelevel_json()).encode("the cat sat on the mat"))
    }


@pytest.mark.parametrize(
    ("config", "pre"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, "gpt-2"),
        ({}, "gpt-2"),  # by config.json
        ({"tokenizer_class": "Qwen2TokenizerFast"}, "qwen2"),
    ],
)
def test_vocab_json_and_merges_txt_without_tokenizer_json(config, pre, tmp_path):
    content = json.loads(forms.bytelevel_json())
    merges = "".join(" ".join(pair) + "\n" for pair in content["model"]["merges"])
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = checkpoints.load_tokenizer(tmp_path)
    content["pre_tokenizer"] = pre_tokenizers.sequence(pre)
    content["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    expected = read(json.dumps(content), tokenizer_config={"eos_token": "<|endoftext|>"})
    for text in ("the cat's  mat 123\n\n e\u0301 日", "I'llama <|endoftext|>"):
        assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == expected.decode(expected.encode(text))
    assert tokenizer.encode_chat("a<|endoftext|>")[-1] == tokenizer.eos == 0 and tokenizer.decode([0]) == ""
    (tmp_path / "merges.txt").write_bytes(("#version: 0.2\n" + merges).replace("\n", "\r\n").encode())
    assert tokenizers.digest(tokenizers.from_directory(tmp_path)) == tokenizers.digest(tokenizer)
    (tmp_path / "merges.txt").write_text("zz zz\n")
    with pytest.raises(UserError, match="vocab.json and merges.txt do not fit each other"):
        tokenizers.from_directory(tmp_path)


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "vocab.json", "tokenizer.model"])
def test_a_damaged_file_of_a_tokenizer_is_named(vocabulary, tmp_path):
    content = json.loads(forms.bytelevel_json())["model"]
    merges = "".join(" ".join(pair) + "\n" for pair in content["merges"]).encode()
    vocabularies = {
        "tokenizer.json": {"tokenizer.json": forms.bytelevel_json().encode()},
        "vocab.json": {"vocab.json": json.dumps(content["vocab"]).encode(), "merges.txt": merges},
        "tokenizer.model": {"tokenizer.model": forms.form("model").files()["tokenizer.model"]},
    }
    files = vocabularies[vocabulary] | {"config.json": b'{"model_type": "gpt2"}'}
    damaged = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"]
    damaged += [name for name in files if name != "tokenizer.model"]
    for name, damage in itertools.product(damaged, (b"[1]", b'{"a": ', b"\xff\xfe")):
        for path, data in (files | {name: damage}).items():
            (tmp_path / path).write_bytes(data)
        with pytest.raises(UserError) as error:
            tokenizers.from_directory(tmp_path)
        text = str(error.value)
        assert text.startswith(f"{tmp_path}: the tokenizer cannot be read (") and name in text and "\n" not in text
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"400": {"special": true}}}')
    for path, data in files.items():
        (tmp_path / path).write_bytes(data)
    with pytest.raises(UserError, match="tokenizer_config.json"):
        tokenizers.from_directory(tmp_path)


def test_vocab_txt_without_tokenizer_json(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "cafe", "café", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokenizer = tokenizers.from_directory(tmp_path)
    assert tokenizer.encode_with_special_tokens("The cafés x") == [2, 5, 7, 9, 1, 3] and tokenizer.vocab_size == len(
        pieces
    )
    assert (tokenizer.unk, tokenizer.mask, tokenizer.special["pad_token"]) == (1, 4, "[PAD]")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert tokenizers.from_directory(tmp_path).encode("The cafés") == [6, 8, 9]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "FSMTTokenizer"}))
    with pytest.raises(UserError, match="no tokenizer.json here, and vocab.txt of the class 'FSMT' cannot be read; tr"):
        tokenizers.from_directory(tmp_path)


def test_added_tokens_of_letters_that_stand_for_bytes_are_decoded_as_they_are():
    """The decoder of byte-level BPE takes é for the byte E9."""
    config = {"added_tokens_decoder": {str(SIZE): {"content": "café"}, str(SIZE + 1): {"content": "größe"}}}
    tokenizer = read(forms.bytelevel_json(), tokenizer_config=config)
    for text in ("the café sat", "cafégröße", "größe é café ", "café<|im_end|>"):
        ids = tokenizer.encode_chat(text)
        assert {SIZE, SIZE + 1} & set(ids) and tokenizer.decode(ids) == text.replace("<|im_end|>", "")
