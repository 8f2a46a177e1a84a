import re

import pytest
import tokenizers as library

from llm_jax import checkpoints, configuration, tokenizers
from llm_jax.data import text_blocks
from llm_jax.errors import UserError
from llm_jax.tokenizers import token_text
from llm_jax.training import inputs


def test_a_tokenizer_is_trained_and_shown(command, text_file, tmp_path):
    said = command(
        "train_tokenizer", "--kind=word", "--vocab_size=18", f"--input={text_file}", f"--output={tmp_path / 'w'}"
    )
    digest = tokenizers.digest(tokenizers.load(tmp_path / "w"))
    assert said.stdout == f"wrote {tmp_path / 'w'}: word, 18 ids, sha256 {digest[:12]}\n"
    shown = command(
        "show", "tokens", f"--tokenizer={tmp_path / 'w'}", "--tokenizer=byte", "--text=the zoo\x1b reads", "--ids"
    ).stdout
    assert "|[the]|[ zoo]|[\\x1b]| reads|" in shown.replace("|the|", "|[the]|") and "\x1b" not in shown
    assert "4 tokens, 1.33 a word, 2 unknown" in shown or "4 tokens, 1.33 a word, 3 unknown" in shown
    assert re.search(r"\d+ +8-14 +' reads' +\| +\d+ +3-4", shown)
    again = command(
        "train_tokenizer", "--kind=byte", f"--input={text_file}", f"--output={tmp_path / 'w'}", code=2
    ).stderr
    assert "already exists; choose another path" in again


def test_a_run_takes_a_tokenizer_and_goes_on_with_no_other(command, text_file, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("the model reads a token and then the token after it returns one line of text " * 9)
    flags = ("--kind=word", "--vocab_size=18")
    command("train_tokenizer", *flags, f"--input={words}", f"--output={tmp_path / 'w'}")
    own = tokenizers.load(tmp_path / "w")
    run = (f"--workdir={tmp_path / 'run'}", f"--config.tokenizer.path={tmp_path / 'w'}")
    run += ("--config.optim.schedule=constant",)  # one program for all numbers of steps
    said = command("train", *run, "--config.train.steps=4").stdout
    assert f"tokenizer word, 18 ids ({tokenizers.digest(own)[:12]})" in said
    assert tokenizers.digest(checkpoints.load_tokenizer(tmp_path / "run")) == tokenizers.digest(own)
    assert "resuming from" in command("train", *run, "--config.train.steps=6").stdout
    (tmp_path / "w").rename(tmp_path / "old")
    words.write_text(
        "another text of other words that no one reads or returns after the other line of tokens it is " * 9
    )
    command("train_tokenizer", *flags, f"--input={words}", f"--output={tmp_path / 'w'}")
    refused = command("train", *run, "--config.train.steps=8", code=2).stderr
    (tmp_path / "w").rename(tmp_path / "new")  # the checkpoint has its own
    assert "resuming from" in command("train", *run, "--config.train.steps=8").stdout
    assert "differs from the tokenizer of the weights" in refused and len(refused.strip().splitlines()) == 1
    nothing = command("train", run[0] + "2", f"--config.tokenizer.path={tmp_path / 'no'}", code=2).stderr
    assert (
        f"tokenizer.path={tmp_path / 'no'}: " in nothing
        and "train_tokenizer" in nothing
        and len(nothing.strip().splitlines()) == 1
    )


def test_a_set_kind_or_size_that_contradicts_the_path_is_refused_and_a_recipes_is_replaced(text_file, cache, tmp_path):
    tokenizers.save(tokenizers.get("char").train(["the model"], 60), tmp_path / "w")
    data = {"data.cache_dir": str(cache), "data.source": "/nowhere", "tokenizer.path": str(tmp_path / "w")}
    for key, value in (("tokenizer.kind", "byte"), ("tokenizer.vocab_size", 300)):
        with pytest.raises(UserError, match=f"{key}={value} contradicts tokenizer.path={tmp_path}") as refused:
            inputs.load(configuration.load("tiny", data | {key: value}))
        assert "\n" not in str(refused.value)
    recipe = configuration.load("tiny", {"tokenizer.kind": "byte"})  # a later path replaces an earlier kind
    size = {"tokenizer.kind": "char", "tokenizer.vocab_size": 12}
    for config in (configuration.load("tiny", data), configuration.replace(recipe, data), configuration.load(
        configuration.load("tiny", data), size
    )):  # fmt: skip
        with pytest.raises(UserError, match="/nowhere"):
            inputs.load(config)
    assert "tokenizer.kind" in configuration.load(configuration.load("tiny", data), {"tokenizer.path": ""}).explicit


def test_colours_tell_neighbours_apart_and_unknowns_are_red():
    tokenizer = tokenizers.get("char").train(["ab"], 9)
    assert token_text.colored("abx", tokenizer, True) == "\x1b[48;5;24ma\x1b[0m\x1b[48;5;58mb\x1b[0m\x1b[41mx\x1b[0m"
    assert token_text.colored("abx", tokenizer, False) == "|a|b|[x]|"


def test_more_text_than_the_sample_is_drawn_in_blocks_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(text_blocks, "_BLOCK", 1000)
    path, text = tmp_path / "a.txt", "".join(f"größe {i} 🦜 " for i in range(4000))
    path.write_text(text)
    assert "".join(text_blocks.texts([path, path], 10**9)) == text * 2
    drawn = list(text_blocks.texts([path], 10_000))
    assert len(drawn) == 10 and drawn == list(text_blocks.texts([path], 10_000))
    assert all(part in text and "\ufffd" not in part and len(part.encode()) <= 1003 for part in drawn)
    places = [text.index(part) / len(text) for part in drawn]
    assert min(places) < 0.3 and max(places) > 0.7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or directory"),
        (b"ab\xff" + b"c" * 50, "not UTF-8 text at byte 2"),
        (b"", "contains no text"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, content, message):
    if content is not None:
        (tmp_path / "in.txt").write_bytes(content)
    said = command(
        "train_tokenizer",
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
        checkpoints.load_tokenizer(str(tmp_path / "none"))


def of_bytes(tmp_path, normalizer=None):
    """A directory of a byte-level tokenizer.json with an added token."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.normalizer = normalizer
    letters = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=270, show_progress=False, initial_alphabet=letters)
    made.train_from_iterator(["the reader reads the text"] * 9, trainer)
    made.add_tokens(["größe"])
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "größe"}')
    return tmp_path


def test_spans_of_byte_pairs_tile_the_text(tmp_path):
    tokenizer = checkpoints.load_tokenizer(
        str(of_bytes(tmp_path))
    )  # a directory of nothing else, with what stands beside it
    text = "naïve 🦜 the größe 日本"
    spans = tokenizer.spans(text)
    assert tokenizer.eos is not None and len(spans) == len(tokenizer.encode(text))
    assert [0, *(end for _, end in spans)] == [*(begin for begin, _ in spans), len(text.encode())]
    assert "\\xf0|" in token_text.colored(text, tokenizer, False)
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.spans("a\ud800")


def test_a_terminal_is_sent_no_control_characters(tmp_path):
    dropping = library.normalizers.BertNormalizer(lowercase=False)
    text = "\x1b]0;x\x07the\x1b text\x1b"
    for tokenizer in (
        checkpoints.load_tokenizer(str(of_bytes(tmp_path, dropping))),
        tokenizers.get("bpe").train([text * 9] * 9, 290),
    ):
        for shown in (token_text.colored(text, tokenizer, False), "\n".join(token_text.table(text, tokenizer))):
            assert "\x1b" not in shown and "\x07" not in shown


def test_broken_files_are_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "kind.json").write_text('{"kind": "byte"}')
    with pytest.raises(UserError, match="no readable tokenizer here .'sha256'"):
        tokenizers.load(tmp_path)


def test_train_takes_every_kind(command, text_file, tmp_path):
    """The trainer of models: `tokenizer.kind` is any of `TRAINED`."""
    flags = ("--config.train.steps=3", "--config.tokenizer.kind=word", "--config.tokenizer.vocab_size=18")
    command("train", f"--workdir={tmp_path / 'run'}", *flags)
    loaded = tokenizers.load(next((tmp_path / "run").rglob("kind.json")).parent)
    assert loaded.kind == "word" and loaded.vocab_size == 18
