"""Writes rope_golden.json: rotary frequencies as transformers computes them.

pip install torch transformers && python tests/model/make_rope_golden.py
"""

import json
import pathlib

import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LENGTH = 300
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
CASES = {
    "linear": ({"factor": 4.0}, {"scaling_factor": 4.0}),
    "dynamic": ({"factor": 4.0}, {"scaling_factor": 4.0, "original_length": 128}),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 8.0, "beta_slow": 0.5},
        {"scaling_factor": 4.0, "original_length": 128, "beta_fast": 8.0, "beta_slow": 0.5},
    ),
    "llama3": (
        LLAMA3,
        {"scaling_factor": 8.0, "original_length": 128, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
}


def main() -> None:
    found = []
    for scaling, (theirs, ours) in CASES.items():
        config = transformers.LlamaConfig(
            hidden_size=256,
            num_attention_heads=4,
            max_position_embeddings=128,
            rope_parameters={"rope_type": scaling, "rope_theta": 10000.0, **theirs},
        )
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[scaling](config, None, seq_len=LENGTH)
        found.append(
            {
                "scaling": scaling,
                "ours": {"scaling": scaling, **ours},
                "head_dim": 64,
                "length": LENGTH,
                "inv_freq": inv_freq.double().tolist(),
                "attention_factor": float(attention_factor),
                "transformers": transformers.__version__,
            }
        )
    path = pathlib.Path(__file__).with_name("rope_golden.json")
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
