import json
import re

import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.data import row_text
from llm_jax.data.rows import Packed, Rows
from llm_jax.tokenizers import token_text
from tests.data.test_data import stream
from tests.data.test_examples import split
from tests.tokenizers import forms

BYTE = tokenizers.get("byte").train([], 0)


def test_segments_give_back_the_documents_and_what_counts():
    found = list(row_text.segments(Rows(stream(5, 4, 9), 6)[0]))
    assert found == [
        [(1, False), (100, True), (101, True), (102, True), (2, True)],
        [(1, False), (200, True)],
    ]
    made = split(5, 3)
    (row,) = (Packed(made, 8)[i] for i in range(1))
    shown = sorted(row_text.segments(row))
    assert [[t for t, _ in s] for s in shown] == [[100, 101, 102, 103, 104], [200, 201, 202]]
    assert [[c for _, c in s] for s in shown] == [[False, False, True, True, True], [False, True, True]]
    assert not list(row_text.segments({"segments": np.zeros(4, np.int32)}))


def test_lines_say_what_counts_and_no_text_commands_the_terminal():
    tokens = [
        (1, False),
        *((i, False) for i in BYTE.encode("ask\n")),
        *((i, True) for i in BYTE.encode("é\x1b[31m\n")),
        (2, True),
    ]
    assert list(row_text.lines(BYTE, tokens, ("", ""))) == ["- <bos>ask↵", "+ é\\x1b[31m↵", "+ <eos>"]
    assert next(row_text.lines(BYTE, tokens, ("G", "N"))) == "N- <bos>ask↵\033[0m"


def test_the_command_shows_rows(tmp_path, command):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"ask {i} ", "answer": "yes"}) + "\n" for i in range(40)))
    flags = (
        "--config=tests/tiny.py",
        f"--config.data.source={path}",
        f"--config.data.cache_dir={tmp_path}",
        "--config.data.kind=instructions",
    )
    said = command("show", "rows", *flags, "--rows=1").stdout.splitlines()
    assert said[0].startswith("row 0: ") and "in 2 segments, 8 counted targets" in said[0]
    heads = [
        re.fullmatch(r"segment \d: (\d+) tokens( \(the last token is only a target, not an input\))?", line)
        for line in said
    ]
    inputs = sum(int(head[1]) - bool(head[2]) for head in heads if head)
    assert f"row 0: {inputs} inputs in 2 segments" in said[0]
    assert said[2].startswith("- <bos>ask ") and said[3] == "+ yes<eos>"
    assert len(command("show", "rows", *flags, "--rows=99", "--held_out").stdout.splitlines()) < 40
    assert "expected at least 1 row" in command("show", "rows", *flags, "--rows=0", code=2).stderr


@pytest.mark.parametrize("form", ["byte", "bytelevel", "metaspace"])
def test_bytes_of_a_part_of_a_character_are_readable(form):
    """Byte-level BPE writes them in an alphabet of its own, such as "ðŁ"."""
    tokenizer = BYTE if form == "byte" else forms.form(form)
    text = "🙂"
    labels = [token_text.label(tokenizer, i) for i in tokenizer.encode(text)]
    assert "".join(label for label in labels if label not in ("▁", "")) == "<0xF0><0x9F><0x99><0x82>"
    assert token_text.label(tokenizer, tokenizer.encode("a")[-1]) == "a"


def test_special_tokens_have_their_names_and_a_newline_that_counts_is_seen():
    tokenizer = forms.form("bytelevel")
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    ids = tokenizer.encode_chat(text)
    counted = text.index("yes")
    tokens = [(i, end > counted) for i, (_, end) in zip(ids, tokenizer.chat_offsets(text), strict=True)]
    assert list(row_text.lines(tokenizer, tokens, ("", ""))) == [
        "- <|im_start|>user↵",
        "- hi<|im_end|>↵",
        "- <|im_start|>assistant↵",
        "+ yes<|im_end|>↵",
    ]
