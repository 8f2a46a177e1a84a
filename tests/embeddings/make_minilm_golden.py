"""Writes minilm_golden.json: what transformers makes of sentences with the real MiniLM: layers, and sentence vectors.

pip install torch transformers && python tests/embeddings/make_minilm_golden.py DIRECTORY

A sentence's vector is the mean over its tokens, normalized, as the model's own modules.json says. Of every
layer the first 8 entries of each token's vector are kept.
"""

import json
import pathlib
import sys

import torch
import transformers

SENTENCES = [
    "The bank of the river was muddy.",
    "She deposited the cheque at the bank.",
    "Tokenization is essential.",
    "A cat sat on the mat, and a dog lay beside it.",
    "Hi",
]


def main() -> None:
    directory = sys.argv[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.BertModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
        out = model(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].bool()
    last = out.last_hidden_state
    mean = (last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    vectors = torch.nn.functional.normalize(mean, dim=-1)
    cases = [
        {
            "sentence": sentence,
            "ids": batch["input_ids"][i][mask[i]].tolist(),
            "layers": [layer[i][mask[i]][:, :8].tolist() for layer in out.hidden_states],
            "vector": vectors[i].tolist(),
        }
        for i, sentence in enumerate(SENTENCES)
    ]
    said = {"transformers": transformers.__version__, "cases": cases}
    pathlib.Path(__file__).with_name("minilm_golden.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
