"""The notebooks of experiments/colab: committed without outputs, with equal first cells, and executed from a wheel."""

import ast
import json
import os
import re
import sys

import pytest

from tests.conftest import ROOT
from tests.test_package import python as python
from tests.test_package import sdist as sdist
from tests.test_package import wheel as wheel

FOLDER = ROOT / "experiments" / "colab"
README = (ROOT / "README.md").read_text()
NAMES = ("quickstart", "finetune", "ablation", "from_scratch")


def cells(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


def code(name):
    return ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]


def test_all_notebooks_are_known():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_without_outputs_and_in_short_cells(name):
    for cell in cells(name):
        assert len(cell["source"]) <= 20, cell["source"][0]
        assert not cell["metadata"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["source"]
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert text.endswith("\n") and not re.search(r"[\"' (]/(?:work|tmp|root|home|content)/", text)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_installs_in_colab_alone_from_one_address(name):
    """The address is filled in once for all notebooks; the badges in the README name the same repository."""
    first = code(name)[0]
    assert first == code(NAMES[0])[0]
    assert first.count("%pip") == 1 and 'if "google.colab" in sys.modules:' in first
    (address,) = re.findall(r'^PROJECT = "(.*?)"', first, re.M)
    badges = re.findall(r"\(https://colab\.research\.google\.com/github/([^)]*?)/blob/main/([^)]*)\)", README)
    assert f"experiments/colab/{name}.ipynb" in [path for _, path in badges]
    repository = address.removeprefix("https://github.com/") or "OWNER/REPOSITORY"
    assert {owner for owner, _ in badges} == {repository}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_that_a_notebook_imports_exists(name):
    for source in code(name):
        lines = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.splitlines()]
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llm_jax"):
                module = __import__(node.module, fromlist=["_"])
                for alias in node.names:
                    assert hasattr(module, alias.name) or __import__(f"{node.module}.{alias.name}"), alias.name


def execute(notebook, python, directory, **environment):
    """Runs all cells in a kernel of `python`, and returns the notebook with its outputs."""
    import nbclient
    import nbformat

    kernel = directory / "jupyter" / "kernels" / "installed"
    kernel.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "installed", "language": "python"})
    )
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment = inherited | {"JAX_PLATFORMS": "cpu"} | environment
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = str(directory / "jupyter")
    try:
        executed = nbformat.read(notebook, as_version=4)
        executed.cells.append(nbformat.v4.new_code_cell("import llm_jax; print('package:', llm_jax.__file__)"))
        resources = {"metadata": {"path": str(directory)}}
        client = nbclient.NotebookClient(executed, timeout=900, kernel_name="installed", resources=resources)
        client.execute(env=environment)
    finally:
        os.environ.pop("JUPYTER_PATH") if before is None else os.environ.update(JUPYTER_PATH=before)
    return executed


def printed(executed):
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return text, pictures


def number(pattern, text):
    return float(re.search(pattern, text)[1])


def check_quickstart(text, pictures, directory):
    assert pictures == 9 and "async def " in text
    dense, int8, int4 = (number(rf"{name} +loss ([\d.]+)", text) for name in ("dense", "int8", "int4"))
    assert 0.5 < dense < 5 and abs(int8 - dense) < 0.05 and int8 <= int4 + 0.05
    before, after = (number(rf"loss on email: .*?([\d.]+) {when}", text) for when in ("before", "after"))
    assert after < before - 0.1  # the adapters have learned


def check_finetune(text, pictures, directory):
    assert " legs" in text.split("trained parameters")[1]
    assert number(r"after the round trip: ([\d.e-]+)", text) < 1e-4
    assert (directory / "adapter" / "adapter_model.safetensors").exists()


def check_ablation(text, pictures, directory):
    assert pictures == 2 and "Traceback" not in text
    low, high = number(r"interval (-?[\d.]+) to", text), number(r"interval -?[\d.]+ to (-?[\d.]+)", text)
    verdict = re.search(r"rotary positions lower the held-out loss: (\w+)", text)[1]
    assert low < high and verdict == ("holds" if low > 0 else "fails" if high < 0 else "undecided")
    assert len(list((directory / "sweep").glob("*/summary.json"))) == 6
    assert json.loads((directory / "sweep" / "results.json").read_text())[0]["n"] == 3


def check_from_scratch(text, pictures, directory):
    none, own = (number(rf"{name} +([\d.]+) bits per byte", text) for name in ("none", "own"))
    assert pictures == 2 and own < none and text.count("rate by head: [") == 1


CHECKS = {
    "quickstart": check_quickstart,
    "finetune": check_finetune,
    "ablation": check_ablation,
    "from_scratch": check_from_scratch,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom_outside_the_repository(name, python, tmp_path):
    text, pictures = printed(execute(FOLDER / f"{name}.ipynb", python, tmp_path))
    assert str(python.parents[1]) in text.split("package: ")[1]  # the wheel, not the checkout
    CHECKS[name](text, pictures, tmp_path)


@pytest.mark.live
def test_peft_loads_the_adapter_of_the_notebook(tmp_path):
    text, _ = printed(execute(FOLDER / "finetune.ipynb", sys.executable, tmp_path, PYTHONPATH=str(ROOT)))
    assert number(r"largest difference to peft: ([\d.e-]+)", text) < 1e-3


OBJECTS = """import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import dataclasses, jax, jax.numpy as jnp
import llm_jax
from llm_jax import lora, tokenizers, weights
from llm_jax.model.transformer import Transformer
from llm_jax.weights import IN, Adapted, Decomposed, FakeQuant, InputDropout

sizes = {"model.width": 32, "model.num_layers": 1, "model.num_heads": 2, "model.num_kv_heads": 2, "model.mlp_dim": 64}
config = llm_jax.config("tiny", {"tokenizer.kind": "byte", "model.vocab_size": 259} | sizes)
model, byte = Transformer(config.model), tokenizers.get("byte").train([], 0)
params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
w, rank_2 = jnp.ones((64, 32)), dataclasses.replace(config.lora, rank=2)
q, encoded = weights.quantize(w, "int4", IN), weights.quantize(w, "ternary.py:Ternary()", IN)
adapted = Adapted(w, jnp.ones((64, 2)), jnp.zeros((2, 32)), jnp.ones(()))
mesh = jax.make_mesh((2,), ("data",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
sharded = jax.device_put(w, sharding)
"""
TREES = {  # expression: text of its display without scripts; the pages of treescope are compressed
    "model": "Transformer",
    "config": "ModelConfig",
    "params": "attention",
    "w": "Array([[1., 1.",
    "q": "QTensor(codes=uint8[32, 32]",
    "encoded": "Ternary()",
    "adapted": "Adapted",
    "Decomposed(adapted, jnp.ones(32), jnp.ones(32))": "magnitude",
    "InputDropout(q, jax.random.key(0), 0.5)": "rate",
    "FakeQuant(w, None, None, None, 'int8', IN)": "FakeQuant",
    "sharding": "NamedSharding",
    "{'sharded': sharded, 'codes': q}": "codes",
}
PICTURES = {  # expression: text of its display
    "llm_jax.show.parameters({'w': sharded, 'q': q})": "of 2 devices",
    "llm_jax.show.tokens(byte, 'a b')": "3 tokens",
    "llm_jax.show.attention(model, params, byte, 'hello')": "layer 0",
    "llm_jax.show.positions(config.model)": "relative to distance 0",
    "llm_jax.show.embeddings(model, params, byte, 'a', ['a b c d'])": "[b]",
    "llm_jax.show.quantization(params, ['int8'])": "mean error",
    "llm_jax.show.surprisal(model, params, byte, 'hello')": "bits",
    "llm_jax.show.probabilities(model, params, byte, 'ab')": "step 1",
    "llm_jax.show.difference(params, jax.tree.map(lambda x: 1.1 * x, params))": "singular values",
    "llm_jax.show.adapters(params, lora.init(jax.random.key(0), params, rank_2))": "singular values",
}


@pytest.mark.slow
def test_a_notebook_displays_weights_of_every_kind_models_shardings_and_pictures(tmp_path):
    import nbformat

    (tmp_path / "ternary.py").write_text(
        (ROOT / "CONTRIBUTING.md").read_text().split("# my_ternary.py")[1].split("```")[0]
    )
    setup = "import treescope; treescope.basic_interactive_setup()"
    sources = [OBJECTS, *PICTURES, setup, *TREES]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbformat.write(notebook, tmp_path / "display.ipynb")
    executed = execute(tmp_path / "display.ipynb", sys.executable, tmp_path, PYTHONPATH=str(ROOT))
    for cell in executed.cells[1:-1]:
        shown = [output["data"] for output in cell.outputs if output.output_type == "display_data"]
        shown += [output["data"] for output in cell.outputs if output.output_type == "execute_result"]
        page, text = ("".join(data.get(kind, "") for data in shown) for kind in ("text/html", "text/plain"))
        if cell.source in PICTURES:
            assert PICTURES[cell.source] in page and PICTURES[cell.source] in text, cell.source
            assert "image/png" in shown[-1] and "array(" not in text
        elif cell.source in TREES:
            assert len(page) > 1000 and TREES[cell.source] in page + text, cell.source
