"""The frame of every HTML page: self-contained, with the light or dark setting of the browser."""

import html
import importlib.resources

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def render(title: str, body: str, style: str = "") -> str:
    """A page as text.

    Args:
      title: plain text.
      body: HTML.
      style: further CSS; the colours --text, --muted, --line, --panel, --page and --accent are defined.
    """
    common = (importlib.resources.files(__package__) / "html_document.css").read_text()
    return _TEMPLATE.format(title=html.escape(title), style=common + style, body=body)
