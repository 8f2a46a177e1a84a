"""Writes smollm2_golden.json: what transformers makes of the real GGUF file: token ids, logits, greedy continuations.

pip install torch transformers gguf && python tests/checkpoints/make_smollm2_golden.py FILE.gguf
"""

import json
import pathlib
import sys

import torch
import transformers

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees",
    "The three primary colours are",
    "In 1969, the first human",
    "Dear Sir or Madam,\n\nI am writing to",
    "To be, or not to be,",
    "import numpy as np\n\nx = np.",
    "Das Wetter ist heute sehr schön, und wir",
]


def main() -> None:
    file = pathlib.Path(sys.argv[1])
    load = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**load)
    model = transformers.AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # go on for all 64 tokens
    found = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
            logits = model(ids).logits[0, -1]
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
            top = torch.topk(logits, 20)
            found.append(
                {
                    "prompt": prompt,
                    "ids": ids[0].tolist(),
                    "top": top.indices.tolist(),
                    "logits": top.values.tolist(),
                    "continuation": out[0, ids.shape[1] :].tolist(),
                }
            )
    said = {"transformers": transformers.__version__, "cases": found}
    pathlib.Path(__file__).with_name("smollm2_golden.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
