"""Sentencepiece models as tokenizers of the `tokenizers` library, whose form on disk is tokenizer.json."""

import re
from typing import Any

import tokenizers as library

from llm_jax.errors import UserError
from llm_jax.tokenizers.sentencepiece_model import proto

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _UNUSED, BYTE = range(1, 7)  # types of pieces
SCORE_UNIT = 2.0**-7  # of the scores of a unigram model; sums of up to 2**24 units are exact in float32
SPACE = "\u2581"  # represents a space in pieces
_NEVER = -1000.0  # score of a piece that sentencepiece never matches though the text has it; others are above -100


def from_model(model: bytes, literal_spaces: bool = False) -> library.Tokenizer:
    """The tokenizer with the same pieces, which encodes every text to the same ids.

    The ids may differ where a unigram model has several segmentations of the same probability ("aa" "a" and "a" "aa"):
    sentencepiece adds scores in float32, the library in float64. Sums of multiples of `SCORE_UNIT` are exact.
    Where a model normalizes text, the library leaves some sequences of characters as they are (half-width katakana with
    voicing marks).

    Args:
      model: the serialized model, of BPE or unigram.
      literal_spaces: pieces have spaces instead of `SPACE`, which is a character like any other in the text
        (`pieces.BpeTokenizer`).

    Raises:
      UserError: the library cannot express the model.
    """
    p = proto.ModelProto.FromString(model)
    bpe = p.trainer_spec.model_type == proto.TrainerSpec.BPE
    if not bpe and p.trainer_spec.model_type != proto.TrainerSpec.UNIGRAM:
        raise UserError("tokenizer.json cannot express this tokenizer.model: expected BPE or unigram")
    if p.trainer_spec.treat_whitespace_as_suffix or not p.normalizer_spec.escape_whitespaces:
        raise UserError("tokenizer.json cannot express this tokenizer.model: expected pieces that begin with spaces")
    texts = [x.piece.replace(SPACE, " ") if literal_spaces else x.piece for x in p.pieces]
    if len(set(texts)) != len(texts):
        raise UserError("tokenizer.json cannot express this tokenizer.model: two of its pieces are the same")
    # A user-defined piece with a space never matches, because the text has SPACE there.
    user_defined = [
        text for text, x in zip(texts, p.pieces, strict=True) if x.type == USER_DEFINED and " " not in x.piece
    ]
    tokenizer = library.Tokenizer(_bpe(p, texts) if bpe else _unigram(p, texts))
    normalizers, splits = [] if literal_spaces else _normalizers(p.normalizer_spec), []
    if not bpe:
        splits.append(_first_characters([x.piece for x in p.pieces if x.type in (CONTROL, UNKNOWN, BYTE)]))
    elif user_defined and p.normalizer_spec.add_dummy_prefix:
        # Added tokens would be normalized, and begin with the space of the prefix.
        tokenizer.model.ignore_merges = True
        splits.append("|".join(map(re.escape, sorted(user_defined, key=len, reverse=True))))
    elif user_defined:
        tokenizer.add_tokens([library.AddedToken(token, normalized=True) for token in user_defined])
    if normalizers:
        tokenizer.normalizer = library.normalizers.Sequence(normalizers)
    if splits:
        steps = [library.pre_tokenizers.Split(library.Regex(pattern), "isolated") for pattern in splits]
        tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = _decoder(literal_spaces, p.normalizer_spec.add_dummy_prefix)
    special = [t for t, x in zip(texts, p.pieces, strict=True) if x.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def has_exact_scores(model: bytes) -> bool:
    """Whether sums of scores do not depend on the precision, so that `from_model` chooses the same segmentations."""
    p = proto.ModelProto.FromString(model)
    return p.trainer_spec.model_type == proto.TrainerSpec.BPE or all(x.score % SCORE_UNIT == 0 for x in p.pieces)


def _bpe(p: Any, texts: list[str]) -> library.models.BPE:
    """Pairs of normal pieces merge into a piece; the highest score first, then the lowest id."""
    ranks = {t: (-x.score, i) for i, (t, x) in enumerate(zip(texts, p.pieces, strict=True)) if x.type == NORMAL}
    merges = sorted(
        (rank, piece[:k], piece[k:])
        for piece, rank in ranks.items()
        for k in range(1, len(piece))
        if piece[:k] in ranks and piece[k:] in ranks
    )
    return library.models.BPE(
        {text: i for i, text in enumerate(texts)},
        [(first, second) for _, first, second in merges],
        unk_token=next((t for t, x in zip(texts, p.pieces, strict=True) if x.type == UNKNOWN), None),
        byte_fallback=p.trainer_spec.byte_fallback,
        fuse_unk=True,
    )


def _unigram(p: Any, texts: list[str]) -> library.models.Unigram:
    scores = [x.score for x in p.pieces if x.type == NORMAL]
    highest, lowest = max(scores), min(scores)

    def score(piece: Any) -> float:
        if piece.type == USER_DEFINED:
            return _NEVER if " " in piece.piece else user_defined_score(piece.piece, highest)
        return piece.score if piece.type == NORMAL else lowest

    unknown = next(i for i, x in enumerate(p.pieces) if x.type == UNKNOWN)
    vocabulary = [(t, score(x)) for t, x in zip(texts, p.pieces, strict=True)]
    return library.models.Unigram(vocabulary, unknown, p.trainer_spec.byte_fallback)


def user_defined_score(piece: str, highest: float) -> float:
    """The score that sentencepiece's unigram model gives a user-defined piece (EncodeOptimized in unigram_model.cc)."""
    return len(piece.encode()) * highest - 0.1


def _first_characters(special: list[str]) -> str:
    """An expression for the first character of each of these pieces, where the rest of the piece follows it.

    Text never becomes such a piece, and the library's unigram model, which knows no types of pieces, would choose it.
    """
    return "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in special if name[1:])


def _normalizers(n: Any) -> list[Any]:
    steps: list[Any] = []
    if n.precompiled_charsmap:
        steps.append(library.normalizers.Precompiled(n.precompiled_charsmap))
    if n.remove_extra_whitespaces:
        steps.append(library.normalizers.Replace(library.Regex(r"\A +| +\z| +(?= )"), ""))
    if n.add_dummy_prefix:
        steps.append(library.normalizers.Prepend(SPACE))
    return [*steps, library.normalizers.Replace(" ", SPACE)]


def _decoder(literal_spaces: bool, prefix: bool) -> Any:
    decoders = library.decoders
    steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if not literal_spaces:
        steps = [decoders.Replace(SPACE, " "), *steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])]
    return decoders.Sequence(steps)
