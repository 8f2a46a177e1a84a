"""The fenced blocks of the documentation, and how they are run."""

import contextlib
import dataclasses
import importlib
import io
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from llm_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=ticks)$", re.MULTILINE | re.DOTALL)
# A comment right above a block: why it is not run, or the exit code that its last command has.
MARK = re.compile(r"<!-- (?:not run: (?P<reason>[^\n]+)|exit code: (?P<code>\d+)) -->\n\Z")
# Files of the checkout that commands name by paths relative to it.
SHARED = ("configs", "experiments", "docs", "tests")
COMMAND = re.compile(
    r"^(python|PYTHONPATH=\S* python|\./launch\.sh|docs/build|pip|llm-jax|printf|source) ?", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class DocBlock:
    """A fenced block of a page.

    Attributes:
      language: the word after the fence.
      code: the text.
      line: number of lines of the page before the text.
      reason: why the block is not run; "": it is run.
      exit_code: of the last command.
    """

    language: str
    code: str
    line: int
    reason: str = ""
    exit_code: int = 0

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.reason


def blocks(text: str) -> list[DocBlock]:
    """The fenced blocks of a page, in order."""
    result = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        reason, code = (mark["reason"] or "", int(mark["code"] or 0)) if mark else ("", 0)
        line = text[: match.start("code")].count("\n")
        result.append(DocBlock(match["language"].strip(), match["code"], line, reason, code))
    return result


def commands(code: str) -> list[str]:
    """The command lines of a bash block, without comments; a line that ends with a backslash goes on."""
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def prepare(directory: pathlib.Path, run: pathlib.Path) -> None:
    """Fills the directory of a page: the folders of the checkout, and a finished run as runs/tiny and runs/default."""
    for name in SHARED:
        (directory / name).symlink_to(ROOT / name)
    for name in ("tiny", "default"):
        shutil.copytree(run, directory / "runs" / name)


def run_page(page: pathlib.Path) -> list[str]:
    """Runs the blocks of a page in order, in the current directory; returns the command lines that were run.

    A block that begins with "# NAME.py" is written to that file.

    Raises:
      AssertionError: a command has another exit code than the page expects; the message has its output.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    done: list[str] = []
    for block in blocks(page.read_text()):
        if block.runs and (file := re.match(r"# (\w+\.py)\n", block.code)):
            pathlib.Path(file[1]).write_text(block.code)
        elif block.runs and block.language == "python":
            # Errors name the line of the page.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        elif block.runs:
            lines = commands(block.code)
            for line in lines:
                expected = block.exit_code if line is lines[-1] else 0
                code, output = run_line(line)
                assert code == expected, f"{page}: {line}\nexit code {code}, expected {expected}\n{output[-4000:]}"
            done += lines
    return done


def run_line(line: str) -> tuple[int, str]:
    """Runs a command line, a plain `python -m llm_jax.NAME` in this process; returns its exit code and its output."""
    words = shlex.split(line, comments=True)
    plain = words[:2] == ["python", "-m"] and not re.search(r"[|><;]\s", re.sub(r'"[^"]*"|\'[^\']*\'', "", line))
    if plain and words[2].startswith("llm_jax.") and not any(word.startswith("--devices") for word in words):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = cli.call(importlib.import_module(words[2]).COMMAND, words[3:])
        return code, output.getvalue()
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=600)
    return process.returncode, process.stdout + process.stderr
