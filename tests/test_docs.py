"""README and documentation: commands, flags, options and links exist, and the blocks of code run."""

import contextlib
import copy
import functools
import importlib.util
import re
import shlex
import shutil
import subprocess

import pytest

from llm_jax import cli
from llm_jax.errors import UserError
from llm_jax.schema import option_names
from tests import doc_blocks
from tests.doc_blocks import ROOT

PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs" / "how_to").glob("*.md"),
        *(ROOT / "experiments").glob("**/README.md"),
        *(ROOT / "configs").glob("*.py"),
    ]
)
# The pages whose blocks are run. Experiments have their own commands, which take up to hours.
RUN = [
    page for page in PAGES if page.suffix == ".md" and "experiments" not in page.parts and page.name != "CHANGELOG.md"
]
NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}
PLACEHOLDER = re.compile(r"--config.*=[A-Z]+$|--config.KEY|=N$|\.\.\.|--FLAG")
# Commands that have another name since 0.1.0; documentation must not use them.
EARLIER = ("llm_jax.tokenizers.train", "llm_jax.tokenizers.show", "llm_jax.data.show", "llm_jax.data.assets")
EARLIER += ("llm_jax.embeddings.train", "llm_jax.embeddings.probe")
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
        target = page.parent / link
        if "docs" in page.parts and "experiments/" in link:
            target = ROOT / link[link.index("experiments/") :]
        assert target.exists(), link


def _is_attribute(name: str) -> bool:
    module, *rest = name.split(".")
    with contextlib.suppress(ImportError, AttributeError):
        functools.reduce(getattr, rest, importlib.import_module(f"llm_jax.{module}"))
        return True
    return False


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("page", RUN, ids=NAMES.get)
def test_every_block_is_run_or_says_why_not(page):
    for block in doc_blocks.blocks(page.read_text()):
        where = f"{page}:{block.line}"
        if block.language in ("bash", "python"):
            assert not block.reason or len(block.reason) > 10, f"{where}: a reason is a sentence"
        else:
            assert not block.reason, f"{where}: only bash and python blocks are run"
            assert not doc_blocks.COMMAND.search(block.code), f"{where}: a block with commands begins with ```bash"
        if block.language == "python":
            compile(block.code, where, "exec")
        if block.language == "bash":
            assert doc_blocks.commands(block.code), f"{where}: no command"


def test_blocks_are_found_with_their_marks():
    text = (
        "a\n```bash\n# why\npython x \\\n  --y\nls\n```\n<!-- not run: takes an hour -->\n```python\n1 +\n```\n"
        "<!-- exit code: 2 -->\n```bash\nfalse\n```\n\n```\npython -m llm_jax.x\n```\n"
    )
    first, second, third, fourth = doc_blocks.blocks(text)
    assert (first.language, first.line, first.runs) == ("bash", 2, True)
    assert doc_blocks.commands(first.code) == ["python x  --y", "ls"]
    assert (second.reason, second.runs, third.exit_code, third.runs) == ("takes an hour", False, 2, True)
    assert not fourth.runs and doc_blocks.COMMAND.search(fourth.code)


def test_a_command_that_fails_fails_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    for code, error in ((2, None), (0, AssertionError), (3, AssertionError)):
        page.write_text(f"<!-- exit code: {code} -->\n```bash\npython -m llm_jax.evaluate --checkpoint=nowhere\n```\n")
        with pytest.raises(error, match="nowhere") if error else contextlib.nullcontext():
            assert doc_blocks.run_page(page)
    page.write_text("```python\nx = 1\n```\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        doc_blocks.run_page(page)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The run of the recipe `tiny`, trained by the command of the tutorial."""
    directory = tmp_path_factory.mktemp("tiny")
    with contextlib.chdir(directory):
        code, output = doc_blocks.run_line("python -m llm_jax.train --config=tiny --workdir=runs/tiny")
    assert not code, output
    return directory / "runs" / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=NAMES.get)
def test_the_blocks_of_a_page_run_in_order(page, tiny_run, tmp_path, monkeypatch):
    """Each page has a directory of its own, which begins with a run of the recipe `tiny`."""
    doc_blocks.prepare(tmp_path, tiny_run)
    monkeypatch.chdir(tmp_path)
    doc_blocks.run_page(page)


def test_every_protection_is_held_by_a_test_that_exists():
    names = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "security.md").read_text())
    assert len(names) > 15
    for path, test in names:
        assert f"def {test or 'test_'}" in (ROOT / path).read_text(), (path, test)


def test_the_help_of_the_script_names_every_job_and_installs_nothing(tmp_path):
    script = shutil.copy(ROOT / "launch.sh", tmp_path)
    run = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
    jobs = re.findall(r"^  ([a-z0-9 |]+)\)", (ROOT / "launch.sh").read_text().partition("\ncase ")[2], re.MULTILINE)
    assert len(jobs) == 3
    for name in [word for job in jobs for word in job.split(" | ")]:
        assert name in run.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "launch.sh"]
