"""Text with visible token boundaries: colours on a terminal, bars elsewhere."""

import re
from collections.abc import Iterator, Sequence

from llm_jax.tokenizers.base import Tokenizer
from llm_jax.tokenizers.byte import utf8

_COLOURS = ("48;5;24", "48;5;58", "48;5;54", "48;5;22")  # backgrounds of the 256-colour palette
_RED, _END = "\x1b[41m", "\x1b[0m"


def colored(text: str, tokenizer: Tokenizer, colour: bool) -> str:
    """The text with its tokens separated; text without a token (dropped by a normalizer) is not marked.

    A token that stands for a part of a character is shown by its bytes.
    """
    pieces, last = [], 0
    for k, (between, own, index, (_, end)) in enumerate(parts(text, tokenizer)):
        if colour:
            start = _RED if index == tokenizer.unk else f"\x1b[{_COLOURS[k % len(_COLOURS)]}m"
            pieces.append(between + start + own + _END)
        else:
            pieces.append(between + "|" + (f"[{own}]" if index == tokenizer.unk else own))
        last = max(last, end)
    return "".join(pieces) + ("" if colour else "|") + _shown(utf8(text)[last:])


def parts(text: str, tokenizer: Tokenizer) -> Iterator[tuple[str, str, int, tuple[int, int]]]:
    """For each token: (text before it that belongs to no token, its text, its id, its span of bytes)."""
    encoded, last = utf8(text), 0
    for index, (begin, end) in zip(tokenizer.encode(text), tokenizer.spans(text), strict=True):
        begin = max(begin, last)
        token_text = _shown(encoded[begin:end]) or _shown(tokenizer.piece(index).encode())
        yield _shown(encoded[last:begin]), token_text, index, (begin, end)
        last = max(last, end)


def table(text: str, tokenizer: Tokenizer) -> list[str]:
    """A line per token: id, span in bytes, text in quotation marks."""
    return [f"{i:>7} {begin:>5}-{end:<5} '{own}'" for _, own, i, (begin, end) in parts(text, tokenizer)]


def label(tokenizer: Tokenizer, index: int) -> str:
    """The text of a token, or its piece if it has none of its own, such as a special token.

    Bytes that are a part of a character are written as <0xE2>.
    """
    text, piece = tokenizer.decode([index]), tokenizer.piece(index)
    if "�" in text and (own := _bytes_of(piece)) is not None:
        characters = own.decode(errors="surrogateescape")
        return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in characters)
    return text if text and "�" not in text else piece


def _bytes_of(piece: str) -> bytes | None:
    """The bytes of a piece that names them: <0xE2>, \\xe2, or in the alphabet of byte-level BPE; else None."""
    from llm_jax.tokenizers.words import BYTES

    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>|\\x([0-9a-f]{2})", piece):
        return bytes.fromhex(match[1] or match[2])
    return bytes(BYTES[c] for c in piece) if all(c in BYTES for c in piece) else None


def side_by_side(columns: Sequence[Sequence[str]], width: int) -> str:
    rows = range(max(map(len, columns)))
    lines = ([c[r] if r < len(c) else "" for c in columns] for r in rows)
    return "\n".join(" | ".join(f"{cell[:width]:<{width}}" for cell in line).rstrip() for line in lines)


def _shown(part: bytes) -> str:
    """Text with control characters (a terminal would obey them) and broken characters spelled out."""
    text = part.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
