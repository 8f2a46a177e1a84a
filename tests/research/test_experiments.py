"""The form of an experiment: conditions are measured once, and the findings are published with their provenance."""

import ast
import dataclasses
import importlib

import pytest
from absl import flags

from llm_jax import files
from llm_jax.intervals import Interval
from llm_jax.research import experiments, findings
from tests.conftest import ROOT

README = "# A\n\n<!-- results: written by run.py -->\n<!-- end of results -->\n"


def test_every_condition_and_seed_is_measured_once(tmp_path):
    calls = []

    def compute(condition, seed):
        calls.append((condition, seed))
        return {"loss": seed + 0.5}

    root = experiments.directory(str(tmp_path / "runs"), "cpu", 3)
    assert root == tmp_path / "runs" / "cpu-3" and root.is_dir()
    figures = experiments.measure(root, ["a b", "int4:64"], 2, compute)
    assert figures == {"a b": [{"loss": 0.5}, {"loss": 1.5}], "int4:64": [{"loss": 0.5}, {"loss": 1.5}]}
    assert calls == [("a b", 0), ("int4:64", 0), ("a b", 1), ("int4:64", 1)]
    (root / "int4-64-1.json").unlink()
    assert experiments.measure(root, ["a b", "int4:64"], 2, compute) == figures
    assert calls[4:] == [("int4:64", 1)]


@pytest.fixture
def script(tmp_path):
    (tmp_path / "README.md").write_text(README)
    return str(tmp_path / "run.py")


def test_findings_are_published_with_the_command_that_measures_them_again(script, tmp_path):
    values = flags.FlagValues()
    flags.DEFINE_integer("seeds", 3, "", flag_values=values)
    values.mark_as_parsed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments.absl_flags, "FLAGS", values)
        results = [findings.finding("Q9", "loss", {"a": Interval(1.0, 0.5, 1.5)}, "holds")]
        text = experiments.publish(script, results, ["", "text"], flags=("seeds",), suffix=" --reference=RUN")
    (recorded,) = findings.read(tmp_path / "results.json")
    assert recorded.command == f"PYTHONPATH=. python experiments/{tmp_path.name}/run.py --seeds=3 --reference=RUN"
    assert recorded.machine and recorded.date and text == "Q9 (loss): holds"
    table = "\ntext\n\n| claim | verdict |\n|---|---|\n| Q9 (loss) | **holds** |\n\n<!-- end"
    assert table in (tmp_path / "README.md").read_text()


def test_results_that_are_only_rendered_again_keep_commit_machine_and_date(script, tmp_path):
    path = tmp_path / "results.json"

    def publish(value, verdict="holds"):
        results = [findings.finding("Q9", "loss", {"a": value, "b": [0.1, 2]}, verdict)]
        experiments.publish(script, results, [])
        return findings.read(path)[0]

    today = publish(0.1)
    before = dataclasses.replace(today, commit="0123456789", machine="another", date="2020-01-01")
    files.write_json(path, [findings.as_dict(before)])
    content = path.read_bytes()
    assert publish(0.1) == before and path.read_bytes() == content
    assert publish(0.1, "fails") == dataclasses.replace(before, verdict="fails")  # judged again, not measured again
    assert publish(0.2).date == today.date


def test_tables_and_texts_of_figures():
    assert findings.markdown_table(["a", "b"], [["x", 1], ["", "y"]]) == [
        "| a | b |",
        "|---|---|",
        "| x | 1 |",
        "| | y |",
    ]
    assert findings.interval_text(Interval(0.5, 0.25, 0.75), 2) == "0.50 (0.25 to 0.75)"
    assert findings.interval_text(Interval(0.5, float("nan"), float("nan")), 1) == "0.5"
    assert findings.deviation_text([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert findings.span([1.0, 4.0, 1.0]) == Interval(2.0, 1.0, 4.0)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("**/*.py")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_the_names_that_an_experiment_imports_exist(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_jax"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
