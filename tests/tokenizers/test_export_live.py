"""AutoTokenizer and AutoModel (requirements-peers.txt) read what `convert --to=hf` writes. Run by .ci/full."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.checkpoints import huggingface
from llm_jax.checkpoints.families import model_config
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers import chat_template, export
from tests.tokenizers import forms
from tests.tokenizers.chat_cases import CONVERSATIONS
from tests.tokenizers.test_export import TEXTS
from tests.tokenizers.test_named_templates import NAMED

pytestmark = pytest.mark.live

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "checkpoints" / "family_golden.json").read_text())
LENGTH = 8  # tokens whose logits are compared: the first of a text, so that a family has one program for all forms
MORE_TEXTS = ["x 日本 é", "return x;\n\n        yes"]


@pytest.fixture(scope="module", params=GOLDEN)
def family(request, tmp_path_factory):
    """(directory with a tiny model of a family, our model, its parameters)."""
    kind, config = model_config(GOLDEN[request.param]["config"] | {"vocab_size": 400})
    model = Transformer(config)
    init = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    draw = lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape)  # noqa: E731
    params = jax.tree.map(draw, init)
    directory = tmp_path_factory.mktemp(request.param) / "model"
    huggingface.save(directory, kind, config, params, {})
    return directory, kind, model, params


@pytest.mark.parametrize("files", [False, True])
def test_named_chat_templates_are_chosen_as_transformers_chooses_them(tmp_path, files):
    """Read from the files that transformers writes, and written for it."""
    import transformers

    ours = forms.form("bytelevel")
    for path, content in export.transformers_files(ours, "llama").items():
        (tmp_path / path).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = NAMED
    theirs.save_pretrained(tmp_path / "theirs", save_jinja_files=files)
    assert (tmp_path / "theirs" / "additional_chat_templates").is_dir() == files
    ours = tokenizers.from_directory(tmp_path / "theirs")
    assert ours.special["chat_template"] == NAMED
    (tmp_path / "ours").mkdir()
    for path, content in export.transformers_files(ours, "llama").items():
        (tmp_path / "ours" / path).write_bytes(content)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for tools in (None, CONVERSATIONS["called"]["tools"]):
        messages = CONVERSATIONS["one"]["messages"]
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        assert again.apply_chat_template(messages, tools=tools, tokenize=False) == expected
        assert chat_template.render(ours.special, messages, answer=False, tools=tools) == expected
        named = theirs.apply_chat_template(messages, chat_template="rag", tools=tools, tokenize=False)
        rag = tokenizers.with_chat_template(ours, "rag").special
        assert chat_template.render(rag, messages, answer=False, tools=tools) == named


@pytest.mark.parametrize(
    ("kind", "model", "config"),
    [
        ("GPT2Tokenizer", "gpt2", {}),
        ("", "gpt2", {"add_prefix_space": True}),
        ("Qwen2Tokenizer", "qwen2", {}),
        ("BertTokenizer", "bert", {}),
        ("", "bert", {"do_lower_case": False}),
    ],
)
def test_tokenizers_without_tokenizer_json_are_those_of_transformers(tmp_path, kind, model, config):
    import transformers

    if model == "bert":
        pieces = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            "the",
            "The",
            "cat",
            "caf",
            "##e",
            "##é",
            "##s",
            ",",
            "日",
        ]
        (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    else:
        state = json.loads(forms.bytelevel_json())["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
        merges = "".join(" ".join(pair) + "\n" for pair in state["merges"])
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    names = {"tokenizer_class": kind} if kind else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | names))
    ours, theirs = tokenizers.from_directory(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *MORE_TEXTS, "The cafés, the CAT's 1234"]:
        if not any(token in text for token in theirs.all_special_tokens):
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), text
            assert model != "bert" or theirs(text)["input_ids"] == ours.encode_with_special_tokens(text)
    assert theirs.eos_token_id == ours.eos


def test_auto_classes_give_our_ids_and_logits(family):
    import torch
    import transformers

    directory, kind, model, params = family
    load = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    theirs = load.from_pretrained(directory, attn_implementation="eager").eval()
    method = "features" if kind == "bert" else "__call__"
    run = jax.jit(lambda params, ids: model.apply({"params": params}, ids, method=method))
    for name in forms.FORMS:
        ours = forms.form(name)
        for path, content in export.transformers_files(ours, kind).items():
            if "/" not in path:
                (directory / path).write_bytes(content)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert (tokenizer.eos_token_id, len(tokenizer)) == (ours.eos, ours.vocab_size)
        assert ours.bos in (None, tokenizer.bos_token_id) and ours.unk in (None, tokenizer.unk_token_id)
        for text in TEXTS + MORE_TEXTS:
            assert tokenizer(text)["input_ids"] == tokenizers.prompt(ours, text), (name, text)
        encoded = tokenizer("the cat sat on the mat. a dog", return_tensors="pt")
        encoded = {key: values[:, :LENGTH] for key, values in encoded.items()}
        with torch.no_grad():
            expected = theirs(**encoded)[0].numpy()
        got = run(params, jnp.asarray(encoded["input_ids"].numpy()))
        assert expected.shape[1] == LENGTH
        np.testing.assert_allclose(got[0] if kind == "bert" else got, expected, atol=2e-4, rtol=1e-4)
        (directory / "tokenizer.model").unlink(missing_ok=True)
