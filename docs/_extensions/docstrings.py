"""Turns the package's docstrings, which are written like Markdown, into reStructuredText before napoleon reads them.

Differences that matter: an indented block is an example and is shown as it is; `*`, `|` and a trailing `_` are text; a
list needs no blank line before it.
"""

import re

from sphinx.application import Sphinx

SECTION = re.compile(r"(Args|Arguments|Returns|Yields|Raises|Attributes|Example|Examples|Note|References):$")
ITEM = re.compile(r"([-*]|\d+\.) ")


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def escape(lines: list[str]) -> list[str]:
    """Escapes the markup of reStructuredText outside of code between backticks, which may go over lines."""
    escaped, in_code = [], False
    for line in lines:
        in_code = in_code and bool(line.strip())  # ends with its paragraph
        parts = re.split(r"`+", line)
        for i, part in enumerate(parts):
            if not in_code:
                parts[i] = re.sub(r"[*|\\]|(?<=\w)_(?!\w)", lambda match: "\\" + match[0], part)
                if i and part[:1].isalnum():  # a space that is not shown, as in `merge`d
                    parts[i] = "\\ " + parts[i]
                if i + 1 < len(parts) and part[-1:].isalnum():
                    parts[i] += "\\ "
            in_code = in_code != (i + 1 < len(parts))
        escaped.append("``".join(parts))
    return escaped


def convert(lines: list[str]) -> list[str]:
    """The docstring `lines` as reStructuredText, with the sections of Google's style left for napoleon."""
    converted: list[str] = []
    prose: list[str] = []

    def flush() -> None:
        converted.extend(escape(prose))
        prose.clear()

    in_section = in_list = in_code = False
    for line in lines:
        after_text = bool((prose or converted) and (prose or converted)[-1].strip())
        is_item = bool(ITEM.match(line))
        if not line.strip():
            prose.append("")
        elif not indent(line):
            in_section = bool(SECTION.match(line))
            if after_text and (in_code or (is_item and not in_list)):
                prose.append("")
            in_list, in_code = is_item or (in_list and after_text), False
            prose.append(line)
        elif in_section or in_list:
            prose.append(line)
        else:
            flush()
            if not in_code:
                converted += [""] * after_text + ["::", ""]
            in_code = True
            converted.append(line)
    flush()
    return converted


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = convert(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=100)  # napoleon has 500
    return {"parallel_read_safe": True}
