"""A vocabulary, GGUF files and checkpoints of every form that several modules share."""

import dataclasses

import pytest
import tokenizers as library

import llm_jax
from llm_jax import checkpoints, trees
from llm_jax.checkpoints import gguf, gguf_model, huggingface, peft_export
from llm_jax.tokenizers.hub import HubTokenizer
from tests.checkpoints.gguf_cases import small
from tests.lora.cases import config as lora_config
from tests.lora.cases import made as make_adapters

FORMS = ("run", "adapters", "huggingface", "gguf", "peft")


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


@pytest.fixture(scope="session")
def paths(tiny, vocabulary, tmp_path_factory):
    """{form: path of a tiny checkpoint of that form}."""
    root = tmp_path_factory.mktemp("forms")
    found = {form: root / form for form in FORMS} | {"gguf": root / "model.gguf"}
    config, params = small("llama", vocabulary.vocab_size)
    huggingface.save(found["huggingface"], "llama", config, params, vocabulary.files())
    gguf_model.save(found["gguf"], config, params, vocabulary, "Q8_0")
    loaded = llm_jax.load(found["huggingface"])
    llm_jax.save(loaded, found["run"])
    settings = lora_config(tiny, rank=2, targets=("attention",))
    adapters = make_adapters(loaded.params, settings)
    base = {"path": str(found["huggingface"]), "sha256": trees.fingerprint(loaded.params)}
    whole = dataclasses.replace(checkpoints.read_config(found["run"]), lora=settings)
    writer = checkpoints.Writer(found["adapters"], whole, loaded.tokenizer, "", base=base)
    writer.save(3, adapters, {}, None)
    writer.close()
    peft_export.save(found["peft"], "llama", config, adapters, loaded.params, base_name=base["path"])
    return found
