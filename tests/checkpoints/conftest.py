"""A vocabulary and GGUF files that several modules share."""

import pytest
import tokenizers as library

from llm_jax.checkpoints import gguf, gguf_model
from llm_jax.tokenizers.hub import HubTokenizer
from tests.checkpoints.gguf_cases import small


@pytest.fixture(scope="session")
def vocabulary():
    """A byte-level byte-pair tokenizer with a special token and a chat template."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Digits(individual_digits=True),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the model reads the text and the text reads 1234"] * 9, trainer)
    return HubTokenizer(made.to_str(), {"eos_token": "<end>", "chat_template": "{{ messages[0]['content'] }}<end>"})


@pytest.fixture(scope="session", params=gguf_model.ARCHITECTURES)
def written(request, vocabulary, tmp_path_factory):
    """(path, config, parameters) of a file in F32."""
    config, params = small(request.param, vocabulary.vocab_size + 3)
    path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    gguf_model.save(path, config, params, vocabulary, "F32")
    return path, config, params


@pytest.fixture(scope="session")
def plain(vocabulary, tmp_path_factory):
    """The content of a file of a Llama with heads of 32."""
    config, params = small("llama", vocabulary.vocab_size)
    path = tmp_path_factory.mktemp("plain") / "m.gguf"
    gguf_model.save(path, config, params, vocabulary, "F32")
    return gguf.read(path)
