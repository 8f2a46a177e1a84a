import re

import pytest

from llm_jax import tokenizers
from llm_jax.errors import UserError
from llm_jax.tokenizers import show, train


def test_a_tokenizer_is_trained_and_shown(command, text_file, tmp_path):
    said = command(
        "tokenizers.train", "--kind=word", "--vocab_size=18", f"--input={text_file}", f"--output={tmp_path / 'w'}"
    )
    digest = tokenizers.digest(tokenizers.load(tmp_path / "w"))
    assert said.stdout == f"wrote {tmp_path / 'w'}: word, 18 ids, sha256 {digest[:12]}\n"
    shown = command(
        "tokenizers.show", f"--tokenizer={tmp_path / 'w'}", "--tokenizer=byte", "--text=the zoo\x1b reads", "--ids"
    ).stdout
    assert "|[the]|[ zoo]|[\\x1b]| reads|" in shown.replace("|the|", "|[the]|") and "\x1b" not in shown
    assert "4 tokens, 1.33 a word, 2 unknown" in shown or "4 tokens, 1.33 a word, 3 unknown" in shown
    assert re.search(r"\d+ +8-14 +reads +\| +\d+ +3-4", shown)
    again = command(
        "tokenizers.train", "--kind=byte", f"--input={text_file}", f"--output={tmp_path / 'w'}", code=2
    ).stderr
    assert "exists; give another" in again


def test_colours_tell_neighbours_apart_and_unknowns_are_red():
    tokenizer = tokenizers.get("char").train(["ab"], 9)
    assert show.painted("abx", tokenizer, True) == "\x1b[48;5;24ma\x1b[0m\x1b[48;5;58mb\x1b[0m\x1b[41mx\x1b[0m"
    assert show.painted("abx", tokenizer, False) == "|a|b|[x]|"


def test_more_text_than_the_sample_is_drawn_in_blocks_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_BLOCK", 1000)
    path, text = tmp_path / "a.txt", "".join(f"größe {i} 🦜 " for i in range(4000))
    path.write_text(text)
    assert "".join(train.texts([path, path], 10**9)) == text * 2
    drawn = list(train.texts([path], 10_000))
    assert len(drawn) == 10 and drawn == list(train.texts([path], 10_000))
    assert all(part in text and "\ufffd" not in part and len(part.encode()) <= 1003 for part in drawn)
    places = [text.index(part) / len(text) for part in drawn]
    assert min(places) < 0.3 and max(places) > 0.7


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file or directory"), (b"ab\xff" + b"c" * 50, "not UTF-8 text at byte 2"), (b"", "vocabulary")],
)
def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, content, message):
    if content is not None:
        (tmp_path / "in.txt").write_bytes(content)
    said = command(
        "tokenizers.train",
        "--kind=bpe",
        "--vocab_size=300",
        f"--input={tmp_path / 'in.txt'}",
        f"--output={tmp_path / 'out'}",
        code=2,
    ).stderr
    assert message in said and said.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial*"))


def test_a_shown_name_that_is_no_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError):
        show.read(str(tmp_path / "none"))


def test_train_takes_every_kind(command, text_file, tmp_path):
    """The trainer of models: `tokenizer.kind` is any of `TRAINED`."""
    flags = ("--config.train.steps=3", "--config.tokenizer.kind=word", "--config.tokenizer.vocab_size=18")
    command("train", f"--workdir={tmp_path / 'run'}", *flags)
    loaded = tokenizers.load(next((tmp_path / "run").rglob("kind.json")).parent)
    assert loaded.kind == "word" and loaded.vocab_size == 18
