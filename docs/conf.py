"""Configuration of the documentation: `docs/build` writes docs/_build/html and treats every warning as an error."""

import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_extensions")]

import llm_jax  # noqa: E402

project = "llm_jax"
author = "the llm_jax authors"
copyright = author
release = version = llm_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "api_pages",
    "code_links",
    "command_help",
    "config_options",
    "docstrings",
    "experiment_pages",
    "mathml",
    "statement_cards",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"llm_jax {release}"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write code between single backticks
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
smartquotes = False  # options and code are quoted as they are typed
napoleon_use_ivar = True  # attributes are listed with their class and are no entries of their own
suppress_warnings = [
    # Annotations name types by their short names, such as Tokenizer, which several modules import.
    "ref.python",
]
