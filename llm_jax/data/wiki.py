"""The articles of a Wikipedia dump (XML, compressed with bzip2 or not) as plain text."""

import bz2
import html
import pathlib
import re
from collections.abc import Iterator
from xml.etree import ElementTree

from llm_jax.errors import UserError

_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")  # templates and tables nest
_DROPPED = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<(ref|math|gallery|timeline|source|code|table|div)\b.*?</\1>|<[^<>]*>"
    r"|\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]|^[*#:;|!].*?$",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_LINK = re.compile(r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]|\[\w+://\S*\s?([^\]]*)\]")
_MARKS = re.compile(r"'{2,}|^=+.*?=+\s*$", re.MULTILINE)


def articles(path: pathlib.Path) -> Iterator[str]:
    """Yields the text of each article, one paragraph per line, without redirects and pages of other name spaces.

    Raises:
      UserError: the file cannot be read, or is not a Wikipedia dump.
    """
    opener = bz2.open if path.suffix == ".bz2" else open
    try:
        with opener(path, "rb") as file:
            for _, element in ElementTree.iterparse(file):
                name = element.tag.rpartition("}")[2]
                if name == "page":
                    space = element.tag.removesuffix("page")
                    text = element.findtext(f"{space}revision/{space}text") or ""
                    if element.findtext(f"{space}ns") == "0" and not text.lower().startswith("#redirect"):
                        yield plain_text(text)
                    element.clear()
    except (OSError, ElementTree.ParseError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a Wikipedia dump ({error})") from error


def plain_text(markup: str) -> str:
    """The running text of wiki markup, without templates, tables, references, lists and headings."""
    text, count = markup, 1
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    while count:
        text, count = _INNERMOST.subn("", text)
    text = _DROPPED.sub("", text)
    text = _LINK.sub(lambda m: m[1] or m[2] or "", text)
    text = html.unescape(_MARKS.sub("", text))
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())
