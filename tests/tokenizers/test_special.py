"""Tokens that end a text: from the files of a checkpoint, the tokenizer's class, GGUF metadata, and names."""

import json

import pytest

from llm_jax import tokenizers
from llm_jax.decoding import complete
from llm_jax.decoding.options import DecodingOptions
from tests.tokenizers import forms

END, START, IM_END = 0, 1, 2  # the ids of `forms.CHATML`


def read(**files):
    """The byte-level tokenizer with files beside it, by name without .json."""
    content = {f"{name}.json": json.dumps(value).encode() for name, value in files.items()}
    return tokenizers.from_files({"tokenizer.json": forms.bytelevel_json().encode()} | content)


@pytest.mark.parametrize(
    ("files", "eos", "ends"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, IM_END, [IM_END, END]),  # <|endoftext|> by its name
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, IM_END, [IM_END, END]),
        ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}, IM_END, [IM_END, END]),
        ({"special_tokens_map": {"eos_token": "<|im_end|>"}, "tokenizer_config": {}}, IM_END, [IM_END, END]),
        # The union of what the files name.
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}, "generation_config": {"eos_token_id": [0]}}, IM_END, [2, 0]),
        (
            {"tokenizer_config": {"eos_token": "<|endoftext|>"}, "generation_config": {"eos_token_id": [0, 2]}},
            0,
            [0, 2],
        ),
        (
            {
                "tokenizer_config": {"eos_token": "<|endoftext|>"},
                "generation_config": {"eos_token_id": 5},
                "config": {"eos_token_id": 7},
            },
            END,
            [0, 5, 7],
        ),
        # A chat model whose EOS ends documents: the end of a turn ends generation by its name.
        ({"tokenizer_config": {"eos_token": "<|endoftext|>"}, "config": {"eos_token_id": 0}}, END, [END, IM_END]),
        # GPT-2 as published: the class knows it.
        ({"tokenizer_config": {"model_max_length": 1024}, "config": {"model_type": "gpt2"}}, END, [END, IM_END]),
        ({"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast"}}, END, [END, IM_END]),
        ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}}, None, [IM_END, END]),  # it lacks </s>
        # No name, but an id.
        ({"generation_config": {"eos_token_id": [2, 0]}}, IM_END, [IM_END, END]),
        ({"config": {"eos_token_id": 0}}, END, [END, IM_END]),
        # null says that there is none.
        ({"tokenizer_config": {"eos_token": None}, "config": {"model_type": "gpt2"}}, None, [IM_END, END]),
    ],
)
def test_what_ends_documents_and_what_ends_generation(files, eos, ends, tmp_path):
    tokenizer = read(**files)
    assert tokenizer.eos == eos and tokenizers.eos_ids(tokenizer) == ends
    assert complete.eos_ids(tokenizer, DecodingOptions()) == ends
    assert complete.eos_ids(tokenizer, DecodingOptions(eos=(9, ends[0]))) == [9, *ends]
    assert tokenizers.document(tokenizer, "a")[1:] == ([] if eos is None else [eos])
    tokenizers.save(tokenizer, tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.eos == eos and tokenizers.eos_ids(again) == ends


def test_bos_unk_and_pad_come_from_the_same_files():
    gpt2 = read(tokenizer_config={}, config={"model_type": "gpt2"})
    assert (gpt2.special["bos_token"], gpt2.special["unk_token"], gpt2.bos) == ("<|endoftext|>", "<|endoftext|>", None)
    named = read(special_tokens_map={"bos_token": "<|im_start|>", "pad_token": "<|endoftext|>"})
    assert named.special_ids["bos_token_id"] == START and named.special_ids["pad_token_id"] == END
    assert read(tokenizer_config={"add_bos_token": True}, special_tokens_map={"bos_token": "<|im_start|>"}).bos == START


def test_added_tokens_of_a_sentencepiece_model_are_in_their_own_file():
    model = {"tokenizer.model": forms.sentencepiece_model()}
    plain = tokenizers.from_files(model)
    size = plain.vocab_size
    made = tokenizers.from_files(model | {"added_tokens.json": json.dumps({"<|im_end|>": size}).encode()})
    assert made.vocab_size == size + 1 and made.encode_chat("<|im_end|>") == [size]
    assert tokenizers.eos_ids(plain) == [2] and tokenizers.eos_ids(made) == [2, size]


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        ({}, [END, IM_END]),  # llama.cpp's rule of names where the keys are silent
        ({"tokenizer.ggml.eot_token_id": START}, [END, START]),
        ({"tokenizer.ggml.eot_token_id": START, "tokenizer.ggml.eom_token_id": IM_END}, [END, START, IM_END]),
        ({"tokenizer.ggml.eos_token_id": IM_END}, [IM_END, END]),
    ],
)
def test_gguf_names_ends_by_keys_or_by_names(change, ends):
    silent = read(tokenizer_config={"eos_token": "<|endoftext|>"})
    metadata = silent.to_gguf(silent.vocab_size)
    metadata = {k: v for k, v in metadata.items() if "eot" not in k and "eom" not in k} | change
    tokenizer = tokenizers.from_gguf(metadata)
    assert tokenizers.eos_ids(tokenizer) == ends
    again = tokenizers.from_gguf(tokenizer.to_gguf(tokenizer.vocab_size))  # what is written says it again
    assert tokenizers.eos_ids(again) == ends and again.eos == tokenizer.eos


@pytest.mark.parametrize("special", [("<|return|>", "<|call|>", "<|end|>"), ("<|end|>", "<|call|>")])
def test_a_token_that_ends_a_message_is_not_an_end_if_others_end_the_text(special):
    """Where <|return|> and <|call|> end texts, <|end|> ends a message of several."""
    tokenizer = tokenizers.from_files({"tokenizer.json": forms.bytelevel_json(special).encode()})
    assert [tokenizer.piece(i) for i in tokenizers.eos_ids(tokenizer)] == (
        ["<|return|>", "<|call|>"] if len(special) == 3 else ["<|end|>", "<|call|>"]
    )


def test_answers_in_training_end_as_the_template_ends_them():
    from llm_jax.data.encode import ENCODERS
    from tests.tokenizers.chat_cases import CHATML, CONVERSATIONS

    tokenizer = read(tokenizer_config={"eos_token": "<|endoftext|>", "chat_template": CHATML})
    (example,) = ENCODERS["instructions"].encode(tokenizer, [json.dumps(CONVERSATIONS["one"])])
    assert IM_END in example.ids and END not in example.ids
    plain = read(config={"model_type": "gpt2"}, tokenizer_config={})
    (example,) = ENCODERS["instructions"].encode(plain, [json.dumps({"prompt": "a ", "answer": "b"})])
    assert example.ids[-1] == END and example.mask[-1] == 1
