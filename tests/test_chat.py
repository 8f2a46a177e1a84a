import dataclasses
import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from llm_jax import chat, tokenizers
from llm_jax.decoding.prefix import PrefixCache
from llm_jax.errors import UserError
from llm_jax.tokenizers import chat_template
from tests.conftest import ROOT

# The terminal on stdin controls the process, so that Ctrl-C in it is SIGINT.
IN_TERMINAL = """
import fcntl, runpy, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("llm_jax.chat", run_name="__main__")
"""
BYTES = tokenizers.get("byte").train([], 0)


@dataclasses.dataclass
class Spoken:
    out: str
    errors: str
    code: int


@pytest.fixture
def say(command, trained, monkeypatch):
    """say(lines, *flags): a conversation with the tiny model through a pipe."""

    def run(lines, *flags, code=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        done = command("chat", f"--checkpoint={trained}", "--max_new_tokens=8", *flags, code=code)
        return Spoken(done.stdout, done.stderr, done.returncode)

    return run


def test_lines_of_a_pipe_are_answered_with_the_history(say, monkeypatch):
    rendered = []
    original = chat_template.plain_ids
    monkeypatch.setattr(
        chat_template,
        "plain_ids",
        lambda tokenizer, messages: rendered.append(messages) or original(tokenizer, messages),
    )
    done = say(["the model", "/system be brief", "", "//a token", "/reset", "/seed 5", "once more"], "--plain")
    first, second, third = rendered
    assert first == [{"role": "user", "content": "the model"}]
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"]
    assert second[0]["content"] == "be brief" and second[-1]["content"] == "/a token"
    assert second[2]["content"] == done.out.split("\n")[0].strip() or "\n" in second[2]["content"]
    assert [m["role"] for m in third] == ["system", "user"]
    assert "the system message is set" in done.out and "the seed is 5" in done.out


def test_only_the_new_tokens_of_a_conversation_are_prefilled(say, monkeypatch):
    """The text is that of a conversation that computes all tokens in every turn."""
    requests, start = [], PrefixCache.start

    def recorded(self, *arguments):
        state = start(self, *arguments)
        requests.append((self.reused, self.prefilled))
        return state

    monkeypatch.setattr(PrefixCache, "start", recorded)
    lines, flags = ["the model", "a token", "/reset", "the model"], ("--plain", "--temperature=0", "--ignore_eos")
    text, lengths = say(lines, *flags).out, [sum(request) for request in requests]
    first, second, again = requests
    assert first[0] == 0 and second[0] >= lengths[0] and again == (lengths[0] - 1, 1)
    requests.clear()
    monkeypatch.setattr(PrefixCache, "store", lambda self, state: None)
    assert say(lines, *flags).out == text and requests == [(0, length) for length in lengths]


def test_a_seed_repeats_an_answer_and_another_does_not(say):
    flags = ("--plain", "--ignore_eos", "--temperature=2")
    same = say(["the model", "/reset", "the model", "/reset", "/seed 9", "the model"], *flags).out
    first, second, third = re.split(r"a new conversation begins\n", same)
    assert first == second != third.removeprefix("the seed is 9\n")


def test_a_model_without_a_template_is_refused_and_so_are_unknown_commands(say):
    refused = say(["hello"], code=2)
    assert "has no chat template; give --plain" in refused.errors and not refused.out
    assert "unknown command /exit; expected one of /system" in say(["/exit", "/seed x"], "--plain").out
    assert "/seed x: expected a number" in say(["/seed x"], "--plain").out


def test_a_full_context_is_announced_and_a_message_that_does_not_fit_is_not_kept(say):
    done = say(["a", "word " * 30, "/reset", "a"], "--plain", "--context=24", "--ignore_eos")
    assert "the message does not fit" in done.out and "the context has 24" in done.out
    assert (
        "(the context is full; /reset removes all messages)" in done.errors
        or "(cut at --max_new_tokens=8)" in done.errors
    )
    assert say(["word " * 200], "--plain", "--context=24").out.count("does not fit") == 1


def test_plain_turns_are_those_of_training_data():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    ids = chat_template.plain_ids(BYTES, messages)
    end = ids.index(BYTES.eos)
    assert BYTES.decode(ids[1:end]) == "system: s\n\nuser: q\n\nassistant: a"
    assert BYTES.decode(ids[end + 1 :]) == "user: r\n\nassistant:"
    assert ids[0] == BYTES.bos and ids.count(BYTES.eos) == 1
    with pytest.raises(UserError, match="no chat template"):
        chat.encoder(BYTES, plain=False, checkpoint="runs/x")


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_program(trained):
    """In a terminal: an answer that would fill the context is interrupted, and the program goes on."""
    terminal, end = pty.openpty()
    flags = [f"--checkpoint={trained}", "--plain", "--ignore_eos", "--max_new_tokens=5000", "--temperature=3"]
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, *flags],
        cwd=ROOT,
        stdin=end,
        stdout=end,
        stderr=end,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(end)
    shown = ""

    def wait_for(pattern, seconds=120, press=b""):
        """Waits for text; `press` is typed now and again while nothing comes.

        CPython's input() misses a signal that arrives after the prompt is drawn and before it waits for keys.
        """
        nonlocal shown
        until = time.monotonic() + seconds
        pressed = float("-inf")
        while not (match := re.search(pattern, shown, re.DOTALL)):
            assert time.monotonic() < until and process.poll() is None, shown
            if press and time.monotonic() > pressed + 5:
                os.write(terminal, press)
                pressed = time.monotonic()
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        shown = shown[match.end() :]
        return match

    try:
        before = int(wait_for(r"\[([\d,]+) tokens left\] > ")[1].replace(",", ""))
        wait_for(r"Ctrl-D exits.*\[[\d,]+ tokens left\] > ", press=b"\x03")  # at the prompt
        os.write(terminal, b"the model\n")
        wait_for(r"compiling.*\x1b\[K[^\x1b]")  # the first text
        os.write(terminal, b"\x03")
        left = int(wait_for(r"\[([\d,]+) tokens left\] > ")[1].replace(",", ""))
        assert 0 < left < before
        os.write(terminal, b"/help\n")
        wait_for(r"/reset .*\[[\d,]+ tokens left\] > ")
        os.write(terminal, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_the_base_of_adapters_can_be_named(command, trained):
    """As in the other commands: a checkpoint without adapters has none to name."""
    done = command("chat", f"--checkpoint={trained}", f"--base={trained}", "--plain", code=2)
    assert "base" in done.stderr and done.stderr.count("\n") == 1
