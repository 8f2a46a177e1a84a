"""Text, pages and images of panels: their structure, and, with a browser, that pages are readable."""

import dataclasses
import io
import re
import struct

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.pictures import render_png, render_text
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Heatmaps, Lines, Passage, Picture, Table
from tests.conftest import call
from tests.pictures.test_figures import TEXT  # the functions are compiled for its length
from tests.research.test_report import drive

HOSTILE = "</p><script>document.title='broken'</script> $x_1$ \x1b[31m"
MAPS = Heatmaps(
    "two heads", ("head 0", "head 1"), np.array([[[1, 0], [0.25, 0.75]]] * 2), ("a", "b"), ("a", "b"), "share", 0, 1
)
ONE = Heatmaps("one", ("",), np.array([[[-2.0, np.nan], [0.5, 1.0]]]), ("a", HOSTILE), ("c", "d"), "", -2, 2, True)
LINES = Lines(
    "decay", np.arange(3.0), np.array([[0, -1, -2.0], [0, -0.5, -1]]), ("head 0", "head 1"), "distance", "bias"
)
TABLE = Table("rows", ("name", "count", "share"), (("x", 1234, 0.5), (HOSTILE, 2, float("nan"))))
PASSAGE = Passage("a text", ("The", " cat\n", HOSTILE), np.array([np.nan, 8.0, -1.0]), "bits", 16.0)


class Everything(Drawable):
    def picture(self):
        return Picture("All <panels>", (MAPS, ONE, LINES, TABLE, PASSAGE), "How to read it.")


def test_plain_text_has_the_numbers_and_no_escape_sequences():
    text = Everything().text()
    assert str(Everything()) == text and "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "All <panels>" and lines[-1] == "How to read it."
    assert "  a                1.00   0.00" in lines and "  b                0.25   0.75" in lines
    assert "  distance  head 0  head 1" in lines and "         1      -1    -0.5" in lines
    assert re.search(r"^  x +1,234 +0.5$", text, re.M)
    assert re.search(r"^     8  ' cat\\n'$", text, re.M)


def test_colours_follow_the_values():
    text = Everything().text(color=True)
    assert "\x1b[31m" not in text  # that of a token is spelled out
    # viridis from dark violet to yellow; red for positive values of a diverging scale, nothing for no value.
    dark, yellow = "\x1b[48;2;68;1;84m  ", "\x1b[48;2;253;231;36m  "
    assert f"  a              {yellow}{dark}" in text
    assert "\x1b[48;2;5;48;97m  \x1b[0m  " in text
    assert "█▄▁" in text.replace("▅", "▄")
    assert "\x1b[97;48;2;30;30;30mThe\x1b[0m" in text and " cat↵" in text


def test_tables_and_maps_fit_a_terminal(monkeypatch):
    monkeypatch.setattr(render_text, "_columns", lambda: 40)
    cells = tuple(f"{c}" * 12 for c in "abcde")
    panels = (
        Table("wide", ("name", *"vwxyz"), (("row", *cells), ("last", *cells))),
        dataclasses.replace(MAPS, rows=()),
    )
    lines = render_text.render(Picture("a", panels), color=True).splitlines()
    assert lines[3:7] == ["  name  v             w", *_rows("a", "b"), ""]
    assert lines[7:11] == ["  name  x             y", *_rows("c", "d"), ""]
    assert lines[11:15] == ["  name  z", *_rows("e"), ""]
    assert lines[-1] == "  columns: a, b"
    assert render_text.render(Picture("a", panels), color=False).splitlines()[4] == _rows(*"abcde")[0]
    wide = Heatmaps("wide", ("",), np.zeros((1, 1, 20)), ("a",), tuple(map(str, range(20))), "", 0, 1)
    text = render_text.render(Picture("a", (wide,)), color=True)
    assert text.count("m ") >= 20 and "m  " not in text  # one character a cell
    assert all(len(re.sub(r"\x1b\[[\d;]*m", "", line)) < 40 for line in text.splitlines())


def _rows(*letters):
    values = "  ".join(letter * 12 for letter in letters)
    return [f"  row   {values}", f"  last  {values}"]


def test_pages_hold_everything_and_escape_what_models_and_texts_say():
    page = Everything().html()
    assert page.startswith("<!doctype html>") and "<title>All &lt;panels&gt;</title>" in page
    assert "<script" not in page and "\x1b" not in page.replace("\x1b[31m", "")
    assert not re.search(r"""@import|url\((?!#)|https?://(?!www\.w3\.org)|src="(?!data:image/png;base64,)""", page)
    images = re.findall(r'<img alt="([^"]*)"', page)
    assert "two heads, head 1" in images and any("largest value, 1" in text for text in images)
    assert re.search(
        r'<svg role="img" aria-label="2 curves of bias over distance from 0 to 2: head 0 from 0 to -2;', page
    )
    assert "currentColor" in page and "#010203" not in page
    assert page.count("<tr>") == 3 and '<td class="number">1,234</td>' in page
    assert 'title="8 bits"' in page and 'title="no value"' in page and "rgb(25 113 194 / 0.04)" in page
    fragment = Everything()._repr_html_()
    assert fragment.startswith('<div class="llm-jax">') and "<html" not in fragment and fragment in page


class Printer:
    def text(self, text):
        self.shown = text


def test_ipython_shows_the_beginning_of_the_text():
    printer, result = Printer(), Everything()
    result._repr_pretty_(printer, False)
    assert printer.shown == result.text()
    result.picture = lambda: Picture("long", (dataclasses.replace(TABLE, rows=TABLE.rows * 100),), "note")
    result._repr_pretty_(printer, False)
    lines = result.text().splitlines()
    assert printer.shown.splitlines()[:60] == lines[:60]
    assert printer.shown.splitlines()[60:] == [f"... and {len(lines) - 60} more lines; print() shows all"]


def test_pixels_of_a_map_are_its_values():
    import base64

    from PIL import Image

    page = Everything().html()
    data = re.search(r'<img alt="two heads, head 0" src="data:image/png;base64,([^"]+)"', page)[1]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert image.shape == (2, 2, 4)
    assert image[0, 0].tolist() == [253, 231, 36, 255] and image[0, 1].tolist() == [68, 1, 84, 255]


def test_images_are_as_high_as_their_panels(tmp_path):
    result = Everything()
    png = result._repr_png_()
    width, height = struct.unpack(">II", png[16:24])
    assert png[:4] == b"\x89PNG" and width == 1080 and 700 < height < 1700
    result.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match=r"a.pdf: expected a name that ends in .html or .png"):
        result.save(tmp_path / "a.pdf")


def test_commands_print_or_write(trained, tmp_path, text_file, cache):
    page, image = tmp_path / "a.html", tmp_path / "a.png"
    done = call("show", "positions", f"--html={page}", f"--png={image}", "--config.model.position.kind=alibi")
    assert done.stdout == f"wrote {page}\nwrote {image}\n" and "Positions: alibi" in page.read_text()
    model = f"--checkpoint={trained}"
    flags = ("--tokenizer=byte", "--text=né", "--ids", f"--html={page}")
    assert call("show", "tokens", *flags).stdout == f"wrote {page}\n"
    text = page.read_text()
    assert 'title="id 198, bytes 1-2"' in text
    assert "<td>0-1</td>" in text and "<td>&#x27;n&#x27;</td>" in text and "colours alternate" in text
    rows = (
        "--config=tests/tiny.py",
        f"--config.data.source={text_file}",
        f"--config.data.cache_dir={cache}",
        "--rows=1",
    )
    assert call("show", "rows", *rows, f"--html={page}").returncode == 0
    assert page.read_text().count(", counts") == 32 and "32 counted targets" in page.read_text()
    printed = {
        "attention": (f"--text={TEXT}", "--layer=0", "--head=1"),
        "embeddings": ("--word=token", f"--text={TEXT}"),
        "quantization": ("--schemes=int8",),
        "surprisal": (f"--text={TEXT}",),
        "probabilities": (f"--prompt={TEXT}", "--max_new_tokens=3", "--temperature=0.7", "--top_k=5", "--top_p=0.9"),
        "parameters": (),
        "positions": ("--distance=3",),
    }
    for name, flags in printed.items():
        done = call("show", name, model, *flags)
        assert done.returncode == 0 and len(done.stdout.splitlines()) > 4, done.stderr
        assert "\x1b" not in done.stdout
    assert "\x1b[1m" in call("show", "parameters", model, "--color").stdout


def test_invalid_requests_are_one_line_errors(trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    model = f"--checkpoint={trained}"
    for flags, message in (
        (("attention", model, "--text=a b", "--layer=9"), "layer=9; the model has the layers 0 to 1"),
        (("tokens", model), "unknown flag --checkpoint; did you mean --tokenizer=CHECKPOINT?"),
        (("attention", model), "--text is not given and standard input is empty; set --text"),
        (("attention", model, "--text=a b", "--html=a.txt"), "--html=a.txt; expected a name that ends in .html"),
        (("positions", model, "--config.model.position.kind=alibi"), "has no effect where --checkpoint is given"),
        (("positions", "--dtype=bfloat16"), "has no effect where --checkpoint is not given"),
        (("positions", "--position.kind=alibi"), "did you mean --config.model.position.kind?"),
        (("lora", model), "has no adapters; set --before=CHECKPOINT"),
        (("lora", model, f"--before={trained}"), "no matrix differs between the two checkpoints"),
        (("quantization", model, "--schemes=int9"), "int9"),
        (("probabilities", model, "--prompt=a", "--candidates=0"), "--candidates=0; expected at least 1"),
        (("embeddings", model, "--word=zebra", "--text=no such word"), "does not occur in the texts"),
    ):
        done = call("show", *flags)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_no_title_and_no_table_of_an_image_is_cut():
    from matplotlib import image

    long = " ".join(["words"] * 40)
    panels = (dataclasses.replace(LINES, title=long), dataclasses.replace(PASSAGE, title=long))
    pixels = image.imread(io.BytesIO(render_png.render(Picture(long, panels, long))))
    assert (pixels[:, -20:] == 1).all() and pixels.shape[1] == 1080
    wide = dataclasses.replace(TABLE, rows=((long, 1, 1.0),))
    pixels = image.imread(io.BytesIO(render_png.render(Picture("wide", (wide,), ""))))
    assert (pixels[:, -20:] == 1).all() and pixels.shape[1] > 1080


def test_a_table_of_an_image_stays_within_its_height():
    """matplotlib moves a table down by a share of the height of its axes."""
    rows = tuple(("two\nlines", i, 0.5) for i in range(200))
    for count in (0, 3, 60, 61, 200):
        table = dataclasses.replace(TABLE, rows=rows[:count])
        height = render_png._HEIGHTS[Table](table)
        with render_png.figure(9, height) as drawing:
            axis = drawing.add_axes((0, 0, 1, 1))
            render_png._table(table, axis)
            drawing.canvas.draw()
            boxes = [artist.get_window_extent() for artist in (*axis.tables, *axis.texts)]
            assert min(box.y0 for box in boxes) >= -1 and max(box.y1 for box in boxes) <= height * drawing.dpi + 1
            texts = [text.get_text() for text in axis.texts]
            assert texts == ([f"and {count - 60} more rows"] if count > 60 else [])
            assert not any("\n" in cell.get_text().get_text() for cell in axis.tables[0].get_celld().values())


USE = """
  const all = (selector) => [...page.querySelectorAll(selector)];
  report.title = page.title;
  report.images = all("img").every((image) => image.complete && image.naturalWidth > 0);
  report.named = all("img").every((image) => image.alt || image.closest(".scale"));
  report.sections = all("section").length;
  report.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  const texts = all("p, td, th, h3, .row");
  report.font = Math.min(...texts.map((text) => parseFloat(frame.getComputedStyle(text).fontSize)));
  const scale = (matrix) => Math.hypot(matrix.a, matrix.b);
  const size = (text) => parseFloat(frame.getComputedStyle(text).fontSize) * scale(text.getScreenCTM());
  report.labels = Math.min(...all("svg text").map(size));
  report.legend = all(".legend span").map((entry) => entry.textContent);
  report.styles = all(".legend i").map((line) => frame.getComputedStyle(line).borderTopColor);
  const [cell, row] = [".map img", ".map .row"].map((name) => page.querySelector(name).getBoundingClientRect());
  report.aligned = Math.abs(row.top - cell.top);
  const colored = [[page.body, "backgroundColor"], [page.querySelector("h2"), "color"]];
  report.colors = colored.map(([element, name]) => frame.getComputedStyle(element)[name]);
"""


@pytest.mark.live
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1100, True)])
def test_pages_are_readable_in_a_browser(tmp_path, width, dark):
    report = drive(Everything().html(), tmp_path, width, dark, USE)
    assert report["problems"] == [] and report["title"] == "All <panels>" and report["sections"] == 5
    assert report["images"] and report["named"] and report["overflow"] <= 0
    assert report["font"] >= 12 and report["labels"] >= 11.5 and report["aligned"] < 3
    assert report["legend"] == ["head 0", "head 1"] and report["styles"] == ["rgb(76, 132, 196)", "rgb(217, 119, 43)"]
    background, text = (sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in report["colors"])
    assert (background < 60 and text > 200) if dark else (background > 200 and text < 60)
