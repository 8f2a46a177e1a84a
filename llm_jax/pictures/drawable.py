"""The base class of results that can be displayed."""

import abc
import pathlib
from typing import Any

from llm_jax import files
from llm_jax.errors import UserError
from llm_jax.pictures import render_html, render_png, render_text
from llm_jax.pictures.panels import Picture

_MOST_LINES = 60  # of the text that IPython shows; `print` shows all


class Drawable(abc.ABC):
    """A result that can be displayed by `print`, in a notebook, and as a file by `save`."""

    def __init_subclass__(cls) -> None:
        # IPython prefers the repr of a dataclass to a method of its base class.
        setattr(cls, "_repr_pretty_", Drawable._repr_pretty_)  # noqa: B010

    @abc.abstractmethod
    def picture(self) -> Picture:
        """The panels of the result."""

    def text(self, color: bool = False) -> str:
        """For a terminal: with `color`, blocks and colours (escape sequences), else plain numbers."""
        return render_text.render(self.picture(), color)

    def html(self) -> str:
        """A self-contained HTML page."""
        return render_html.page(self.picture())

    def png(self) -> bytes:
        """The content of a PNG file."""
        return render_png.render(self.picture())

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a page or an image, by the end of the name.

        Raises:
          UserError: the name ends neither in .html nor in .png, or the file cannot be written.
        """
        path = pathlib.Path(path).expanduser()
        if path.suffix not in (".html", ".png"):
            raise UserError(f"{path}: expected a name that ends in .html or .png")
        files.write(path, self.html() if path.suffix == ".html" else self.png())

    def __str__(self) -> str:
        return self.text()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For IPython in a terminal, and for viewers of notebooks without HTML."""
        lines = self.text().splitlines()
        more = [f"... and {len(lines) - _MOST_LINES:,} more lines; print() shows all"] * (len(lines) > _MOST_LINES)
        printer.text("\n".join([*lines[:_MOST_LINES], *more]))

    def _repr_html_(self) -> str:
        return render_html.fragment(self.picture())

    def _repr_png_(self) -> bytes:
        return self.png()
