"""The pages of concepts and the how-tos are complete: every registered kind, every command, and code that exists."""

import dataclasses
import functools
import importlib
import re

import pytest

from experiments.statements import STATEMENTS
from llm_jax import tokenizers
from llm_jax.__main__ import COMMANDS
from llm_jax.decoding.options import DecodingOptions
from llm_jax.evaluation import builtin, templates
from llm_jax.kernels import number_formats
from llm_jax.lora import adapt
from llm_jax.model import attention_kernels, layers, positions, rope, stages
from llm_jax.quant import methods
from llm_jax.training import losses, optim
from tests.doc_blocks import ROOT

DOCS = ROOT / "docs"
FLAGS = {
    f"--{field.name}"
    for field in dataclasses.fields(DecodingOptions)
    if field.metadata["group"] in ("sampling", "penalties", "search")
}
# The registered kinds that the page of their concept must name.
KINDS = {
    "tokenization": {*tokenizers.KINDS},
    "word_vectors": {"skipgram", "cbow", "glove"},
    "attention": {*layers.ACTIVATIONS, *stages.LAYER_KINDS, *attention_kernels.IMPLEMENTATIONS},
    "positions": {*positions.SCHEMES, *rope.SCALINGS},
    "quantization": {*number_formats.WEIGHT_SCHEMES, *methods.METHODS},
    "adapters": {*adapt.TRAINED, *adapt.PRESETS},
    "decoding": FLAGS,
    "how_to/generate": FLAGS,
    "prompting": {*templates.STYLES},
    "how_to/evaluate": {*templates.STYLES, *builtin.TASKS},
    "training": {*losses.KINDS, *optim.OPTIMIZERS, *optim.SCHEDULES},
}
CONCEPTS = [name for name in KINDS if "/" not in name] + ["contextual_vectors", "evaluation"]


def text(name):
    return (DOCS / f"{name}.md").read_text()


def unnamed(kinds, page):
    """The kinds that the text of a page does not name in code, alone or as the value or prefix of an option."""
    code = " ".join(re.findall(r"`([^`\n]+)`", page))
    return {kind for kind in kinds if not re.search(rf"(?<![\w.]){re.escape(kind)}(?!\w)", code)}


@pytest.mark.parametrize("name", KINDS)
def test_every_registered_kind_is_on_the_page_of_its_concept(name):
    assert unnamed(KINDS[name], text(name)) == set()


def test_a_kind_that_a_page_lacks_is_found():
    page = text("positions")
    assert unnamed({"alibi", "new_scheme"}, page) == {"new_scheme"}
    assert unnamed({"ntk"}, page.replace("`ntk`", "ntk")) == {"ntk"}


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_has_its_formula_code_measurements_and_papers(name):
    page = text(name)
    assert "$$" in page and "## What was measured" in page and "## Papers" in page
    assert re.search(r"`llm_jax/[\w/]+\.py:\w+", page), "no function or class is named"
    assert "```bash" in page or "```python" in page, "no override is shown"


def test_every_statement_is_on_a_page():
    blocks = [block for path in DOCS.glob("*.md") for block in re.findall(r"```{measured} (.*)", path.read_text())]
    assert {name for block in blocks for name in block.split()} == {*STATEMENTS}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_how_to_that_runs_it(command):
    page = text(f"how_to/{command}")
    assert page.startswith(f"# {command}: ") and f"\npython -m llm_jax.{command}" in page.replace(
        "| python", "\npython"
    )
    assert f"\nhow_to/{command}\n" in text("index")


@pytest.mark.parametrize("page", sorted(DOCS.glob("**/*.md")), ids=lambda page: page.stem)
def test_the_code_that_a_page_names_exists(page):
    if "_build" in page.parts or "experiments" in page.relative_to(DOCS).parts:
        return
    for path, name in re.findall(r"`(llm_jax/[\w/]+)\.py:([\w.]+)`", page.read_text()):
        functools.reduce(getattr, name.split("."), importlib.import_module(path.replace("/", ".")))
