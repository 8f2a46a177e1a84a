"""A small vocabulary of every form of tokenizer, by name."""

import functools
import io
import json
import re

import sentencepiece
import tokenizers as library

from llm_jax import tokenizers
from llm_jax.errors import UserError

TEXT = "the cat sat on the mat. a dog ran to the park, and back: hello world\n    return x; yes no maybe. " * 30
FORMS = ("model", "prepend", "metaspace", "gguf", "bytelevel", *tokenizers.TRAINED)
SENTENCEPIECE = FORMS[:4]  # with a space before the first word, and bytes for unknown characters


@functools.cache
def sentencepiece_model() -> bytes:
    """BPE with byte fallback and a space before the first word, as Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def llama_json(prepend: bool) -> str:
    """The same vocabulary as a tokenizer.json, by the normalizer Prepend or by the pre-tokenizer Metaspace."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = [
        (i, piece[:k], piece[k:])
        for piece, i in vocabulary.items()
        if not pieces.is_control(i) and not pieces.is_byte(i)
        for k in range(1, len(piece))
        if piece[:k] in vocabulary and piece[k:] in vocabulary
    ]
    model = library.models.BPE(
        vocabulary, [(a, b) for _, a, b in sorted(merges)], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = library.Tokenizer(model)
    if prepend:
        steps = [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = library.normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    decoders = library.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([library.AddedToken(t, special=True, normalized=False) for t in NAMES.values()])
    return tokenizer.to_str()


NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def bytelevel_json(special: tuple[str, ...] = CHATML) -> str:
    """Byte-level BPE with special tokens, as GPT-2's."""
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    trainer = library.trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()


@functools.cache
def form(name: str):
    """The tokenizer of one of `FORMS`."""
    config = json.dumps(NAMES | {"add_bos_token": True}).encode()
    if name == "model":
        return tokenizers.from_files({"tokenizer.model": sentencepiece_model(), "tokenizer_config.json": config})
    if name in ("prepend", "metaspace"):
        text = llama_json(name == "prepend").encode()
        return tokenizers.from_files({"tokenizer.json": text, "tokenizer_config.json": config})
    if name == "gguf":
        model = form("model")
        return tokenizers.from_gguf(model.to_gguf(model.vocab_size))
    if name == "bytelevel":
        config = json.dumps({"eos_token": "<|endoftext|>"}).encode()
        return tokenizers.from_files({"tokenizer.json": bytelevel_json().encode(), "tokenizer_config.json": config})
    sizes = {"word": 32, "wordpiece": 90, "char_bpe": 90}
    kind = tokenizers.get(name)
    try:
        return kind.train([TEXT], sizes.get(name, 360))
    except UserError as error:  # which names the size that this text allows
        size = re.search(r"vocabulary of (\d+) ids", str(error)) or re.search(r"which is (\d+)", str(error))
        assert size, error
        return kind.train([TEXT], int(size[1]))
