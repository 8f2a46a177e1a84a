"""The pre-tokenizers that GGUF files name: how text is cut into words, within which byte-level BPE merges.

A pre-tokenizer has the form of tokenizer.json. Its expressions are those that the models were trained with; where
llama.cpp approximates one (upper and lower case in tekken, gpt-4o and others), the original counts.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import tokenizers as library

Step = Mapping[str, Any]  # a pre-tokenizer as an object of tokenizer.json


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words, and what else follows from the name of a pre-tokenizer.

    Attributes:
      steps: applied one after the other.
      ignore_merges: a word that is a token stays one token, independent of the merges.
      add_bos: text begins with BOS, unless the file states otherwise.
    """

    steps: tuple[Step, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _regexes(*patterns: str) -> tuple[Step, ...]:
    return tuple(
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    )


def _byte_level(use_regex: bool) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_DIGITS: Step = {"type": "Digits", "individual_digits": True}
_BYTES = _byte_level(use_regex=False)
_GPT2_WORDS = _byte_level(use_regex=True)  # splits by the expression _GPT2
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = _ENGLISH_SUFFIXES + "|" + _WORDS + _SPACES
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
# Words of lower case, with upper case only at their beginning (tiktoken's o200k_base); {suffixes} and {digits} vary.
_CASED = (
    f"{_BEFORE_WORD}{_UPPER}*{_LOWER}+<suffixes>|{_BEFORE_WORD}{_UPPER}+{_LOWER}*<suffixes>"
    r"|<digits>| ?[^\s\p{L}\p{N}]+[\r\n/]*"
) + _SPACES
_GPT4O = _CASED.replace("<suffixes>", _ENGLISH_SUFFIXES + "?").replace("<digits>", r"\p{N}{1,3}")
_LETTERS_WITHOUT_HAN = [letters.replace("]", r"&&[^\p{Han}]]") for letters in (_UPPER, _LOWER)]
_KIMI_K2 = r"\p{Han}+|" + (
    _GPT4O.replace(_UPPER, _LETTERS_WITHOUT_HAN[0]).replace(_LOWER, _LETTERS_WITHOUT_HAN[1]).replace("n/]*", "n]*")
)
_KANA_AND_HAN = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
) + _SPACES
# Letters of scripts with two cases, as of Unicode 11.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ"
    "-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹ"
    "ℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN_AND_HANGUL = "[一-龥ࠀ-一가-\ud7ff]+"
_WITHOUT_MARKS = " ?[^(\\s|.,!?…。，、।۔،)]+"

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((_GPT2_WORDS,)),
    "smollm": PreTokenizer((_DIGITS, _GPT2_WORDS)),
    "llama-bpe": PreTokenizer((*_regexes(_LLAMA3), _BYTES), ignore_merges=True, add_bos=True),
    "glm4": PreTokenizer((*_regexes(_LLAMA3), _BYTES), ignore_merges=True),
    "dbrx": PreTokenizer((*_regexes(_LLAMA3), _BYTES)),
    "qwen2": PreTokenizer((*_regexes(_QWEN2), _BYTES)),
    "qwen35": PreTokenizer((*_regexes(_QWEN35), _BYTES)),
    "default": PreTokenizer((*_regexes(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}"), _BYTES)),
    "falcon": PreTokenizer((*_regexes(r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9]{3}"), _BYTES)),
    "deepseek-llm": PreTokenizer(
        (
            *_regexes(
                "[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN_AND_HANGUL
            ),
            _DIGITS,
            _BYTES,
        )
    ),
    "deepseek-coder": PreTokenizer((*_regexes("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL), _DIGITS, _BYTES)),
    "deepseek-v3": PreTokenizer((*_regexes(r"\p{N}{1,3}", _KANA_AND_HAN, _DEEPSEEK3), _BYTES)),
    "kimi-k2": PreTokenizer((*_regexes(_KIMI_K2), _BYTES)),
    "afmoe": PreTokenizer(
        (
            *_regexes(
                r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",  # groups of three, counted from the end of a number
                "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
                _DEEPSEEK3,
            ),
            _BYTES,
        )
    ),
    "tekken": PreTokenizer(
        (*_regexes(_CASED.replace("<suffixes>", "").replace("<digits>", r"\p{N}")), _BYTES),
        ignore_merges=True,
        add_bos=True,
    ),
    "gpt-4o": PreTokenizer((*_regexes(_GPT4O), _BYTES)),
    "granite-embed-multi-97m": PreTokenizer((*_regexes(_GPT4O), _BYTES), ignore_merges=True),
    "tiny_aya": PreTokenizer((*_regexes(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O), _BYTES)),
    "youtu": PreTokenizer(
        (
            *_regexes(
                "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _KANA_AND_HAN,
                _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}"),
            ),
            _BYTES,
        ),
        ignore_merges=True,
    ),
    "minicpm5": PreTokenizer(
        (*_regexes(r"\p{N}{1,3}", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), _BYTES), ignore_merges=True
    ),
    "exaone-moe": PreTokenizer(
        (
            *_regexes(
                _ENGLISH_SUFFIXES + "|" + _BEFORE_WORD + r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
            ),
            _BYTES,
        )
    ),
    "seed-coder": PreTokenizer(
        (
            *_regexes(
                _QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+").replace(r"\p{N}|", r"\p{N}{1}|")
            ),
            _BYTES,
        )
    ),
    "bailingmoe": PreTokenizer(
        (
            *_regexes(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
                r"|\s+(?!\S)|\s+"
            ),
            _BYTES,
        )
    ),
    "ufakzeka": PreTokenizer((*_regexes(_QWEN2.removeprefix(_ENGLISH_SUFFIXES + "|")), _BYTES)),
    "laguna": PreTokenizer((*_regexes(r"[^\n]+|[\n]+", _QWEN2), _BYTES)),
    "jais-2": PreTokenizer(
        (
            *_regexes(
                _ENGLISH_SUFFIXES + "|" + _WORDS + r"|\s*[\r\n]+"
                r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)"
                r"|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
            ),
            _BYTES,
        )
    ),
    "spark2_5": PreTokenizer(
        (
            *_regexes(
                r"\p{N}{1,3}",
                _KANA_AND_HAN,
                _DEEPSEEK3.replace(r"[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+", r"[\p{P}\p{S}]+|[\r\n]"),
                r"\p{N}",
            ),
            _BYTES,
        )
    ),
    "bloom": PreTokenizer((*_regexes(_WITHOUT_MARKS), _BYTES)),
    "viking": PreTokenizer((*_regexes(_WITHOUT_MARKS, r"\p{N}"), _BYTES)),
    "chameleon": PreTokenizer(
        (
            *_regexes(
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            _BYTES,
        ),
        add_bos=True,
    ),
    "superbpe": PreTokenizer((*_regexes(r"\p{N}+", r"(?=(\d{3})+(?!\d))"), _BYTES)),
}
# Other names of the same pre-tokenizers.
ALIASES = {
    alias: name
    for name, aliases in {
        "gpt-2": "phi-2 mpt olmo jais trillion gigachat a.x-4.0 mellum modern-bert roberta-bpe exaone4 granite-docling "
        "jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code",
        "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        "glm4": "glm5",
        "dbrx": "smaug-bpe chatglm-bpe",
        "qwen2": "deepseek-r1-qwen stablelm2 hunyuan solar-open grok-2 megrez kormo f2llmv2",
        "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
        "gpt-4o": "llama4 kanana2 talkie minimax-m2",
        "tiny_aya": "cohere2moe",
        "bailingmoe": "bailingmoe2 llada-moe",
        "bloom": "poro-chat gpt3-finnish",
    }.items()
    for alias in aliases.split()
}


def canonical(name: str) -> str:
    """The name in `PRE_TOKENIZERS` of a name that a GGUF file has; other names unchanged."""
    return ALIASES.get(name, name)


def sequence(name: str) -> dict[str, Any]:
    """The pre-tokenizer `name` of `PRE_TOKENIZERS` as an object of tokenizer.json."""
    return {"type": "Sequence", "pretokenizers": [dict(step) for step in PRE_TOKENIZERS[name].steps]}


def name_of(pre_tokenizer: Mapping[str, Any] | None, ignore_merges: bool) -> str | None:
    """The first name in `PRE_TOKENIZERS` with the steps of a pre-tokenizer of tokenizer.json, or None."""
    steps = _steps(pre_tokenizer)
    same = (
        name
        for name, candidate in PRE_TOKENIZERS.items()
        if candidate.ignore_merges == ignore_merges and _steps(sequence(name)) == steps
    )
    return next(same, None)


def build(pre_tokenizer: Mapping[str, Any] | None) -> Any:
    """The pre-tokenizer of the `tokenizers` library that an object of tokenizer.json describes."""
    state = json.loads(library.Tokenizer(library.models.BPE()).to_str()) | {"pre_tokenizer": pre_tokenizer}
    return library.Tokenizer.from_str(json.dumps(state)).pre_tokenizer


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer without trim_offsets, which affects no ids."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer and "pretokenizers" in pre_tokenizer else [pre_tokenizer]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps if step]
