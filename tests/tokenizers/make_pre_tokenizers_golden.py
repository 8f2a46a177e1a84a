"""Writes pre_tokenizers_golden.json: the ids of llama.cpp by every pre-tokenizer that GGUF files name, and the names of
`PRE_TOKENIZERS` by which it gives the ids of an alias.

The vocabulary merges across the borders of words, so that the ids show where a pre-tokenizer cuts; words without merges
show whether a word that is a token stays whole. No upper case outside ASCII, which llama.cpp approximates.

python -m tests.tokenizers.make_pre_tokenizers_golden    (with llama-cpp-python, requirements-peers.txt)
"""

import itertools
import json
import pathlib
import tempfile

import tokenizers as library

from llm_jax.tokenizers.pre_tokenizers import ALIASES, PRE_TOKENIZERS

TEXTS = [
    "the don't we'll I'VE you'Re 'tis it's SHE'D they'RE o'clock rock'n'roll",
    "12345 678 3.14 1,000,000 x1y22z333 4444 0b1010 v2.0.1 ٣٤٥ ½²³ Ⅷ 10:30",
    "HTMLParser camelCase snake_case SCREAMING_CASE x=y+1 {a:b} a/b// \\n f(x)->g[0]; #include <stdio.h> &&||!!",
    "  leading  double   triple    four trailing  \n\n\n  new\tline\t\tcarriage\r\nreturn \n x\n",
    "end.\nnext;\r\n}\n\n#\n  ..  \n\n  a       b\n\n\n\tc     ",
    "日本語のテキスト 中文字符，标点。 한국어 ㄱㄴ ไทย naïve ñandú straße",
    "🚀 emoji 👩‍👩‍👧 ☃️ — dash … ‘quotes’ “double” „low“ ¡hola! ¿qué? €5 £6 $7 + - ~ ^ ` | _ @ %",
    "IMGIMGABZ <sentinel:12> <tag> </tag> *bold* user@example.org https://example.org/a?b=c&d=%20 I'llama we'd'd 'mad",
    "हिन्दी e\u0301 n\u0303o",
    "wait…what。really，yes、no।ok، a ``b`` x`y` a$b c|d e~f 5`6 (x) [y] {z} € 7 £  \t a1b2 3c 4 5  €  ",
]
WORDS = ["Ġdouble", "Case", "the", "Ġ123", "678"]
# The texts (by index) in which llama.cpp approximates the expressions of a pre-tokenizer: it does not tell upper case
# from lower case, takes marks out of words, or leaves the digits of a number together.
APPROXIMATED = {"tekken": (8,), "gpt-4o": (8,), "kimi-k2": (8,), "youtu": (2,), "deepseek-llm": (1, 7)}


def metadata(golden: dict, pre: str) -> dict:
    """The metadata of a GGUF file with the golden vocabulary."""
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    tokens = list(dict.fromkeys([*alphabet, *(merge.replace(" ", "") for merge in golden["merges"]), *WORDS]))
    key = "tokenizer.ggml."
    said = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [1] * len(tokens), "merges": golden["merges"]}
    return {"general.architecture": "llama"} | {key + name: value for name, value in said.items()}


def merges() -> list[str]:
    """Merges of whole texts, without regard to words, and last of all pairs of neighbouring bytes."""
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    trainer = library.trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    whole = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    byte_names = "\n".join(tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0] for text in TEXTS)
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(byte_names) if "\n" not in (a, b)]
    return list(dict.fromkeys([*whole, *pairs]))


def main() -> None:
    from llm_jax.checkpoints import gguf
    from tests.checkpoints.test_llama_cpp import opened

    path = pathlib.Path(__file__).with_name("pre_tokenizers_golden.json")
    earlier = json.loads(path.read_text()) if path.exists() else {"merges": merges()}
    golden = {"merges": earlier["merges"], "texts": TEXTS, "ids": {}}

    def encoded(pre: str) -> tuple[bool, list[list[int]]]:
        """Whether llama.cpp adds BOS, and its ids of the texts without it."""
        with tempfile.TemporaryDirectory() as directory:
            names = metadata(golden, pre) | {"tokenizer.ggml.bos_token_id": 3}
            gguf.write(pathlib.Path(directory) / "vocabulary.gguf", names, {}, [])
            model = opened(pathlib.Path(directory) / "vocabulary.gguf", vocab_only=True)
            ids = [model.tokenize(text.encode(), add_bos=False) for text in TEXTS]
            return model.tokenize(b"a", add_bos=True)[0] == 3, ids

    made = {pre: encoded(pre) for pre in PRE_TOKENIZERS}
    for pre, (_, ids) in made.items():
        approximated = APPROXIMATED.get(pre, ())
        golden["ids"][pre] = [None if index in approximated else row for index, row in enumerate(ids)]
    golden["aliases"] = {
        alias: [pre for pre in PRE_TOKENIZERS if made[pre] == result]
        for alias in ALIASES
        for result in [encoded(alias)]
    }
    path.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
