"""Block formats of GGUF against the gguf package (make_blocks_golden.py), and their error bounds."""

import pathlib

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest

from llm_jax.kernels import blocks

# ggml's numbers of the types (enum ggml_type).
CODES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12}
CODES |= {"Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30, "MXFP4": 39}
GOLDEN = np.load(pathlib.Path(__file__).with_name("blocks_golden.npz"))


@pytest.mark.parametrize("name", [k.removesuffix("_bytes") for k in GOLDEN if k.endswith("_bytes")])
def test_bytes_are_read_as_the_gguf_package_reads_them(name):
    np.testing.assert_array_equal(blocks.decode(name, GOLDEN[f"{name}_bytes"]), GOLDEN[f"{name}_numbers"])


def test_formats_have_the_numbers_of_ggml():
    assert {name: block.code for name, block in blocks.FORMATS.items()} == CODES


@pytest.mark.parametrize("name", [k.removesuffix("_written") for k in GOLDEN if k.endswith("_written")])
def test_numbers_are_written_as_the_gguf_package_writes_them(name):
    np.testing.assert_array_equal(blocks.encode(name, GOLDEN["numbers"]), GOLDEN[f"{name}_written"])


@hypothesis.given(arrays.arrays(np.float32, (2, 64), elements=st.floats(-1e4, 1e4, width=32)))
@pytest.mark.parametrize(("name", "steps"), [("Q8_0", 254), ("Q4_0", 16), ("Q4_1", 15)])
def test_a_round_trip_is_off_by_half_a_step(name, steps, values):
    got = blocks.decode(name, blocks.encode(name, values)).reshape(-1, 32)
    groups = values.reshape(-1, 32)
    width = np.ptp(groups, -1) if name == "Q4_1" else 2 * np.abs(groups).max(-1)
    # Half a step (one whole for the end that Q4_0 does not reach), and what float16 scales are off by.
    bound = width / steps * (1.0 if name == "Q4_0" else 0.5) + np.abs(groups).max(-1) * 2e-3 + 1e-4
    assert (np.abs(got - groups).max(-1) <= bound).all()
