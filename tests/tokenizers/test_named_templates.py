"""Several chat templates by name: which of them renders a conversation (transformers' rule), and their files."""

import io
import json
import sys

import pytest

from llm_jax import configuration, tokenizers
from llm_jax.checkpoints import huggingface
from llm_jax.data.encode import ENCODERS
from llm_jax.errors import UserError
from llm_jax.tokenizers import chat_template, export
from llm_jax.training import inputs
from llm_jax.training import setup as setup_lib
from llm_jax.training import start as start_lib
from tests.checkpoints.gguf_cases import small
from tests.tokenizers import forms
from tests.tokenizers.chat_cases import CHATML, CONVERSATIONS, TEMPLATES

NAMED = {"default": CHATML, "tool_use": TEMPLATES["tools"], "rag": "rag: " + CHATML}
HI = CONVERSATIONS["one"]["messages"]
TOOLS = CONVERSATIONS["called"]["tools"]


def read(config=None, **files):
    """The byte-level tokenizer with `config` as its tokenizer_config.json, and templates as files beside it."""
    contents = {"tokenizer.json": forms.bytelevel_json().encode()}
    contents["tokenizer_config.json"] = json.dumps({"eos_token": "<|endoftext|>"} | (config or {})).encode()
    paths = {"default": "chat_template.jinja"}
    contents |= {paths.get(n, f"additional_chat_templates/{n}.jinja"): t.encode() for n, t in files.items()}
    return tokenizers.from_files(contents)


def listed(templates):
    return {"chat_template": [{"name": name, "template": text} for name, text in templates.items()]}


def render(tokenizer, tools=None):
    return chat_template.render(tokenizer.special, HI, answer=False, tools=tools)


@pytest.mark.parametrize("files", [False, True])
def test_records_with_tools_take_tool_use_and_others_the_default(files):
    tokenizer = read(**NAMED) if files else read(listed(NAMED))
    assert tokenizer.special["chat_template"] == NAMED
    assert not render(tokenizer).startswith(("tools:", "rag:"))
    assert render(tokenizer, TOOLS).startswith("tools: [")
    without_tool_use = read(listed({"default": CHATML, "rag": NAMED["rag"]}))
    assert render(without_tool_use, TOOLS) == render(without_tool_use) == render(tokenizer)
    # Files of their own count before tokenizer_config.json, all of it; a default alone is the only template.
    assert read(listed(NAMED), default="x").special["chat_template"] == "x"
    assert read(listed({"default": CHATML})).special["chat_template"] == CHATML
    assert read({"chat_template": NAMED}).special["chat_template"] == NAMED
    assert read(listed(NAMED), rag="x").special["chat_template"] == {"rag": "x"}


def test_without_a_default_one_line_names_the_templates_and_the_option():
    tokenizer = read(listed({"tool_use": NAMED["tool_use"], "rag": NAMED["rag"]}))
    message = "has the chat templates rag, tool_use and no 'default'; choose one with --chat_template=NAME"
    with pytest.raises(UserError, match=message) as error:
        render(tokenizer)
    assert "\n" not in str(error.value)
    assert render(tokenizer, TOOLS).startswith("tools: [")
    with pytest.raises(UserError, match=message):
        list(ENCODERS["instructions"].encode(tokenizer, [json.dumps(CONVERSATIONS["one"])]))
    chosen = tokenizers.with_chat_template(tokenizer, "rag")
    assert render(chosen).startswith("rag: ") and render(chosen, TOOLS).startswith("rag: ")


def test_a_template_is_chosen_by_name():
    tokenizer = read(listed(NAMED))
    assert tokenizers.with_chat_template(tokenizer, "") is tokenizer
    chosen = tokenizers.with_chat_template(tokenizer, "tool_use")
    assert chosen.special == tokenizer.special | {"chat_template": NAMED["tool_use"]}
    assert chosen.encode("hello") == tokenizer.encode("hello") and chosen.eos == tokenizer.eos
    for other, names in (
        (tokenizer, "those named default, rag, tool_use"),
        (read(), "none"),
        (chosen, "those named d"),
    ):
        with pytest.raises(UserError, match=f"no chat template is named 'tools'; this tokenizer has {names}"):
            tokenizers.with_chat_template(other, "tools")
    with pytest.raises(UserError, match="this tokenizer has none"):
        tokenizers.with_chat_template(tokenizers.get("byte")(), "tool_use")


def test_training_renders_each_record_with_its_template_and_checks_what_it_shows():
    tokenizer = read(listed(NAMED))
    records = [json.dumps(CONVERSATIONS[name]) for name in ("one", "called")]
    one, called = ENCODERS["instructions"].encode(tokenizer, records)
    plain = read({"chat_template": CHATML})
    assert list(one.ids) == list(next(ENCODERS["instructions"].encode(plain, records[:1])).ids)
    assert tokenizer.decode(called.ids).startswith("tools: [")
    # The template for tools does not show them: told from the same template without tools, not from the default one.
    blind = read(listed({"default": "none " + CHATML, "tool_use": CHATML}))
    with pytest.raises(UserError, match="does not show 'tools'"):
        list(ENCODERS["instructions"].encode(blind, records[1:]))
    # One template of several has {% generation %} blocks.
    marked = read(listed({"default": TEMPLATES["generation"], "tool_use": TEMPLATES["tools"]}))
    one, called = ENCODERS["instructions"].encode(marked, records)
    expected = read({"chat_template": TEMPLATES["generation"]})
    assert list(one.mask) == list(next(ENCODERS["instructions"].encode(expected, records[:1])).mask)
    assert any(called.mask)


@pytest.mark.parametrize("form", ["bytelevel", "model"])
def test_templates_are_written_and_read_again(form, tmp_path):
    original = forms.form(form)
    config = json.dumps(original.special | {"chat_template": NAMED}).encode()
    tokenizer = type(original).from_files(original.files() | {"tokenizer_config.json": config})
    metadata = tokenizer.to_gguf(tokenizer.vocab_size)
    assert metadata["tokenizer.chat_template"] == CHATML and metadata["tokenizer.chat_template.rag"] == NAMED["rag"]
    assert metadata["tokenizer.chat_templates"] == ["tool_use", "rag"]
    assert tokenizers.from_gguf(metadata).special["chat_template"] == NAMED
    tokenizers.save(tokenizer, tmp_path / "saved")
    assert tokenizers.load(tmp_path / "saved").special["chat_template"] == NAMED
    files = export.transformers_files(tokenizer, "llama")
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == listed(NAMED)["chat_template"]
    assert tokenizers.from_files(files).special["chat_template"] == NAMED
    wrong = type(original).from_files(
        original.files()
        | {"tokenizer_config.json": json.dumps(original.special | {"chat_template": {"A-b": "x"}}).encode()}
    )
    with pytest.raises(UserError, match="GGUF has no key for the chat template 'A-b'"):
        wrong.to_gguf(wrong.vocab_size)


def test_files_of_a_directory_are_found_and_wrong_ones_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(forms.bytelevel_json())
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    (tmp_path / "chat_template.jinja").write_text("y")
    assert tokenizers.from_directory(tmp_path).special["chat_template"] == {"default": "y", "tool_use": "x"}
    for wrong in ([{"name": "default"}], [{"template": "x"}], {"default": 3}, 3):
        with pytest.raises(UserError, match="is no Jinja template with a name"):
            read({"chat_template": wrong})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory of Hugging Face with a tiny model and a tokenizer that has several chat templates."""
    path, tokenizer = tmp_path_factory.mktemp("models") / "m", read(listed(NAMED))
    config, params = small("llama", tokenizer.vocab_size)
    huggingface.save(path, "llama", config, params, export.transformers_files(tokenizer, "llama"))
    return path


@pytest.mark.parametrize(
    "flags",
    [("generate", "--prompt=a", "--chat"), ("chat",), ("evaluate", "--task=arithmetic", "--chat", "--limit=1")],
    ids=lambda flags: flags[0],
)
def test_commands_render_by_the_named_template(checkpoint, command, monkeypatch, flags):
    def render(special, *others):
        raise UserError(f"rendered by {special['chat_template']!r}")

    monkeypatch.setattr(chat_template, "render", render)
    monkeypatch.setattr(chat_template, "render_all", render)
    name, *others = flags
    for chosen, text in (("rag", NAMED["rag"]), ("", NAMED)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        done = command(name, f"--checkpoint={checkpoint}", f"--chat_template={chosen}", *others, code=2)
        assert f"rendered by {text!r}" in done.stderr
    done = command(name, f"--checkpoint={checkpoint}", "--chat_template=tools", *others, code=2)
    assert "no chat template is named 'tools'; this tokenizer has those named default, rag, tool_use" in done.stderr


def test_training_takes_the_named_template(checkpoint, tmp_path):
    """With init_from and with tokenizer.path; the run's own tokenizer then has it as its only one."""
    overrides = {
        "data.source": str(tmp_path / "chats.jsonl"),
        "data.kind": "instructions",
        "data.validation_fraction": 0.0,
    }
    overrides |= {"data.cache_dir": str(tmp_path / "cache"), "tokenizer.chat_template": "rag", "train.seq_len": 64}
    (tmp_path / "chats.jsonl").write_text(json.dumps(CONVERSATIONS["one"]) + "\n")
    for key in ("init_from", "tokenizer.path"):
        config = configuration.load("default", overrides | {key: str(checkpoint), "checkpoint.keep_best": 0})
        start = start_lib.find(config)
        loaded = inputs.load(config, start)
        assert loaded.tokenizer.special["chat_template"] == NAMED["rag"]
        text = loaded.tokenizer.decode(loaded.source.corpus(loaded.tokenizer).train.tokens)
        assert text.startswith("rag: ")


def test_the_frozen_model_of_a_loss_may_be_the_base_with_all_its_templates(checkpoint):
    overrides = {"init_from": str(checkpoint), "tokenizer.chat_template": "rag", "train.batch_size": 2}
    overrides |= {"loss.kind": "dpo", "data.kind": "preferences"}
    start = start_lib.find(configuration.load("default", overrides))
    assert setup_lib.setup(start.config).load_reference(start.tokenizer).keys() >= {"embed", "layers"}
