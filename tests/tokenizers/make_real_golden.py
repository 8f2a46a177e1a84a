"""Writes real_golden.json: what transformers makes of texts by the vocabularies of the two model assets.

pip install torch transformers gguf && python tests/tokenizers/make_real_golden.py MINILM_DIRECTORY SMOLLM2.gguf
"""

import json
import pathlib
import sys

import transformers

TEXTS = [
    "Tokenization is essential.",
    "Fine-tuning is fun",
    "supercalifragilisticexpialidocious",
    "The QUICK brown fox can't jump over 13,579 lazy dogs (it's 3.14 µm)!",
    "  leading, double  and trailing spaces  ",
    "tabs\tand\nlines\r\n\n\n    indented",
    "naïve café, Größe, Ångström, e\u0301",
    "Привет, мир! 你好，世界。 こんにちは 안녕하세요 مرحبا שלום हिन्दी",
    "👩‍👩‍👧 🦜 ☃️ 🇨🇭",
    "def f(x: int) -> str:\n\treturn f'{x!r}'  # a_b __init__ 0xFF",
    "https://example.org/a?b=c&d=%20#e user@example.org",
    "\x00\x07\x1b[0m control \u200b zero width \ufeff \ufffd",
    "1234567890 12 345.678e-9",
    "<|im_start|>user [CLS] [MASK] </s>",
    "don't won't I'LL they've",
    "",
    " ",
    "a",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


def main() -> None:
    minilm, gguf = map(pathlib.Path, sys.argv[1:])
    # No ½ or ²: from GGUF, transformers leaves out the splitting of digits that SmolLM2's own tokenizer.json has.
    found = {}
    for name, load in (
        ("minilm-l6-v2", {"pretrained_model_name_or_path": str(minilm)}),
        ("smollm2-135m-instruct", {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}),
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**load)
        # Text that looks like a special token is text.
        ids = [tokenizer(t, add_special_tokens=False, split_special_tokens=True).input_ids for t in TEXTS]
        found[name] = [
            {"text": t, "ids": i, "pieces": tokenizer.convert_ids_to_tokens(i)} for t, i in zip(TEXTS, ids, strict=True)
        ]
    said = {"transformers": transformers.__version__, "cases": found}
    pathlib.Path(__file__).with_name("real_golden.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
