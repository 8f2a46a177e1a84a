"""The runner of the benchmarks on toy sides, its tables, and that every side of every suite can be called."""

import inspect
import itertools
import shutil
import sys

import pytest

from experiments.benchmarks import rendering, runner, suites, word2vec, worker
from experiments.benchmarks.runner import Measure, Side
from llm_jax.errors import UserError
from tests.research.verdict_cases import load

command, gpu = load("benchmarks.__main__"), load("benchmarks.gpu")
TOY = "tests.benchmark_sides:"


@pytest.fixture(scope="module")
def toy():
    """The record of a measure with a bound, two sides that work, and three that do not; other work took a half."""
    sides = (
        Side("bounds", TOY + "bound"),
        Side("fast", TOY + "constant", {"rate": 3.0}, rivals=("slow", "absent")),
        Side("slow", TOY + "constant"),
        Side("absent", TOY + "missing", peer=True),
        Side("other", TOY + "constant", {"loss": 2.1}),
        Side("broken", TOY + "constant", {"fails_at": 1}),
    )
    measure = Measure("toy", "A toy", "Nothing is measured.", sides, rounds=2, same_loss=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.OtherWork, "share", lambda self: 0.5)
        return runner.run(measure, sys.executable, say=lambda line: None)


def test_sides_take_turns_and_a_steady_drift_cancels():
    order, clock = [], itertools.count(1)

    def side(name, work):
        def turn(number):
            order.append(name)
            return {"seconds": work * next(clock)}  # every turn is slower than the one before

        return turn

    values, failed = runner.alternate({"a": side("a", 2.0), "b": side("b", 1.0)}, 2)
    assert order == ["a", "b", "b", "a"] and not failed
    (ratio,) = runner.ratios(values, {"a": ("b",)})
    assert ratio["values"] == [2 * 1 / 2, 2 * 4 / 3] and ratio["low"] < 2 < ratio["high"]
    assert sum(values["a"]["seconds"]) == 2 * sum(values["b"]["seconds"])


def test_record_has_ratios_shares_of_bounds_and_what_compiling_took(toy):
    assert toy["sides"]["fast"]["items/s"]["values"] == [3.0, 4.0] and "bounds" not in toy["sides"]
    ratio = next(r for r in toy["ratios"] if r["figure"] == "items/s")
    assert (ratio["side"], ratio["rival"], ratio["values"]) == ("fast", "slow", [3.0, 2.0])
    assert (ratio["low"], ratio["median"], ratio["high"]) == (2.0, 2.5, 3.0)
    share = next(s for s in toy["of bounds"] if s["side"] == "fast")
    assert share["values"] == [3 * 2 / 8, 4 * 2 / 8]
    assert [toy["details"]["fast"][name] for name in runner.FIRST.values()] == [4.0, 8.0]
    assert toy["sides"]["fast"]["peak MiB"]["median"] > 1


def test_sides_that_cannot_be_measured_are_named_with_the_reason(toy):
    assert set(toy["sides"]) == {"fast", "slow"}
    assert toy["missing"]["absent"] == "package_that_does_not_exist is not installed"
    assert toy["missing"]["other"] == "its first loss is 2.10000, that of fast 2.00000; they must agree"
    assert toy["missing"]["broken"] == "ValueError: turn 1"
    text = rendering.markdown(toy)
    assert "Not measured: absent (package_that_does_not_exist is not installed)." in text


def test_a_busy_machine_is_not_called_quiet(toy):
    assert toy["quiet"] is False and toy["other work"] == [0.5, 0.5] and len(toy["load"]) == 2
    assert "**a busy machine**, other work took 50% to 50% of the cores" in rendering.markdown(toy)
    assert "(busy)" in rendering.highlights({"toy": toy})
    quiet = toy | {"quiet": True, "other work": [0.01, 0.02]}
    assert "a quiet machine, other work took 1% to 2%" in rendering.markdown(quiet)
    assert "busy" not in rendering.highlights({"toy": quiet})
    assert runner.is_quiet([0.0, runner.QUIET]) and not runner.is_quiet([0.0, 1.01 * runner.QUIET])
    assert not runner.is_quiet([0.0, None]) and not runner.is_quiet([])


def test_other_work_leaves_out_the_time_of_the_benchmark_itself(monkeypatch):
    # Clock, busy seconds of both cores, own seconds: 10 s pass, 15 of the 20 core seconds are busy, 12 of them our own.
    readings = iter([(0.0, 100.0, 50.0), (10.0, 115.0, 62.0), (20.0, 116.0, 64.0), None])
    monkeypatch.setattr(runner.OtherWork, "_read", lambda self: next(readings))
    others = runner.OtherWork([0, 1])
    assert others.share() == pytest.approx(3 / 20)
    assert others.share() == 0.0
    assert others.share() is None


def test_table_of_a_measure(toy):
    text = rendering.markdown(toy)
    assert "|  | items/s | peak MiB | first step, extra s | first step, extra CPU s |" in text
    assert "| fast | slow | items/s | 2.50 (2.00 to 3.00) |" in text
    assert "| fast | items/s | read GB/s | 0.88 (0.75 to 1.00) |" in text
    assert "| slow | 1.5 |" in text


def test_chart_is_drawn(toy, tmp_path):
    rendering.chart({"toy": toy}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_pages_show_the_latest_results(tmp_path):
    pages = [shutil.copy(page, tmp_path) for page in (command.HERE / "README.md", command.SPEED)]
    command.render(*map(tmp_path.joinpath, ("README.md", "speed.md")), tmp_path / "chart.png")
    for page, original in zip(pages, (command.HERE / "README.md", command.SPEED), strict=True):
        text = (tmp_path / page).read_text()
        assert text == original.read_text(), "python -m experiments.benchmarks --render renders the results"


@pytest.mark.parametrize("name", ["quick", "cpu", "parts", "gpu"])
def test_options_of_every_side_fit_its_function(name):
    measures = gpu.measures() if name == "gpu" else suites.suite(name)
    assert len({measure.name for measure in measures}) == len(measures)
    for measure in measures:
        names = [side.name for side in measure.sides]
        assert len(set(names)) == len(names)
        for side in measure.sides:
            inspect.signature(worker.resolve(side.prepare)).bind(**side.options)
            assert set(side.rivals) <= set(names) - {side.name}, f"{measure.name}: {side.name}"


def test_what_a_machine_without_a_gpu_lacks_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match="JAX for CUDA: nvidia-smi is not found: this machine has no NVIDIA GPU"
    ) as error:
        gpu.main()
    assert "\n" not in str(error.value)


def test_unknown_measures_are_refused():
    with pytest.raises(UserError, match="--only=decoding; expected some of .*decode"):
        command.select(suites.suite("quick"), ["decoding"])
    assert [m.name for m in command.select(suites.suite("quick"), ["decode"])] == ["decode"]


def test_quality_below_that_of_gensim_is_named():
    def record(simlex):
        figures = {name: [0.1, 0.11, 0.12] for name in word2vec.QUALITY}
        values = {"llm_jax": figures | {"simlex": simlex}, "gensim": figures}
        return {"sides": {side: runner.summarize(v) for side, v in values.items()}}

    assert word2vec.lower(record([0.05, 0.06, 0.07])) == ["simlex"]
    assert word2vec.lower(record([0.09, 0.10, 0.11])) == []
