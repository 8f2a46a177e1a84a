"""Copies the README and the plots of every experiment into docs/experiments/, so that pages can link to them."""

import pathlib
import shutil

from sphinx.application import Sphinx


def copy(app: Sphinx) -> None:
    source, target = pathlib.Path(app.srcdir).parent / "experiments", pathlib.Path(app.srcdir) / "experiments"
    patterns = ("README.md", "*/README.md", "*/*.png", "*/*.svg")
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        if not copied.exists() or copied.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copied)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", copy)
    return {"parallel_read_safe": True}
