"""Writes docs/api/: a page for each room of the package, with the modules that it has at build time."""

import pathlib
import re

from sphinx.application import Sphinx

import llm_jax

# Rooms in the order of the import floors. A room that is missing here follows at the end under its own name.
TITLES = {
    "llm_jax": "llm_jax: the public functions",
    "llm_jax.training": "Training",
    "llm_jax.research": "Research: sweeps, findings, reports",
    "llm_jax.evaluation": "Evaluation",
    "llm_jax.decoding": "Decoding",
    "llm_jax.embeddings": "Embeddings",
    "llm_jax.checkpoints": "Checkpoints",
    "llm_jax.data": "Data",
    "llm_jax.lora": "Adapters",
    "llm_jax.quant": "Quantization",
    "llm_jax.model": "Model",
    "llm_jax.weights": "Weights",
    "llm_jax.tokenizers": "Tokenizers",
    "llm_jax.parallel": "Meshes and shardings",
    "llm_jax.kernels": "Kernels and number formats",
    "llm_jax.cli": "The command line",
}


def modules(room: str) -> list[str]:
    """The names of a room's modules, without commands, which `python -m NAME --help` documents."""
    root = pathlib.Path(llm_jax.__file__).parent.joinpath(*room.split(".")[1:])
    names = [f"{room}.{path.stem}" for path in sorted(root.glob("*.py"))]
    return [room, *(name for name in names if ".__" not in name and not is_command(name))]


def is_command(name: str) -> bool:
    """Whether a module is a command, or runs one under its earlier name."""
    path = pathlib.Path(llm_jax.__file__).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    return bool(re.search(r"^(COMMAND\b|def main\(|    cli\.forward\()", path.read_text(), re.MULTILINE))


def write(app: Sphinx) -> None:
    root = pathlib.Path(llm_jax.__file__).parent
    rooms = ["llm_jax", *sorted(f"llm_jax.{path.name}" for path in root.glob("*/") if any(path.glob("*.py")))]
    titles = {room: title for room, title in TITLES.items() if room in rooms}
    titles |= {room: room.rpartition(".")[2].capitalize() for room in rooms if room not in titles}
    directory = pathlib.Path(app.srcdir) / "api"
    directory.mkdir(exist_ok=True)
    for room, title in titles.items():
        lines = [title, "=" * len(title), ""]
        for name in modules(room):
            if name != room:
                lines += [name, "-" * len(name), ""]
            lines += [f".. automodule:: {name}", *(["   :ignore-module-all:"] if name == room else []), ""]
        page = directory / f"{room}.rst"
        if not page.exists() or page.read_text() != "\n".join(lines):
            page.write_text("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
