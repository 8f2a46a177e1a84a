"""Writes blocks_golden.npz: random bytes of every block format as the gguf package reads them, and numbers as it
writes them.

pip install gguf && python tests/kernels/make_blocks_golden.py
"""

import pathlib

import gguf
import numpy as np

READ = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
READ_TOO = ("Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4")  # drawn last, so that the other values stay
WRITTEN = ("Q4_0", "Q4_1", "Q8_0", "BF16", "F16")


def read(names: tuple[str, ...], draw: np.random.RandomState) -> dict[str, np.ndarray]:
    found = {}
    for name in names:
        kind = gguf.GGMLQuantizationType[name]
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        rows = draw.randint(0, 256, (3, size * 512 // numbers)).astype(np.uint8)
        rows[..., 1::2] &= 0x3F  # no float16 scale is infinite or undefined
        found[f"{name}_bytes"] = rows
        found[f"{name}_numbers"] = gguf.dequantize(rows, kind).astype(np.float32)
    return found


def main() -> None:
    draw = np.random.RandomState(0)
    found = read(READ, draw)
    numbers = draw.standard_normal((4, 64)).astype(np.float32)
    numbers[0] = 0
    numbers[1, :32] = 1.5
    found["numbers"] = numbers
    for name in WRITTEN:
        found[f"{name}_written"] = gguf.quantize(numbers, gguf.GGMLQuantizationType[name]).view(np.uint8)
    found |= read(READ_TOO, draw)
    np.savez_compressed(pathlib.Path(__file__).with_name("blocks_golden.npz"), **found)


if __name__ == "__main__":
    main()
