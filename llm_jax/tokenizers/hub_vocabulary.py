"""tokenizer.json from the files of tokenizers that were saved without it: vocab.json and merges.txt, or vocab.txt.

What these files leave out (how text is normalized and cut into words) follows from the tokenizer class, as in
transformers.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers as library

from llm_jax.errors import UserError
from llm_jax.tokenizers import pre_tokenizers, special

_BYTE_LEVEL = ("GPT2", "CodeGen", "GPTNeoX", "Qwen2")
_WORDPIECE = ("Bert", "DistilBert", "Electra", "MobileBert")
_BERT_TOKENS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")


def tokenizer_json(files: Mapping[str, bytes]) -> bytes:
    """The content of tokenizer.json, without the tokens that only tokenizer_config.json and the files like it name.

    Args:
      files: content by name; those in `special.OLDER_VOCABULARIES` and in `special.FILES`.

    Raises:
      UserError: no vocabulary, one of a class that is not supported, or a damaged one.
    """
    tokenizer_config, config = (special.parse(files, name) for name in ("tokenizer_config.json", "config.json"))
    kind = special.class_name(tokenizer_config, config)
    if "vocab.json" in files and "merges.txt" in files and kind in _BYTE_LEVEL:
        return _byte_level(files, kind)
    if "vocab.txt" in files and kind in _WORDPIECE:
        return _wordpiece(files)
    present = [name for name in special.OLDER_VOCABULARIES if name in files]
    if not present:
        raise UserError(
            "no tokenizer.json here; copy the files of the tokenizer into the directory, which transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(DIRECTORY) writes"
        )
    raise UserError(
        f"no tokenizer.json here, and {' and '.join(present)} of the class {kind or 'unknown'!r} cannot be read; "
        "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes tokenizer.json"
    )


def _byte_level(files: Mapping[str, bytes], kind: str) -> bytes:
    vocabulary = special.parse(files, "vocab.json")
    lines = _lines(files, "merges.txt")
    pairs = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
    merges = [(first, second) for first, _, second in pairs]
    try:
        tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"vocab.json and merges.txt do not fit each other ({error})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.build(pre_tokenizers.sequence("gpt-2")["pretokenizers"][0])
    if kind == "Qwen2":
        tokenizer.normalizer = library.normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.build(pre_tokenizers.sequence("qwen2"))
    tokenizer.decoder = library.decoders.ByteLevel()
    return _with_special(tokenizer, special.class_tokens(kind).values())


def _wordpiece(files: Mapping[str, bytes]) -> bytes:
    vocabulary = {piece: index for index, piece in enumerate(_lines(files, "vocab.txt"))}
    if missing := [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]:
        raise UserError(f"vocab.txt lacks {', '.join(missing)}")
    tokenizer = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=True)  # `hub_files` applies do_lower_case
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece(prefix="##")
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return _with_special(tokenizer, _BERT_TOKENS)


def _lines(files: Mapping[str, bytes], name: str) -> list[str]:
    """The lines of a file, with any line ends; other characters that `str.splitlines` divides at may be in a piece."""
    try:
        text = files[name].decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is damaged: {error}") from error
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def _with_special(tokenizer: library.Tokenizer, names: Any) -> bytes:
    present = [name for name in dict.fromkeys(names) if tokenizer.token_to_id(name) is not None]
    tokenizer.add_special_tokens([library.AddedToken(name, special=True, normalized=False) for name in present])
    return tokenizer.to_str().encode()
