"""Pretrained vocabularies: sentencepiece models, the kind "llama" of GGUF, and those of the assets."""

import io
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece

from llm_jax import checkpoints, tokenizers
from llm_jax.decoding import complete
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.tokenizers.sentencepiece_model import SentencePieceTokenizer

GOLDEN = json.loads(pathlib.Path(__file__).with_name("real_golden.json").read_text())["cases"]
CONFIG = {
    "add_bos_token": True,
    "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    "bos_token": "<s>",
    "added_tokens_decoder": {"320": {"content": "<|turn|>"}},
}


def model(**options) -> bytes:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world " * 5, "the quick brown fox, größe"] * 50),
        model_writer=made,
        vocab_size=320,
        minloglevel=2,
        num_threads=1,
        **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"} | options,
    )
    return made.getvalue()


@pytest.fixture(scope="module")
def llama():
    return tokenizers.from_files({"tokenizer.model": model(), "tokenizer_config.json": json.dumps(CONFIG).encode()})


def test_a_sentencepiece_model_gives_what_sentencepiece_gives(llama):
    own = sentencepiece.SentencePieceProcessor(model_proto=model())
    for text in ("hello quick fox", "  two  spaces", "größe\nnew 🦜", "<s> hello", ""):
        assert llama.encode(text) == own.encode(text)
        assert llama.decode(llama.encode(text)) == own.decode(own.encode(text))
    assert (llama.bos, llama.eos, llama.unk, llama.vocab_size, llama.regular_size) == (1, 2, None, 321, 320)
    assert llama.special_ids == {"bos_token_id": 1, "eos_token_id": 2}


def test_special_tokens_are_parsed_in_chats_and_not_in_plain_text(llama):
    assert llama.encode_chat("<s>hello<|turn|>") == [1, *llama.encode("hello"), 320]
    assert not {1, 320} & set(llama.encode("<s>hello<|turn|>"))
    assert llama.decode(llama.encode("<s>hello<|turn|>")) == "<s>hello<|turn|>"
    assert llama.decode([1, *llama.encode("hello"), 320, 2, 999]) == "hello" and llama.piece(320) == "<|turn|>"


@hypothesis.settings(max_examples=200)
@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis.example(text="  a  \u2581 b\n")
def test_the_vocabulary_in_a_gguf_file_is_the_same(llama, text):
    again = tokenizers.from_gguf(llama.to_gguf(330))
    assert again.encode(text) == llama.encode(text)
    assert again.decode(again.encode(text)) == llama.decode(llama.encode(text))


@pytest.mark.parametrize(("kind", "size"), [("bpe", 320), ("byte_bpe", 280)])
def test_trained_vocabularies_go_through_a_gguf_file(kind, size):
    ours = tokenizers.get(kind).train(["def main(self):\n    return 1, größe\n"] * 50, size)
    again = tokenizers.from_gguf(tokenizers.exportable(ours).to_gguf(330))
    for text in ("def main(x):\n        return  größe", " a  🦜\n\n", ""):
        assert again.encode(text) == ours.encode(text) and again.decode(again.encode(text)) == text
    assert (again.bos, again.eos) == (ours.bos, ours.eos)
    assert tokenizers.prompt(again, "def") == tokenizers.prompt(ours, "def")


def test_bos_chat_template_and_unused_ids_go_through_a_gguf_file(llama):
    again = tokenizers.from_gguf(llama.to_gguf(330))
    assert (again.bos, again.eos, again.vocab_size) == (1, 2, 330)
    assert again.special["chat_template"] == CONFIG["chat_template"]
    assert again.encode_chat("<|turn|>") == [320]


def test_saved_and_loaded_is_the_same(llama, tmp_path):
    tokenizers.save(llama, tmp_path)
    again = tokenizers.load(tmp_path)
    assert tokenizers.digest(again) == tokenizers.digest(llama) and again.encode_chat("<|turn|>a") == llama.encode_chat(
        "<|turn|>a"
    )


def test_vocabularies_that_gguf_cannot_represent_are_rejected():
    for options in ({"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}):
        with pytest.raises(UserError, match="expected BPE without normalization"):
            SentencePieceTokenizer(model(hard_vocab_limit=False, **options), {}).to_gguf(320)


@pytest.mark.parametrize("normalization", ["nmt_nfkc", "identity"])
def test_unigram_without_bytes_goes_through_a_gguf_file_as_t5(normalization):
    options = {"model_type": "unigram", "byte_fallback": False, "hard_vocab_limit": False}
    content = model(**options, normalization_rule_name=normalization)
    config = json.dumps({"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}).encode()
    original = tokenizers.from_files({"tokenizer.model": content, "tokenizer_config.json": config})
    written = original.to_gguf(original.vocab_size)
    assert written["tokenizer.ggml.model"] == "t5"
    assert ("tokenizer.ggml.precompiled_charsmap" in written) == (normalization == "nmt_nfkc")
    again = tokenizers.from_gguf(written)
    for text in ("hello quick fox", "  two  ①２ ｇröße", "hello 日本 fox", ""):
        assert again.encode(text) == original.encode(text)
        assert again.decode(again.encode(text)) == original.decode(original.encode(text))
        assert again.encode_with_special_tokens(text) == [
            1,
            *original.encode(text),
        ]  # EOS is not added: the file says so
    assert (again.bos, again.eos, again.unk) == (1, 2, 0)
    silent = {key: value for key, value in written.items() if not key.endswith(("add_bos_token", "add_eos_token"))}
    t5 = tokenizers.from_gguf(silent)  # as the vocabulary of T5
    assert t5.bos is None and t5.encode_with_special_tokens("hello") == [*original.encode("hello"), 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, "tokens, scores and token_type are needed"),
        ({"scores": [0.0]}, "tokens, scores and token_type are 320, 1, 320 long"),
        ({"tokens": [3] * 320}, "is malformed"),
        ({"token_type": [99] * 320}, "is malformed|cannot be read"),
        ({"tokens": ["a"] * 320}, "cannot be read"),
        ({"model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'; expected 'gpt2'"),
    ],
)
def test_damaged_vocabularies_are_one_clear_error(llama, change, message):
    metadata = llama.to_gguf(320) | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    with pytest.raises(UserError, match=message) as error:
        tokenizers.from_gguf(metadata)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no model", model()[:500]])
def test_a_file_that_is_no_model_is_one_clear_error(content):
    with pytest.raises(UserError, match="sentencepiece model cannot be read") as error:
        tokenizers.from_files({"tokenizer.model": content})
    assert "\n" not in str(error.value)


def test_a_directory_without_tokenizer_files_is_an_error():
    with pytest.raises(UserError, match=r"no tokenizer.json here; copy the files of the tokenizer into the directory"):
        tokenizers.from_files({})


@pytest.mark.slow  # fetches the assets once
@pytest.mark.parametrize("name", GOLDEN)
def test_real_vocabularies_cut_text_as_transformers_does(name):
    tokenizer = checkpoints.load_tokenizer(f"asset:{name}")
    for case in GOLDEN[name]:
        ids = tokenizer.encode(case["text"])
        assert ids == case["ids"], case["text"]
        assert [tokenizer.piece(i) for i in ids] == case["pieces"]
        spans = tokenizer.spans(case["text"])
        assert len(spans) == len(ids) and all(0 <= a <= b <= len(case["text"].encode()) for a, b in spans)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_several_ids_end_a_text(llama, file, tmp_path):
    said = {file: json.dumps({"eos_token_id": [2, 320, 7]}).encode()}
    made = tokenizers.from_files(llama.files() | said)
    assert tokenizers.eos_ids(llama) == [2] and tokenizers.eos_ids(made) == [2, 320, 7]
    assert complete.eos_ids(made, DecodingOptions()) == [2, 320, 7]
    tokenizers.save(made, tmp_path)  # a run of ours keeps them
    assert tokenizers.eos_ids(tokenizers.load(tmp_path)) == [2, 320, 7]
    assert tokenizers.eos_ids(tokenizers.from_gguf(made.to_gguf(330))) == [2, 320, 7]


def test_one_end_id_does_not_change_the_hash_of_a_tokenizer(llama):
    said = {"generation_config.json": b'{"eos_token_id": 2}'}
    assert tokenizers.digest(tokenizers.from_files(llama.files() | said)) == tokenizers.digest(llama)


@pytest.mark.parametrize("said", ['"</s>"', "[2, null]", "[true]", "2.5"])
def test_invalid_end_ids_are_rejected(llama, said):
    files = llama.files() | {"generation_config.json": f'{{"eos_token_id": {said}}}'.encode()}
    with pytest.raises(UserError, match="generation_config.json: eos_token_id is .*; expected an id or a list of ids"):
        tokenizers.from_files(files)


def test_gguf_names_three_ends(llama):
    files = llama.files() | {"generation_config.json": b'{"eos_token_id": [2, 3, 4, 5]}'}
    with pytest.raises(UserError, match="names for 3 ids that end a text; this tokenizer has 4"):
        tokenizers.from_files(files).to_gguf(330)
