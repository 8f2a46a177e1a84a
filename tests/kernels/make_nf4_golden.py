"""Writes nf4_golden.npz: what bitsandbytes (CPU) makes of seeded numbers by NF4 with double quantization.

In an environment with torch and bitsandbytes: python tests/kernels/make_nf4_golden.py
"""

import pathlib

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional


def main() -> None:
    rows = np.random.default_rng(0).normal(0, 0.05, (64, 320)).astype(np.float16).astype(np.float32)
    rows[3, 64:128] = 0  # a group of zeros, a constant one, an outlier
    rows[4, :64] = 0.25
    rows[5, 70] = 9
    packed, state = functional.quantize_4bit(
        torch.from_numpy(rows), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    single, plain = functional.quantize_4bit(torch.from_numpy(rows), blocksize=64, quant_type="nf4")
    assert torch.equal(single, packed)
    both = packed.numpy().reshape(-1)
    np.savez_compressed(
        pathlib.Path(__file__).with_name("nf4_golden.npz"),
        version=np.array(bitsandbytes.__version__),
        rows=rows.astype(np.float16),
        codes=np.stack([both >> 4, both & 15], -1).reshape(rows.shape),
        scales=plain.absmax.numpy(),
        table=state.code.numpy(),
        scale_codes=state.absmax.numpy(),
        scale_scales=state.state2.absmax.numpy(),
        scale_table=state.state2.code.numpy(),
        mean=state.offset.numpy(),
        numbers=functional.dequantize_4bit(packed, state).numpy(),
    )


if __name__ == "__main__":
    main()
