"""Writes stream_golden.json: `PYTHONPATH=. python tests/data/make_stream_golden.py`.

The file was made by the first version of llm_jax.data, so that later ones give every model the same tokens.
"""

import json
import os
import pathlib
import tempfile

from tests.data import small_tree

if __name__ == "__main__":
    golden = pathlib.Path(__file__).with_name("stream_golden.json").absolute()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        small_tree.write(pathlib.Path())
        golden.write_text(json.dumps(small_tree.figures(pathlib.Path("cache")), indent=1) + "\n")
