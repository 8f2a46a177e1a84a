"""A text that allows fewer ids than the default vocabulary has."""

import gzip

import pytest

import llm_jax
from llm_jax import tokenizers
from llm_jax.errors import UserError
from llm_jax.training import inputs

TEXT = "\n\n".join(f"document {i} has few words, and these words come back: the cat sat" for i in range(60))


@pytest.fixture(params=["text.txt", "text.txt.gz"])
def source(request, tmp_path):
    path = tmp_path / request.param
    path.write_bytes(gzip.compress(TEXT.encode()) if path.suffix == ".gz" else TEXT.encode())
    return path


@pytest.mark.parametrize("size", [300, 259, 2048])
def test_a_size_that_bytes_do_not_have_is_noted(size, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    changes = {"data.source": str(tmp_path / "text.txt"), "data.cache_dir": str(tmp_path), "tokenizer.kind": "byte"}
    config = llm_jax.config("default", changes | {"train.seq_len": 16, "tokenizer.vocab_size": size})
    note = f"note: tokenizer.vocab_size={size} has no effect with tokenizer.kind='byte', which has 259 ids"
    assert (note in inputs.describe(config, inputs.load(config)).splitlines()) == (size == 300)


@pytest.mark.parametrize("kind", tokenizers.SIZED)
def test_the_default_size_is_lowered_and_an_explicit_one_is_refused(kind, source, tmp_path):
    def load(**overrides):
        data = {"data.source": str(source), "data.cache_dir": str(tmp_path), "data.workers": 1}
        config = llm_jax.config("default", data | {"train.seq_len": 16, "tokenizer.kind": kind} | overrides)
        return config, inputs.load(config)

    for _ in range(2):  # trained, then read from the cache
        config, data = load()
        size = data.tokenizer.vocab_size
        assert 4 < size < config.tokenizer.vocab_size == 2048 and data.vocab_size == size
        note = f"note: the vocabulary has {size} ids, the maximum for this text; the default is 2048"
        assert note in inputs.describe(config, data).splitlines()
    with pytest.raises(UserError, match=f"{size}"):
        load(**{"tokenizer.vocab_size": 2048})
    if kind in ("bpe", "word"):
        config, data = load(**{"tokenizer.vocab_size": size})
        assert data.tokenizer.vocab_size == size and "note: the vocabulary" not in inputs.describe(config, data)
