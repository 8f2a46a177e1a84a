"""Every rule that decides a verdict, with made-up figures on each side of its threshold."""

import dataclasses
import importlib

import numpy as np
import pytest
from absl import flags

from llm_jax import intervals
from llm_jax.intervals import Interval
from llm_jax.research import verdicts

SEEDS = 3


def load(name):
    """A module of experiments/, without the flags that it defines: several scripts define --seeds."""
    module = importlib.import_module(f"experiments.{name}")
    for flag in flags.FLAGS.flags_by_module_dict().pop(module.__name__, []):
        delattr(flags.FLAGS, flag.name)
    return module


def seeds(value, spread=0.001):
    """Three values around one."""
    return [value - spread, value, value + spread]


def of(results):
    return {result.statement + (result.part and f" {result.part}"): result.verdict for result in results}


# ---------------------------------------------------------------- the rules themselves


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.2, 0.11, 0.3), "holds"),
        ((0.2, 0.1, 0.3), "undecided"),
        ((0.0, -0.2, 0.1), "undecided"),
        ((0.0, -0.2, 0.09), "fails"),
    ],
)
def test_above(interval, verdict):
    assert verdicts.above(Interval(*interval), 0.1) == verdict
    assert verdicts.all_above([Interval(1, 1, 1), Interval(*interval)], 0.1) == verdict
    nan = Interval(1.0, float("nan"), float("nan"))  # one seed decides nothing
    assert verdicts.above(nan) == verdicts.all_above([nan]) == "undecided"


def test_limits_without_intervals():
    assert [verdicts.within(x, 1, 2) for x in (0.99, 1, 2, 2.01)] == ["fails", "holds", "holds", "fails"]
    assert [verdicts.at_most(x, 1, 2) for x in (1, 1.01, 1.99, 2)] == ["holds", "undecided", "undecided", "fails"]
    values = ((0.5, 0.9), (0.49, 0.9), (0.0, 0.1), (0.0, 0.09))
    assert [verdicts.range_above(v, 0.5, 0.1) for v in values] == ["holds", "undecided", "undecided", "fails"]


def test_what_was_not_measured_is_undecided():
    nan = float("nan")
    assert verdicts.within(nan, 1, 2) == verdicts.at_most(nan, 1, 2) == verdicts.parts([], []) == "undecided"
    assert verdicts.range_above([5, nan], 1, 0) == verdicts.range_above([nan, 5], 1, 0) == "undecided"
    assert np.isnan(intervals.wilson(0, 0)).all()
    with pytest.raises(ValueError, match="at least one value"):
        intervals.bootstrap([])


@pytest.mark.parametrize("count", [1, 7, 1000, 3001])
def test_the_bootstrap_draws_the_same_resamples_in_blocks(monkeypatch, count):
    x = np.random.default_rng(1).normal(size=count)
    indices = np.random.default_rng(3).integers(0, count, (500, count))
    low, high = np.quantile(x[indices].mean(1), [0.025, 0.975])
    for block in (1, 5000, 2**20):
        monkeypatch.setattr(intervals, "_BLOCK", block)
        assert intervals.bootstrap(x, seed=3, draws=500) == Interval(float(x.mean()), float(low), float(high))


def test_names_of_what_passes():
    assert verdicts.named(["a", "b"], ["a", "b"]) == "holds"
    assert verdicts.named(["a", "b"], ["a", "b", "c"], "the kind is") == "holds when the kind is a or b"
    assert verdicts.named(["a"], ["a", "b"]) == "holds when a"
    assert verdicts.named([], ["a"], none="undecided") == "undecided"
    assert [verdicts.parts(["x", "y"], p) for p in ((1, 1), (1, 0), (0, 1), (0, 0))] == [
        "holds",
        "holds for x only",
        "holds for y only",
        "fails",
    ]


# ---------------------------------------------------------------- positions


def lengths(gains=(), rises=(), ropes=(), seen=(), places=()):
    """P2 to P8 where kinds have these losses below `none`, rises of the loss, and accuracies of copying."""
    report = load("length_extrapolation.report")
    kinds = ("none", "sinusoidal", "sinusoidal concatenated", "learned", "shaw", "shaw keys", "shaw values")
    kinds += ("t5", "alibi", "rope", "rope, yarn, fine-tuned")
    gains, rises, seen, places = map(dict, (gains, rises, seen, places))

    def run(kind, seed):
        at_1 = 3.0 + 0.1 * seed - gains.get(kind, 0) + 0.001 * seed * (kind != "none")
        rise = rises.get(kind, 0.0) + 0.001 * seed
        return {"windows": {"1": at_1}, "sliding": {"1": 3.0, "8": 3.0 + rise}}

    loss = {kind: [run(kind, seed) for seed in range(SEEDS)] for kind in kinds}
    copied = {
        kind: [
            {"seen": s, "new_place": p, "new_offset": 0.0}
            for s, p in zip(seeds(seen.get(kind, 0)), seeds(places.get(kind, 0)), strict=True)
        ]
        for kind in ("none", *report.ABSOLUTE, *report.RELATIVE)
    }
    return of(report.judge(loss, copied, SEEDS))


def test_p2_and_p5_losses_below_those_of_no_positions():
    names = ("sinusoidal", "sinusoidal concatenated", "learned")
    assert lengths()["P2"] == lengths()["P5"] == "fails"
    assert lengths(gains=[(n, 0.01) for n in names])["P2"] == "holds"
    assert lengths(gains=[(n, 0.01) for n in names[:2]])["P2"] == "holds when sinusoidal or sinusoidal concatenated"
    assert lengths(gains=[("learned", 0.0005)])["P2"] == "fails"  # less than the seeds differ
    assert lengths(gains=[("shaw keys", 0.01), ("shaw values", 0.01)])["P5"] == "holds"
    assert lengths(gains=[("shaw values", 0.01)])["P5"] == "holds when shaw values"


def test_p4_rises_on_each_side_of_the_margin():
    absolute, relative = ("sinusoidal", "learned"), ("shaw", "t5", "alibi", "rope")
    fail = [(kind, 0.06) for kind in absolute]
    assert lengths(rises=fail)["P4"] == "holds"
    assert lengths(rises=[*fail, *[(k, 0.06) for k in relative[:3]]])["P4"] == "holds when the relative kind is rope"
    assert lengths(rises=[*fail, *[(k, 0.06) for k in relative]])["P4"] == "fails"
    assert lengths(rises=fail[:1])["P4"] == "fails"  # the other absolute kind stays
    assert lengths(rises=[*fail[:1], ("learned", 0.0495)])["P4"] == "undecided"  # its interval has the margin in it
    assert lengths(rises=[*fail, *[(k, 0.0495) for k in relative]])["P4"] == "undecided"


@pytest.mark.parametrize(
    ("rope", "tuned", "verdict"),
    [
        (0.04, 0.0, "holds"),
        (0.06, 0.04, "fails without scaling; holds when: yarn, fine-tuned"),
        (0.0495, 0.04, "undecided without; holds when: yarn, fine-tuned"),
        (0.06, 0.06, "fails"),
        (0.0495, 0.06, "undecided"),
    ],
)
def test_p7(rope, tuned, verdict):
    assert lengths(rises=[("rope", rope), ("rope, yarn, fine-tuned", tuned)])["P7"] == verdict


def test_p8():
    able = [("learned", 0.95), ("shaw", 0.95), ("rope", 0.95)]
    assert lengths()["P8"] == "undecided: the task was learned by no kind only"
    assert lengths(seen=able[:1])["P8"] == "undecided: the task was learned by learned only"
    assert lengths(seen=[("learned", 0.95), ("rope", 0.89)])["P8"].startswith("undecided")
    assert lengths(seen=able)["P8"] == "fails"
    assert lengths(seen=able, places=[("rope", 0.1)])["P8"] == "holds when the relative kind is rope"
    both = lengths(seen=able, places=[("rope", 0.1), ("shaw", 0.1)])["P8"]
    assert both == "holds for the kinds that learn the task (learned, shaw, rope)"


# ---------------------------------------------------------------- quantization


def test_q2():
    report = load("qat.report")

    def judge(**gains):
        found = {
            name: [
                {"full": 3.0, "absmax": x, "mse": 4.0, "qat": x - gain + 0.001 * i} for i, x in enumerate(seeds(3.5))
            ]
            for name, gain in gains.items()
        }
        return of(report.judge(found, SEEDS))["Q2"]

    assert judge(a=0.1, b=0.1) == "holds"
    assert judge(a=0.1, b=0.0) == "holds when the scheme is a"
    assert judge(a=0.0, b=0.0) == "undecided" and judge(a=-0.1, b=0.0) == "undecided"
    assert judge(a=-0.1, b=-0.1) == "fails"


def quantized(ours=0.0, speed=2.0, size=1):
    report = load("quantization_quality.report")
    jitter = np.linspace(-1e-4, 1e-4, 5)
    losses = {"int4 gptq": ours, "int4 absmax": 1.0, "int4_affine gptq": 0.0, "ggml Q4_0": 0.0, "ggml Q4_1": 0.0}
    language = {
        name: {"loss": list(2 + x + jitter * (1 + i)), "full_loss": [2.0] * 5}
        for i, (name, x) in enumerate(losses.items())
    }
    measured = {"tokens_per_second": [speed, 1.1 * speed, 0.9 * speed], "bytes": size, "temporary_bytes": 0}
    plain = {"tokens_per_second": [1.0, 1.1, 0.9], "bytes": 4, "temporary_bytes": 0}
    return of(report.judge(language, {}, {"float32": plain, "int8": measured, "w8a8": measured, "int4": measured}))


def test_q1b_and_q3():
    assert quantized()["Q1b"] == "holds" and quantized(ours=0.01)["Q1b"] == "fails"
    assert quantized(ours=-0.01)["Q1b"] == "holds"
    assert quantized()["Q3"] == "holds"
    assert quantized(speed=1.0)["Q3"].startswith("holds when int8: smaller, less memory; w8a8")
    assert quantized(size=4)["Q3"].startswith("holds when int8: faster; ")
    assert quantized(speed=0.5, size=4)["Q3"] == "fails"


# ---------------------------------------------------------------- adapters


def sentiment(count=SEEDS, size="cpu", share=0.01, **points):
    report = load("sentiment.report")
    points = dict.fromkeys(report.JUDGED, 90.0) | points
    runs = {
        name: [
            {"test_accuracy": (x + 0.1 * i * (name == "full")) / 100, "trained_parameters": share, "parameters": 1}
            for i in range(count)
        ]
        for name, x in points.items()
    }
    prompted = {"accuracy": 0.7, "low": 0.65, "high": 0.75}
    asked = dict.fromkeys(("zero-shot", "few-shot"), prompted)
    return of(report.judge(asked, runs, {"a": (4, 2), "b": (2, 6)}, count, size))


def test_l1_l5_l8_l9_l10():
    equal = sentiment()
    assert {k: equal[k] for k in ("L1", "L5", "L8", "L9", "L10")} == {
        "L1": "holds", "L5": "undecided", "L8": "holds", "L9": "holds", "L10": "holds",
    }  # fmt: skip
    assert sentiment(full=92.0)["L1"] == "fails" and sentiment(full=90.9)["L1"] == "undecided"
    assert sentiment(share=0.021)["L1"] == "undecided" and sentiment(share=0.02)["L1"] == "holds"
    assert sentiment(**{"PiSSA r=8": 90.1})["L5"] == "holds" and sentiment(**{"PiSSA r=8": 89.9})["L5"] == "fails"
    for name, statement in (("LoRA r=8, factors in int8", "L8"), ("QLoRA r=8, NF4 base", "L9")):
        assert sentiment(**{name: 89.1})[statement] == "holds" and sentiment(**{name: 88.9})[statement] == "fails"
    for accuracy, verdict in ((75.1, "holds"), (75.0, "undecided"), (65.0, "undecided"), (64.9, "fails")):
        assert sentiment(**{"LoRA r=8": accuracy})["L10"] == verdict
    for few in (sentiment(count=2), sentiment(size="smoke")):
        assert few["L1"].startswith("untested here") and few["L12"].startswith("fails as written")


def test_l14():
    judge = load("sentiment_encoder.measure").judge

    def verdict(adapted, full, count=3):
        points = {"frozen": seeds(0.8), "LoRA r=8": seeds(adapted, 0.002), "full": seeds(full, 0.002)}
        return judge({k: [{"accuracy": a} for a in v] for k, v in points.items()}, count).verdict

    assert verdict(0.85, 0.85) == "holds" and verdict(0.85, 0.8) == "undecided" and verdict(0.85, 0.75) == "fails"
    assert verdict(0.85, 0.85, count=2).startswith("untested here")


def test_l11():
    judge = load("architectures.measure").judge

    def verdict(*shares, trained=0.25, same=1.0):
        return judge("x", [{"taken back": s, "trained share": trained, "base unchanged": same} for s in shares]).verdict

    assert verdict(0.5, 0.9) == "holds" and verdict(0.49, 0.9) == "undecided"
    assert verdict(0.5, trained=0.26) == verdict(0.5, same=0.0) == "undecided"
    assert verdict(0.0, 0.09) == "fails" and verdict(0.0, 0.1) == "undecided"


def test_l13():
    module = load("adapter_inference.measure")

    def verdict(ratio, counter=True):
        seen = {module.MERGED: [np.array([1, 1, 1.0])] * 3, module.QLORA: [np.array([1, x, x]) for x in ratio]}
        return of(module.judge(seen, counter))

    assert verdict((0.9, 0.8, 0.7)) == {"L13 speed": "holds", "L13 power": "holds"}
    assert verdict((1.1, 1.2, 1.3))["L13 power"] == "fails" and verdict((0.9, 1.1, 1))["L13 speed"] == "undecided"
    assert verdict((1.1, 1.1, 1.1), counter=False)["L13 power"].startswith("untested here")


def test_l4_l6_l7():
    judge = load("lora_memory.measure").judge

    @dataclasses.dataclass
    class Memory:
        peak: float = 1.0
        temporaries: float = 1.0

    def verdict(roundings=1.0, time=1.0, full=3.0, share=0.8):
        taken = {"forward": Memory(), "full": Memory(full), "lora": Memory(), "fa": Memory(1, share)}
        merged = {"float32": {"roundings": roundings, "merged time": time}}
        return of(judge({f"{name}, remat none": m for name, m in taken.items()}, merged))

    assert verdict() == {"L4": "holds", "L6": "holds", "L7": "holds"}
    assert verdict(roundings=8)["L4"] == "fails" and verdict(roundings=7.9)["L4"] == "holds"
    assert verdict(time=1.06)["L4"] == "holds for the outputs; its cost is undecided here"
    assert [verdict(full=x)["L6"] for x in (2.4, 2.5, 3.5, 3.6)] == ["fails", "holds", "holds", "fails"]
    assert [verdict(share=x)["L7"] for x in (0.81, 0.94, 0.95)] == ["undecided", "undecided", "fails"]


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
        benchmark = {"skipgram": {name: {"verdict": "lower"} for name in lower} | {"seconds": 1.0}}
        e3 = {str(i): {"cat mat": a, "cat sat": b} for i, (a, b) in enumerate(cosines)}
        return of(module.judge(table, benchmark, e3))

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
    module = load("decoding_quality.report")
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
    return of(module.judge(made, figures, steps, "command"))


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
        table = {k: {f: intervals.mean([r[f] for r in runs]) for f in module.FIGURES} for k, runs in found.items()}
        return of(module.judge(found, table, "command"))

    assert verdict(tail=0.0055)["D3"] == "holds" and verdict(tail=0.005)["D3"] == "fails"
    everything = verdict(recent=0.0055, growth=(1.0, 1.5))
    assert everything["D6"].startswith(
        "holds: the growth is exponential; a lighter tail with entmax 1.5; repetition is in"
    )
    assert verdict(recent=0.0055, growth=(1.0, 1.49))["D6"].startswith("fails: the growth is not exponential")
    assert verdict(recent=0.005, growth=(1, 2))["D6"].startswith("fails: the growth is exponential")
    assert "a lighter tail with none" in verdict(other=0.1)["D6"]


def test_m1_to_m4():
    module = load("prompt_sensitivity.report")
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
        return of(module.judge(cells, lengths, "command"))

    moved = verdict()
    assert moved["M1"] == "holds" and moved["M2"] == "holds" and moved["M3"] == "holds"
    assert moved["M4"] == "fails: it pays for main"
    still = verdict(template=0.0, gain=-0.3)
    assert still["M1"] == "fails" and still["M2"] == "fails" and still["M3"] == "holds for the length only"
    assert still["M4"] == "consistent; large models untested here"
    assert verdict(template=0.0, gain=-0.3, tokens=0.0, small=0.3)["M3"] == "fails"
    assert verdict(template=0.0, gain=-0.3, small=0.3)["M4"] == "fails: it pays for small"


# ---------------------------------------------------------------- width and reliability


def test_w1():
    report = load("width_transfer.report")

    def verdict(with_transfer, without):
        lost = {
            kind: {32: Interval(0, 0, 0), 128: Interval(x, x - 0.01, x + 0.01)}
            for kind, x in zip(report.KINDS, (with_transfer, without), strict=True)
        }
        return report.judge(lost, SEEDS).verdict

    assert verdict(0.03, 0.07) == "holds" and verdict(0.07, 0.07) == "fails" and verdict(0.03, 0.03) == "fails"
    assert verdict(0.05, 0.07) == "undecided" and verdict(0.03, 0.05) == "undecided"
    # The loss of the rate that is best at the base width, against the best by the other seeds.
    losses = {32: np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), 64: np.array([[1.5, 1.6, 1.7], [1.0, 1.0, 1.0]])}
    assert report.losses_given_up(losses, 32)[64].estimate == pytest.approx(0.6)


def test_reliability():
    verdict = load("reliability.reliability").verdict
    assert verdict({"lost": 0}) == "nothing lost" and verdict({"lost": 1}) == "LOST"
    assert verdict(None).startswith("not run here")
