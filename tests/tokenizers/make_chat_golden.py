"""Writes chat_golden.json: texts, ids and masks of assistant tokens that transformers makes of conversations.

pip install torch transformers sentencepiece jinja2 && PYTHONPATH=. python tests/tokenizers/make_chat_golden.py
"""

import json
import pathlib
import tempfile

import transformers

from tests.tokenizers import forms
from tests.tokenizers.chat_cases import CONVERSATIONS, FORMS, PAIRS, TEMPLATES


def loaded(name: str) -> transformers.PreTrainedTokenizerFast:
    directory = pathlib.Path(tempfile.mkdtemp())
    if name == "bytelevel":
        text, names = forms.bytelevel_json(), {"eos_token": "<|endoftext|>"}
    else:
        text, names = forms.llama_json(name == "prepend"), forms.NAMES
    (directory / "tokenizer.json").write_text(text)
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory)


def main() -> None:
    cases = []
    for name in FORMS:
        tokenizer = loaded(name)
        for template, conversation in PAIRS:
            if name == "bytelevel" and template in ("zephyr", "mistral"):
                continue  # without BOS
            record = CONVERSATIONS[conversation]
            arguments = {
                "conversation": record["messages"],
                "chat_template": TEMPLATES[template],
                "tools": record.get("tools"),
                "documents": record.get("documents"),
            }
            made = tokenizer.apply_chat_template(
                **arguments, return_dict=True, return_assistant_tokens_mask=template == "generation"
            )
            text = tokenizer.apply_chat_template(**arguments, tokenize=False)
            case = {"form": name, "template": template, "conversation": conversation, "text": text}
            cases.append(case | {"ids": made["input_ids"], "mask": made.get("assistant_masks")})
    lines = ",\n".join(json.dumps(case) for case in cases)
    path = pathlib.Path(__file__).with_name("chat_golden.json")
    path.write_text(f'{{"transformers": "{transformers.__version__}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
