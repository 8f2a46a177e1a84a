"""Every rule that decides a verdict about tokens, embeddings, decoding and prompts, with figures on each side."""

import numpy as np

from llm_jax.intervals import Interval
from tests.research.verdict_cases import load, of, seeds

# ---------------------------------------------------------------- tokens and embeddings


def test_t1_and_t2_of_models():
    module = load("tokenization.models")

    def verdict(pieces=2.0, swapped=0.5, tuned=0.5, refused=True):
        bits = dict.fromkeys(module.PIECES, 2.0) | {"wordpiece": pieces, "word": 1.0, "char": 2.5, "byte": 2.5}
        rows = {"swapped in": swapped, "tuned": tuned}
        table = {
            kind: [
                {"bits per byte": x}
                | {
                    f"{k} {when}": 2 + more * (k != module.SWAPPED) + 0.001 * i
                    for k in module.OTHERS
                    for when, more in rows.items()
                }
                for i, x in enumerate(seeds(b, 0.001 * (1 + (kind == "wordpiece"))))
            ]
            for kind, b in bits.items()
        }
        return of(module.judge(table, {"bpe": {"a": True, "b": refused}}))

    assert verdict() == {"T1": "holds", "T2": "holds"}
    assert verdict(pieces=2.5)["T1"] == "holds when the kind is unigram or bpe or byte_bpe"
    assert verdict(tuned=-0.1)["T2"] == "holds when the model is not trained on"
    assert verdict(swapped=-0.1)["T2"] == verdict(refused=False)["T2"] == "fails"


def test_t1_and_t3_of_lengths():
    module = load("tokenization.sweep")

    def verdict(first=1.9, word_back=0.0, bpe_back=0.99):
        table = {("word", size): 1.5 for size in module.SIZES} | {(k, module.SIZES[-1]): 5.0 for k in module.SINGLE}
        table |= {(k, size): 2.0 - i / 10 for k in module.PIECES for i, size in enumerate(module.SIZES)}
        table["bpe", module.SIZES[1]] = first
        back = dict.fromkeys(module.PIECES, 1.0) | {"word": word_back, "bpe": bpe_back, "char": 1.0, "byte": 1.0}
        rows = {(k, s): {"tokens per word": n, "new words that come back": back[k]} for (k, s), n in table.items()}
        return of(module.judge(rows))

    assert verdict() == {"T1": "holds", "T3": "holds"}
    assert verdict(first=2.1)["T1"] == "fails"  # longer than with a smaller vocabulary
    assert verdict(first=1.4)["T1"] == "fails"  # shorter than words
    assert verdict(bpe_back=0.98)["T3"] == "holds when the kind is wordpiece or unigram or char_bpe or byte_bpe"
    assert verdict(word_back=0.01)["T3"] == "fails"


def test_e1_to_e4():
    module = load("word_vectors.sweep")

    def verdict(glove=0.3, shuffled=0.1, lower=(), cosines=((0.2, 0.1), (0.2, 0.1)), near=(1, 1, 1)):
        values = dict.fromkeys(module.KINDS, 0.3) | {"glove": glove, module.SHUFFLED: shuffled}
        table = {
            kind: [
                {"wordsim": x, "near king": ["queen"] * bool(n)}
                for x, n in zip(seeds(v, 0.01 if kind == module.SHUFFLED else 0.02), near, strict=True)
            ]
            for kind, v in values.items()
        }
        e3 = {str(i): {"cat mat": a, "cat sat": b} for i, (a, b) in enumerate(cosines)}
        return of(module.judge(table, {"skipgram": list(lower), "cbow": []}, e3))

    assert verdict() == dict.fromkeys(("E1", "E2", "E3", "E4"), "holds")
    assert verdict(glove=0.0)["E1"] == "holds when the kind is skipgram or cbow"
    assert (
        verdict(shuffled=0.3)["E2"] == "fails"
        and verdict(lower=("simlex",))["E2"] == "holds when the kind is cbow or glove"
    )
    assert verdict(cosines=((0.2, 0.1), (0.1, 0.2)))["E3"] == "undecided"
    assert verdict(cosines=((0.1, 0.1), (0.1, 0.2)))["E3"] == "fails"
    assert verdict(near=(1, 1, 0))["E4"] == "fails"


def test_e5():
    module = load("contextual.contextual")

    def verdict(first=0.1, last=0.1, static=1.0, bank=0.9):
        def layer(difference, word=1.0, other=1.0):
            return {
                "difference": Interval(difference, difference - 0.01, 1),
                "words": {"bank": {"within": word, "between": other}},
            }

        layers = {module.TABLE: layer(0, static), "0": layer(0), "1": layer(first), "2": layer(last, bank, 0.8)}
        return module.judge(layers).verdict

    assert verdict() == "holds" and verdict(first=0.01) == "holds when the layer is 2" and verdict(0, 0) == "fails"
    assert verdict(static=0.9) == verdict(bank=0.8) == "holds when the layer is 1, 2"


# ---------------------------------------------------------------- decoding and prompts


def decoded(loops=4, gain=1.0, outside=0.2, entropy=0.4, large=400, perplexity=1.0):
    module = load("decoding_quality.run")
    rng = np.random.default_rng(0)
    repeating, plain = [1, 2] * 8, list(range(16))
    methods = {"greedy": 3.0, "human": 1.0, "sampling": 1.2, "beam 4": 3.0, "nucleus 0.95": perplexity}
    made = {
        name: [
            {
                "ids": repeating if name == "greedy" and i < loops else plain,
                "logs": list(-x + 0.01 * rng.normal(size=16) + (name == "beam 4") * gain / 16),
            }
            for i in range(16)
        ]
        for name, x in methods.items()
    }  # fmt: skip
    steps = {
        "mass of 40": np.where(np.arange(400).reshape(20, 20) % 20 < 20 * outside, 0.9, 1.0),
        "entropy": np.ones((20, 20)),
        "nucleus": np.tile([10.0] * 10 + [float(large)] * 10, (20, 1)),
        "nucleus mass": np.full((20, 20), 0.96),
    } | {f"entropy of {n}": np.full((20, 20), entropy) for n in ("nucleus", "40", "40, temperature 0.7")}
    figures = {name: module.of_method(texts) for name, texts in made.items()}
    return of(module.judge(made, figures, steps))


def test_d2_d4_d5():
    assert decoded(loops=12) == {"D2": "holds", "D4": "holds", "D5": "holds"}
    assert decoded(loops=0)["D2"] == "holds for local optimality only"
    assert decoded(loops=12, gain=-1.0)["D2"] == "holds for repetition only" and decoded(0, -1.0)["D2"] == "fails"
    assert decoded(outside=0.05)["D4"] == "holds when entropy counts"
    assert decoded(entropy=0.5)["D4"] == "holds when the mass left out counts, not the entropy"
    assert decoded(outside=0.05, entropy=0.6)["D4"] == "fails"
    assert decoded(large=99)["D5"] == "fails" and decoded(large=100)["D5"] == "holds"
    assert decoded(perplexity=4.0)["D5"] == "fails"  # further from the human text than greedy


def test_d3_and_d6(monkeypatch):
    module = load("heavy_tail.run")

    def verdict(tail=0.1, other=0.05, recent=0.0, rarer=0.0, growth=(1.0, 1.0)):
        monkeypatch.setattr(module, "growth", lambda: list(growth))
        figures = {"cross-entropy": (tail, recent), "entmax 1.5": (other, rarer)}
        found = {
            name: [{"tail": a + 1e-4 * i, "recent": b + 1e-4 * i, "impossible": 0.0, "distance": 0.0} for i in range(3)]
            for name, (a, b) in figures.items()
        }
        return of(module.judge(found))

    assert verdict(tail=0.0055)["D3"] == "holds" and verdict(tail=0.005)["D3"] == "fails"
    everything = verdict(recent=0.0055, growth=(1.0, 1.5))
    assert everything["D6"].startswith(
        "holds: the growth is exponential; a lighter tail with entmax 1.5; repetition is in"
    )
    assert verdict(recent=0.0055, growth=(1.0, 1.49))["D6"].startswith("fails: the growth is not exponential")
    assert verdict(recent=0.005, growth=(1, 2))["D6"].startswith("fails: the growth is exponential")
    assert "a lighter tail with none" in verdict(other=0.1)["D6"]


def test_m1_to_m4():
    module = load("prompt_sensitivity.run")
    rng = np.random.default_rng(0)

    def verdict(template=0.6, gain=0.3, tokens=5.0, small=0.0):
        def draw(p):  # (paraphrases, examples)
            return (rng.random((4, 60)) < np.asarray(p)[:, None]).astype(float)

        cells, lengths = {}, {}
        for task in ("arithmetic", "sentiment"):
            for style in ("zero_shot", "cot_zero_shot", "expert"):
                base = 0.5 if style == "zero_shot" else 0.5 + gain
                cells["main", task, style] = draw([base, base, base, max(base - template * (style == "zero_shot"), 0)])
                lengths["main", task, style] = np.full((4, 60), 3.0) + tokens * (style == "cot_zero_shot")
            for style, p in (("zero_shot", 0.5), ("cot_zero_shot", 0.5 + small), ("expert", 0.5)):
                cells["small", task, style] = draw([p] * 4)
        return of(module.judge(cells, lengths))

    moved = verdict()
    assert moved["M1"] == "holds" and moved["M2"] == "holds" and moved["M3"] == "holds"
    assert moved["M4"] == "fails: it pays for main"
    still = verdict(template=0.0, gain=-0.3)
    assert still["M1"] == "fails" and still["M2"] == "fails" and still["M3"] == "holds for the length only"
    assert still["M4"] == "consistent; large models untested here"
    assert verdict(template=0.0, gain=-0.3, tokens=0.0, small=0.3)["M3"] == "fails"
    assert verdict(template=0.0, gain=-0.3, small=0.3)["M4"] == "fails: it pays for small"
