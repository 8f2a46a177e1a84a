"""Writes sampler_golden.npz: what transformers' logits processors make of the same logits.

pip install torch transformers && python tests/decoding/make_sampler_golden.py
"""

import pathlib

import numpy as np
import torch
from transformers.generation import logits_process as theirs

from tests.decoding.sampler_cases import CASES, tokens_and_logits


def main() -> None:
    ids, lengths, logits = tokens_and_logits()
    found = {}
    for name, (_, their_name, arguments) in CASES.items():
        processor = getattr(theirs, their_name)(**arguments)
        found[name] = np.concatenate(
            [
                processor(torch.tensor(row[None, :n], dtype=torch.long), torch.tensor(row_logits[None])).numpy()
                for row, n, row_logits in zip(ids, lengths, logits, strict=True)
            ]
        )
    np.savez_compressed(pathlib.Path(__file__).with_name("sampler_golden.npz"), **found)


if __name__ == "__main__":
    main()
