"""The kernels in C++ against float64, over odd shapes, group sizes, instruction sets, threads, NaN and inf."""

import numpy as np
import pytest

from llm_jax.kernels import native
from tests.kernels.random_products import draw

PATHS = native.PATHS[1:]
FORMATS = {
    "int8": {},
    "int8 groups": {"group": 32, "scale": "float16"},
    "int8 tensor": {"one_scale": True},
    "uint8": {"offset": True},
    "int4": {"group": 32, "scale": "float16"},
    "int4 channel": {},
    "int4 small": {"group": 8, "scale": "float16"},
    "int4 long": {"group": 192},
    "uint4": {"group": 32, "scale": "float16", "offset": True},
    "int2": {"group": 32, "scale": "float16"},
    "int2 small": {"group": 4},
    "uint2": {"group": 64, "scale": "float16", "offset": True},
    "nf4": {"group": 64, "scale": "nested"},
    "nf4 small": {"group": 2},
    "e2m1": {"group": 32, "scale": "e8m0"},
}
SHAPES = ((192, 1, 1), (384, 70, 1), (192, 129, 3), (576, 256, 2), (384, 68, 16))


def available(path: str) -> bool:
    library, reason = native.loaded()
    assert library is not None, reason
    return PATHS.index(path) + 1 <= library.llm_jax_fastest_path()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_those_in_float64(name, by_output, path):
    """As exact as float32: the bound is that of a sum of rounded products."""
    if not available(path):
        pytest.skip(f"this CPU has no {path}")
    for inputs, outputs, rows in SHAPES:
        for inner_parts in (1, outputs) if FORMATS[name].get("scale") == "nested" else (1,):
            p = draw(name.split()[0], inputs, outputs, rows, by_output=by_output, inner_parts=inner_parts, **FORMATS[name])
            w, x = p.weight(), p.x.astype(np.float64)
            error = np.abs(p.run(path) - x @ w) / (np.abs(x) @ np.abs(w))
            assert error.max() < 4e-7, (inputs, outputs, rows, inner_parts)
