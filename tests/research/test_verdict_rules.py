"""Every rule that decides a verdict about models, with made-up figures on each side of its threshold."""

import dataclasses

import numpy as np
import pytest

from llm_jax.intervals import Interval
from tests.research.verdict_cases import SEEDS, load, of, seeds

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
    assert lengths(seen=able, places=[("rope", 0.01)])["P8"] == "holds when the relative kind is rope"
    both = lengths(seen=able, places=[("rope", 0.01), ("shaw", 0.01)])["P8"]
    assert both == "holds for the kinds that learn the task (learned, shaw, rope)"


# ---------------------------------------------------------------- quantization


def test_q2():
    report = load("qat.sweep")

    def judge(**gains):
        found = {
            name: [
                {"full": 3.0, "absmax": x, "mse": 4.0, "qat": x - gain + 0.001 * i} for i, x in enumerate(seeds(3.5))
            ]
            for name, gain in gains.items()
        }
        return report.judge(found, SEEDS).verdict

    assert judge(a=0.01, b=0.01) == "holds"
    assert judge(a=0.01, b=0.0) == "holds when the scheme is a"
    assert judge(a=0.0, b=0.0) == "undecided" and judge(a=-0.01, b=0.0) == "undecided"
    assert judge(a=-0.01, b=-0.01) == "fails"


def quantized(ours=0.0, speed=1.02, size=1):
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


def test_q1():
    report = load("quantization_quality.report")
    names = ("w8a8 absmax", "w8a8 mse", "w8a8_static absmax", "int8 absmax", "int4 absmax", "int4_affine absmax")

    def verdicts(**changes):
        """`changes`: {method: (loss difference, cosine)}; the limit of the intervals is 0.0001 above the difference."""
        figures = dict.fromkeys(names, (0.0, 1.0)) | {name.replace("__", " "): x for name, x in changes.items()}
        jitter = 1e-4 / 2.776 * np.sqrt(5) * np.array([-1, -1, 0, 1, 1])
        language = {name: {"loss": list(2 + x + jitter), "full_loss": [2.0] * 5} for name, (x, _) in figures.items()}
        sentences = {name: {"cosine": cosine} for name, (_, cosine) in figures.items()}
        speed = {"float32": {"tokens_per_second": [1.0, 1.1], "bytes": 4, "temporary_bytes": 0}}
        speed |= dict.fromkeys(("int8", "w8a8", "int4"), speed["float32"])
        results = of(report.judge(language, sentences, speed))
        return results["Q1 weights and activations"], results["Q1 weights alone"]

    assert verdicts() == ("holds", "holds when int8 absmax")
    assert verdicts(w8a8__mse=(0.1, 0.9), w8a8__absmax=(0.0098, 0.99))[0] == "holds"
    others = "holds when w8a8 mse, w8a8_static absmax"
    assert verdicts(w8a8__absmax=(0.0099, 1.0))[0] == verdicts(w8a8__absmax=(0.0, 0.989))[0] == others
    assert verdicts(int8__absmax=(0.0099, 1.0))[1] == "fails"


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
            | {"factors": {"a": (4, 2), "b": (2, 6)}}
            for i in range(count)
        ]
        for name, x in points.items()
    }
    prompted = {"accuracy": 0.7, "low": 0.65, "high": 0.75}
    asked = dict.fromkeys(("zero-shot", "few-shot"), prompted)
    return of(report.judge(asked, runs, count, size))


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


# ---------------------------------------------------------------- width and reliability


def test_w1():
    report = load("width_transfer.sweep")

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
    assert verdict({"lost": 0}) == "holds" and verdict({"lost": 1}) == "fails"
    assert verdict(None).startswith("untested here")


# ---------------------------------------------------------------- scale


@pytest.mark.parametrize(
    ("growth", "live", "arguments", "verdicts"),
    [
        (1.24, 0.9, 1.04, ("holds", "holds")),
        (1.26, 0.9, 1.06, ("undecided", "undecided")),
        (2.01, 1.0, 1.0, ("fails", "fails")),
    ],
)
def test_s1_compile_time_and_s2_memory_on_each_side_of_their_thresholds(growth, live, arguments, verdicts):
    rows = {
        "small": [("layers", 2, {"compilation": 3.0}), ("layers", 32, {"compilation": 3.0 * growth})],
        "large": [
            ("devices", 16, {"arguments": 160.0, "live": 10.0}),
            ("devices", 64, {"arguments": 40.0 * arguments, "live": 10.0 * live}),
        ],
    }
    results = of(load("scaling.sweep").judge(rows))
    assert (results["S1"], results["S2"]) == verdicts
