"""The display of tokenizers."""

from llm_jax import tokenizers
from llm_jax.pictures.token_splits import tokens


def test_tokenizers_are_displayed_with_kind_size_special_ids_and_hash():
    for kind in ("byte", "char", "byte_bpe"):
        tokenizer = tokenizers.get(kind).train(["the cat <sat> on the mat, the cat sat"] * 4, 264)
        name, sha256 = type(tokenizer).__name__, tokenizers.digest(tokenizer)[:12]
        assert repr(tokenizer) == (
            f"{name}(kind='{kind}', vocab_size={tokenizer.vocab_size}, bos={tokenizer.bos}, eos={tokenizer.eos}, "
            f"unk={tokenizer.unk}, sha256='{sha256}...')"
        )
        assert f"<td>{kind}</td>" in tokenizer._repr_html_() and sha256 in tokenizer._repr_html_()


def test_the_table_of_tokens_has_their_text_not_their_pieces():
    tokenizer = tokenizers.get("wordpiece").train(["the cat sat on a mat the cat the cat"] * 9, 30)
    assert "##he" in map(tokenizer.piece, tokenizer.encode("the cat"))
    result = tokens(tokenizer, "the cat", ids=True)
    assert "##" not in result.text() and "'he'" in result.text() and "' cat'" in result.text()
    assert "##" not in result.html()
