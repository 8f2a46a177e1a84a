"""Masked language modelling: shares, whole words, reproducibility, and a training run."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from llm_jax import configuration as config_lib
from llm_jax import tokenizers
from llm_jax.data import masking
from llm_jax.data.corpus import Split
from llm_jax.data.rows import Rows, Shuffled
from llm_jax.errors import UserError
from llm_jax.schema import LossConfig
from llm_jax.training import losses

TEXT = "The quick brown fox's den, it seems, was well-hidden.\n\nNobody_there 1234 cafés: größer; 日本語 x" * 30
BYTE = tokenizers.get("byte").train([], 0)
SHARE = 0.15


def rows(tokenizer, *documents: str, seq_len: int = 64) -> Rows:
    ids = [tokenizers.document(tokenizer, text) for text in documents]
    offsets = np.cumsum([0, *map(len, ids)])
    return Rows(Split(np.concatenate(ids).astype(np.uint16), offsets, sum(len(t.encode()) for t in documents)), seq_len)


def hidden(tiny, tokenizer, plain, kind: str, seed: int = 0, share: float = SHARE):
    config: LossConfig = dataclasses.replace(tiny.loss, masked=kind, mask_prob=share)
    return masking.row_masker(config, tokenizer)(plain, seed)


@pytest.fixture(scope="module")
def many(tiny):
    """(inputs, targets, mask, segments) of 200,000 tokens of bytes, some of them BOS, EOS and padding."""
    draw = np.random.default_rng(0)
    documents = ["".join(map(chr, draw.integers(32, 127, draw.integers(1, 90)))) for _ in range(4000)]
    found = hidden(tiny, BYTE, rows(BYTE, *documents), "tokens")
    made = [found[i] for i in range(len(found) + 1)]
    return [np.concatenate([row[name] for row in made]) for name in ("inputs", "targets", "mask", "segments")]


def within(found: float, share: float, of: int) -> None:
    """A binomial share, within 4 standard errors."""
    assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / of), (found, share, of)


def test_shares_are_those_of_the_paper(many):
    inputs, targets, mask, segments = many
    text = (targets > 2) & (segments > 0)
    within(mask[text].mean(), SHARE, text.sum())
    chosen, masked = mask == 1, inputs == BYTE.vocab_size
    within(masked[chosen].mean(), 0.8, chosen.sum())
    # A random byte is the old one once in 256.
    other = chosen & ~masked & (inputs != targets)
    within(other.sum() / chosen.sum(), 0.1 * 255 / 256, chosen.sum())
    np.testing.assert_array_equal(inputs[~chosen], targets[~chosen])


def test_random_tokens_are_all_ids_of_text_alike(many):
    inputs, targets, mask, _ = many
    other = inputs[(mask == 1) & (inputs < BYTE.vocab_size) & (inputs != targets)]
    counts = np.bincount(other, minlength=BYTE.vocab_size)
    assert not counts[:3].any()
    high = counts[3 + 128 :]  # bytes that this text never has
    within(high.sum() / other.size, 128 / 255, other.size)
    assert np.ptp(high) < 10 * np.sqrt(high.mean())


def test_special_tokens_and_padding_are_never_chosen(many, tiny):
    _, targets, mask, segments = many
    assert not mask[(targets < 3) | (segments == 0)].any()
    assert {0, 1, 2} <= set(targets.tolist())
    word = tokenizers.get("word").train([TEXT], 12)
    found = hidden(tiny, word, rows(word, TEXT), "tokens", share=1.0)[0]
    unknown = found["targets"] == word.unk
    assert unknown.any() and not found["mask"][unknown].any() and found["mask"][found["targets"] > 3].all()


@pytest.mark.parametrize(
    ("kind", "size"),
    [("byte", 0), ("char", 99), ("wordpiece", 120), ("bpe", 330), ("unigram", 316), ("byte_bpe", 300), ("word", 20)],
)
def test_words_are_hidden_whole(tiny, kind, size):
    """The words are those of a regular expression over the text, by the spans of the tokens."""
    tokenizer = tokenizers.get(kind).train([TEXT], size)
    spans, starts = tokenizer.spans(TEXT), np.zeros(len(TEXT.encode()) + 1, int)
    for number, word in enumerate(re.finditer(r"\w+", TEXT), 1):
        begin, end = (len(TEXT[:place].encode()) for place in word.span())
        starts[begin:end] = number
    ids = tokenizer.encode(TEXT)
    # A token may begin with the space before its word.
    words = np.array([starts[max(begin, end - 1)] for begin, end in spans])
    plain = rows(tokenizer, TEXT, seq_len=len(ids) + 1)
    found = hidden(tiny, tokenizer, plain, "words")[0]
    np.testing.assert_array_equal(found["targets"][1:], ids)
    mask, known = found["mask"][1:], np.array([i != tokenizer.unk for i in ids])
    pieces = 0
    for number in range(1, words.max() + 1):
        own = mask[(words == number) & known]
        assert len(set(own.tolist())) <= 1, TEXT[: number * 9][-30:]
        pieces += len(own) > 1 and own.any()
    assert pieces or kind == "word"
    alone = hidden(tiny, tokenizer, plain, "tokens")[0]["mask"][1:]
    split = [set(alone[words == number].tolist()) for number in range(1, words.max() + 1)]
    assert kind == "word" or any(len(s) == 2 for s in split)


def test_the_words_of_a_vocabulary_with_its_own_mask(tiny):
    """As BERT's: '##' goes on with a word, [MASK] is in the vocabulary, and special tokens are no random ones."""
    import tokenizers as library

    from llm_jax.tokenizers.hub import HubTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bank", "##s", "river", ".", "a", "##way"]
    made = library.Tokenizer(library.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    made.decoder = library.decoders.WordPiece()
    made.add_special_tokens(pieces[:5])
    tokenizer = HubTokenizer(made.to_str(), {"unk_token": "[UNK]"})
    found = masking.MaskingVocabulary.of(tokenizer)
    assert found.mask == masking.mask_id(tokenizer) == 4 and found.ordinary.tolist() == [5, 6, 7, 8, 9, 10]
    config = dataclasses.replace(tiny.loss, masked="words")
    assert masking.vocab_size(config, tokenizer) == len(pieces) and masking.vocab_size(config, BYTE) == 260
    assert np.flatnonzero(found.begins).tolist() == [6, 10] and not found.ends[8]
    row = hidden(tiny, tokenizer, rows(tokenizer, "banks river. away banks " * 99, seq_len=500), "words", share=0.5)[0]
    joined = np.flatnonzero(np.isin(row["targets"], (6, 10)))
    np.testing.assert_array_equal(row["mask"][joined], row["mask"][joined - 1])
    assert 0.3 < row["mask"].mean() < 0.7


def test_masks_are_a_function_of_seed_and_row(tiny):
    plain = rows(BYTE, TEXT)
    stream = hidden(tiny, BYTE, Shuffled(plain, 3), "words", seed=5)
    again = hidden(tiny, BYTE, Shuffled(plain, 3), "words", seed=5)
    for index in (7, 0, 7):
        jax.tree.map(np.testing.assert_array_equal, stream[index], again[index])
    # The same in every process.
    assert np.flatnonzero(stream[7]["mask"]).tolist() == [15, 20, *range(36, 47), 62]
    other = hidden(tiny, BYTE, Shuffled(plain, 3), "words", seed=6)
    assert (stream[0]["mask"] != other[0]["mask"]).any()
    place = {tuple(stream[i]["targets"]): i for i in range(plain.num_full)}
    next_epoch = place[tuple(stream[plain.num_full]["targets"])]
    assert (stream[plain.num_full]["mask"] != stream[next_epoch]["mask"]).any()


def test_the_loss_is_that_of_the_hidden_tokens_alone(make, tiny):
    model, params = make(causal=False, vocab_size=260)
    found = hidden(tiny, BYTE, rows(BYTE, TEXT, seq_len=32), "words")
    batch = {name: np.stack([found[i][name] for i in range(4)]) for name in found[0]}
    loss = jax.jit(lambda b: losses.make(tiny.loss, model, 8)(params, {}, b, 0, None))
    total, count = loss(batch)
    logits = np.asarray(jax.jit(lambda t: model.apply({"params": params}, t))(batch["inputs"]), np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -sum(logs[b, t, batch["targets"][b, t]] for b, t in np.argwhere(batch["mask"]))
    np.testing.assert_allclose([total, count], [want, batch["mask"].sum()], rtol=1e-5)
    elsewhere = np.where(batch["mask"] == 1, batch["targets"], 7)
    np.testing.assert_array_equal(loss(batch | {"targets": elsewhere})[0], total)


def test_a_run_goes_on_bit_for_bit_and_is_evaluated(command, tmp_path, text_file):
    encoder = ("--config.model.causal=False", "--config.loss.masked=words", "--config.optim.schedule=constant")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command("train", f"--workdir={parts}", *encoder, "--config.train.steps=4")
    command("train", f"--workdir={parts}", *encoder)
    said = command("train", f"--workdir={whole}", *encoder).stdout
    assert "next: python -m llm_jax.evaluate" in said and "gzip" not in said
    lines = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (parts, whole)]
    figures = [[(m["step"], m["loss"], m["grad_norm"]) for m in some if "loss" in m] for some in lines]
    assert figures[0] == figures[1] and len(figures[0]) == 8
    assert json.loads((whole / "config.json").read_text())["model"]["vocab_size"] == 260
    found = json.loads(command("evaluate", f"--checkpoint={whole}", "--json").stdout)
    summary = json.loads((whole / "summary.json").read_text())
    assert found["loss"] == pytest.approx(summary["validation_loss"], rel=1e-5)
    assert found["tokens"] == summary["validation_tokens"] and found["compressed_bits_per_byte"] == {}
    assert "was trained with loss.masked" in command("evaluate", f"--checkpoint={whole}", "--stride=4", code=2).stderr
    (tmp_path / "a.txt").write_text("a")
    said = command("evaluate", f"--checkpoint={whole}", f"--data={tmp_path / 'a.txt'}", code=2).stderr
    assert "the loss counts no held-out token" in said
    shown = command(
        "show",
        "rows",
        "--config=tests/tiny.py",
        f"--config.data.source={text_file}",
        f"--config.data.cache_dir={tmp_path}",
        *encoder,
        "--rows=1",
    ).stdout
    count = int(re.search(r"(\d+) counted targets", shown)[1])
    assert 0 < count < 32 and sum(len(line) - 2 for line in shown.splitlines() if line.startswith("+ ")) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked": "words"}, "loss.masked=words predicts masked tokens from both sides; set model.causal=False"),
        ({"causal": False}, "model.causal=False attends to the next token; set loss.masked to tokens or words"),
        ({"causal": False, "masked": "words", "prompts": ("a",)}, "set eval.prompts=() and eval.tasks=()"),
        (
            {"causal": False, "masked": "words", "kind": "unlikelihood"},
            "loss.kind=unlikelihood is defined for next-token prediction only",
        ),
        (
            {"causal": False, "masked": "words", "data": "instructions"},
            "masked=words hides tokens of data.kind=text",
        ),
        ({"masked": "letters"}, "'loss.masked' is 'letters'; expected one of none, tokens, words"),
        ({"mask_prob": 1.5}, "'loss.mask_prob' is 1.5; expected a number of at most 1.0"),
        ({"mask_prob": 0.0}, "'loss.mask_prob' is 0.0; expected a number of at least 0.001"),
    ],
)
def test_what_contradicts_itself_is_refused(tiny, changes, message):
    mapping = config_lib.as_dict(tiny)
    places = {"causal": ("model", "causal"), "prompts": ("eval", "prompts"), "data": ("data", "kind")}
    for name, value in changes.items():
        section, key = places.get(name, ("loss", name))
        mapping[section][key] = value
    with pytest.raises(UserError) as error:
        losses.check(config_lib.build(mapping))
    assert message in str(error.value)
