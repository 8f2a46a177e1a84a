"""Writes docs/api/: one page per subpackage, with its modules."""

import pathlib
import re

from sphinx.application import Sphinx

import llm_jax

# Subpackages from the highest import layer to the lowest. Other subpackages follow under their own names.
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
    "llm_jax.schema": "Configuration options",
    "llm_jax.object_store": "Object stores",
}


def modules(package: str) -> list[str]:
    """The names of the modules of a subpackage, without commands, which `python -m NAME --help` documents."""
    root = pathlib.Path(llm_jax.__file__).parent.joinpath(*package.split(".")[1:])
    names = [f"{package}.{path.stem}" for path in sorted(root.glob("*.py"))]
    return [package, *(name for name in names if ".__" not in name and not is_command(name))]


def is_command(name: str) -> bool:
    """Whether a module is a command, or runs one under its earlier name."""
    path = pathlib.Path(llm_jax.__file__).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    return bool(re.search(r"^(COMMAND\b|def main\(|    cli\.forward\()", path.read_text(), re.MULTILINE))


def write(app: Sphinx) -> None:
    root = pathlib.Path(llm_jax.__file__).parent
    packages = ["llm_jax", *sorted(f"llm_jax.{path.name}" for path in root.glob("*/") if any(path.glob("*.py")))]
    titles = {package: title for package, title in TITLES.items() if package in packages}
    titles |= {package: package.rpartition(".")[2].capitalize() for package in packages if package not in titles}
    directory = pathlib.Path(app.srcdir) / "api"
    directory.mkdir(exist_ok=True)
    for package, title in titles.items():
        lines = [title, "=" * len(title), ""]
        for name in modules(package):
            if name != package:
                lines += [name, "-" * len(name), ""]
            lines += [f".. automodule:: {name}", *(["   :ignore-module-all:"] if name == package else []), ""]
        page = directory / f"{package}.rst"
        if not page.exists() or page.read_text() != "\n".join(lines):
            page.write_text("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
