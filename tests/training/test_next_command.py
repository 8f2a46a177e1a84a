import pathlib

import pytest

from llm_jax import configuration, tokenizers
from llm_jax.tokenizers import PretrainedTokenizer
from llm_jax.training import next_command
from tests.tokenizers import forms

BYTES = tokenizers.get("byte").train([], 0)


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, 'generate --checkpoint=runs/x --prompt="def "'),
        ({"eval.prompts": ("a\n",)}, "generate --checkpoint=runs/x --prompt=$'a\\n'"),
        ({"eval.prompts": ("$HOME's",)}, "generate --checkpoint=runs/x --prompt=$'$HOME\\'s'"),
        ({"eval.prompts": ()}, 'generate --checkpoint=runs/x --prompt="The "'),
        ({"data.kind": "instructions"}, "chat --checkpoint=runs/x --plain"),
        ({"data.kind": "labelled", "init_from": "asset:smollm2-135m-instruct"}, "evaluate --checkpoint=runs/x"),
        ({"loss.masked": "tokens", "model.causal": False, "eval.prompts": ()}, "evaluate --checkpoint=runs/x"),
    ],
    ids=str,
)
def test_the_next_command_fits_what_was_trained(changes, command):
    config = configuration.load("default", changes)
    assert next_command.after_training(pathlib.Path("runs/x"), config, BYTES) == f"python -m llm_jax.{command}"


def test_a_model_with_a_chat_template_needs_no_plain_turns():
    config = configuration.load("default", {"data.kind": "instructions"})
    tokenizer = forms.form("bytelevel")
    assert isinstance(tokenizer, PretrainedTokenizer)
    tokenizer.special["chat_template"] = "{{ messages }}"
    try:
        command = next_command.after_training(pathlib.Path("runs/x"), config, tokenizer)
        assert command == "python -m llm_jax.chat --checkpoint=runs/x"
    finally:
        del tokenizer.special["chat_template"]
