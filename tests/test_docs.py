"""README and documentation: commands, flags, options and links that exist, and Python blocks that run."""

import contextlib
import copy
import functools
import importlib.util
import pathlib
import re
import shlex

import pytest

import llm_jax
from llm_jax import cli, configuration, option_names
from llm_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "experiments").glob("**/README.md"),
        *(ROOT / "configs").glob("*.py"),
    ]
)
GUIDE = sorted({page for page in PAGES if "```python" in page.read_text()})
NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}
PLACEHOLDER = re.compile(r"--config.*=[A-Z]+$|--config.KEY|=N$|\.\.\.|--FLAG")
# Commands that have another name since 0.1.0; documentation must not use them.
EARLIER = ("llm_jax.tokenizers.train", "llm_jax.tokenizers.show", "llm_jax.data.show", "llm_jax.data.assets")
EARLIER += ("llm_jax.embeddings.train", "llm_jax.embeddings.probe")
BLOCK = re.compile(r"(?P<skip>^% not run: .*\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"python -m (llm_jax\.[a-z][a-z_.]*)((?:[^\n`\\#]|\\\n)*)")


def commands(text: str) -> list[list[str]]:
    """[[module, argument, ...], ...] of every `python -m llm_jax.NAME ...` in a text, optional arguments included."""
    found = []
    for module, rest in COMMAND.findall(text):
        rest = re.sub(r"\\\n", " ", rest).strip()
        rest = rest.rstrip("|:;,. ") if rest.count('"') % 2 == 0 else ""
        found.append([module.rstrip("."), *(a for a in shlex.split(rest.replace("[", "").replace("]", "")))])
    return found


def check(module: str, arguments: list[str]) -> None:
    """Parses the arguments as the command would. Raises for a flag, an option or a value that it refuses."""
    assert importlib.util.find_spec(module), f"no such command: python -m {module}"
    assert module not in EARLIER, f"python -m {module} has another name"
    command, arguments = cli.entry.select_subcommand(importlib.import_module(module).COMMAND, arguments)
    # Placeholders such as FILE and what follows a command in a sentence.
    arguments = [argument for argument in arguments if argument.startswith("--") and not PLACEHOLDER.search(argument)]
    if "--help" in arguments or any(argument.startswith("--help-config") for argument in arguments):
        return
    try:
        cli.parsing.parse(command, copy.deepcopy(command.flags), arguments)
    except UserError as error:
        if not str(error).endswith("is required"):
            raise


def test_commands_are_found_in_a_text_with_their_arguments():
    text = (
        "so `python -m llm_jax.train --workdir=x --config.a=\"('b',)\"` and\n"
        "python -m llm_jax.plan \\\n  --memory  # x\n"
    )
    assert commands(text) == [
        ["llm_jax.train", "--workdir=x", "--config.a=('b',)"],
        ["llm_jax.plan", "--memory"],
    ]


@pytest.mark.parametrize(
    "arguments", [["--workdirs=x"], ["--config.train.step=1"], ["--config.train.steps=much"], ["--config=nowhere"]]
)
def test_a_wrong_flag_option_or_value_is_found(arguments):
    with pytest.raises(UserError):
        check("llm_jax.train", arguments)


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_every_command_in_the_documentation_exists_with_its_flags_and_options(page):
    for module, *arguments in commands(page.read_text()):
        check(module, arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=NAMES.get)
def test_every_option_path_and_link_in_the_documentation_exists(page):
    text = page.read_text()
    if page.name == "CHANGELOG.md":  # names what has gone
        return
    options = set(option_names.keys())
    sections = {key.split(".")[0] for key in options if "." in key}
    for name in re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_0-9.]+)(?:=[^`]*)?`", text):
        is_file = name.endswith((".py", ".json", ".jsonl", ".html", ".md", ".gguf", ".model", ".safetensors"))
        is_code = name.split(".")[0] in ("data", "model", "lora", "quant", "checkpoint") and _is_attribute(name)
        assert name in options or name.rstrip(".") in {o.rpartition(".")[0] for o in options} or is_file or is_code, (
            name
        )
    for path in re.findall(r"`((?:llm_jax|tests|configs|experiments|docs)/[\w/.]+)`", text):
        assert (ROOT / path).exists() or path.startswith("docs/_build"), path
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        # docs/experiments is a copy of experiments that the build makes.
        target = ROOT / link if link.startswith("experiments/") and page.parent.name == "docs" else page.parent / link
        assert target.exists(), link


def _is_attribute(name: str) -> bool:
    module, *rest = name.split(".")
    with contextlib.suppress(ImportError, AttributeError):
        functools.reduce(getattr, rest, importlib.import_module(f"llm_jax.{module}"))
        return True
    return False


# ---------------------------------------------------------------- Python blocks


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory, tiny_defaults):
    """A directory with the run runs/default of a tiny model, and two runs of adapters over it."""
    directory = tmp_path_factory.mktemp("pages")
    with contextlib.chdir(directory):
        llm_jax.train(llm_jax.config("default", {"train.steps": 8}), "runs/default", verbose=False)
        for name, seed in (("lora", 1), ("lora-2", 2)):
            options = {"init_from": "runs/default", "lora.rank": 2, "train.steps": 4, "train.seed": seed}
            llm_jax.train(llm_jax.config("default", options), f"runs/{name}", verbose=False)
    return directory


@pytest.fixture(scope="module")
def tiny_defaults(text_file, cache):
    """The recipes' defaults are those of a tiny model on a small text, while the blocks run."""
    small = configuration.read(ROOT / "tests" / "tiny.py")
    small["data"] |= {"source": str(text_file), "cache_dir": str(cache)}
    defaults = configuration._defaults
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configuration, "_defaults", lambda *_: small)
        patch.setattr(configuration, "recipe", lambda name: _as_config_dict(small))
        yield
    assert configuration._defaults is defaults


def _as_config_dict(mapping):
    from ml_collections import ConfigDict

    return ConfigDict(mapping)


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDE, ids=NAMES.get)
def test_python_blocks_run_in_order(page, tiny_runs, tmp_path, monkeypatch):
    """Each page in a directory of its own, with the runs; a block after "% not run: REASON" is compiled only."""
    (tmp_path / "runs").symlink_to(tiny_runs / "runs")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(page.read_text()))
    assert blocks
    for block in blocks:
        # Errors name the line of the page.
        line = page.read_text()[: block.start("code")].count("\n")
        code = compile("\n" * line + block["code"], str(page), "exec")
        if not block["skip"]:
            exec(code, names)
