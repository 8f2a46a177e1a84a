"""The decision rule of statement Q1: which schemes are evidence for quantized activations."""

import pytest

from experiments.quantization_quality import report


def judged(**costs):
    """Q1's verdicts where the schemes of `costs`, by absmax, lose so many nats per token."""
    costs |= {"int4": 0.0, "int4_affine": 0.0}
    language = {f"{s} absmax": {"loss": [1 + c, 1 + c, 1 + c + 1e-5], "full_loss": [1.0] * 3} for s, c in costs.items()}
    speed = {"float32": {"tokens_per_second": [1.0, 1.0], "bytes": 4, "temporary_bytes": 0}}
    results = report.judge(language, {name: {"cosine": 0.999} for name in language}, speed)
    assert [(r.statement, r.part) for r in results[:2]] == [("Q1", "weights and activations"), ("Q1", "weights alone")]
    conditions = [{estimate.condition for estimate in r.estimates} for r in results[:2]]
    return results[0].verdict, results[1].verdict, *conditions


@pytest.mark.parametrize(
    ("costs", "both", "alone"),
    [
        ({"int8": 0.0, "w8a8": 0.1, "w8a8_static": 0.1}, "fails", "holds when int8 absmax"),
        ({"int8": 0.1, "w8a8": 0.0, "w8a8_static": 0.1}, "holds when w8a8 absmax", "fails"),
        ({"int8": 0.1, "fp8_e4m3": 0.0, "w8a8": 0.0, "w8a8_static": 0.0}, "holds", "holds when fp8_e4m3 absmax"),
    ],
)
def test_schemes_of_weights_alone_are_no_evidence_for_activations(costs, both, alone):
    verdict, other, with_activations, without = judged(**costs)
    assert (verdict, other) == (both, alone)
    assert with_activations == {f"{name} absmax" for name in costs if name.startswith("w8a8")}
    assert with_activations | without == {f"{name} absmax" for name in costs}
