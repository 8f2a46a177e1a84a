"""The form of an experiment: conditions are measured once, and the findings are published with their provenance."""

import ast
import dataclasses
import importlib
import re
import shlex

import pytest
from absl import flags

from llm_jax import files, intervals
from llm_jax.errors import UserError
from llm_jax.intervals import Interval
from llm_jax.research import experiments, findings, jobs, provenance
from tests.conftest import ROOT

README = "# A\n\n<!-- results: written by run.py -->\n<!-- end of results -->\n"


def test_every_condition_and_seed_is_measured_once(tmp_path):
    calls = []

    def compute(condition, seed):
        calls.append((condition, seed))
        return {"loss": seed + 0.5}

    root = experiments.directory(str(tmp_path / "runs"), "cpu", 3)
    assert root == tmp_path / "runs" / "cpu-3" and root.is_dir()
    figures, origins = experiments.measure(root, ["a b", "int4:64"], 2, compute)
    assert len(origins) == 4 and all(origin.machine and origin.date for origin in origins)
    assert figures == {"a b": [{"loss": 0.5}, {"loss": 1.5}], "int4:64": [{"loss": 0.5}, {"loss": 1.5}]}
    assert calls == [("a b", 0), ("int4:64", 0), ("a b", 1), ("int4:64", 1)]
    (root / "int4-64-1.json").unlink()
    assert experiments.measure(root, ["a b", "int4:64"], 2, compute)[0] == figures
    assert calls[4:] == [("int4:64", 1)]

    with pytest.raises(KeyboardInterrupt):  # Ctrl-C at the second point
        experiments.measure(root, ["c", "d"], 2, lambda c, seed: interrupt() if c == "d" else compute(c, seed))
    assert calls[5:] == [("c", 0)]
    experiments.measure(root, ["c", "d"], 2, compute)
    assert calls[6:] == [("d", 0), ("c", 1), ("d", 1)]


def interrupt():
    raise KeyboardInterrupt


def test_quick_sets_the_flags_of_the_experiment_and_publishes_below_its_runs(script, script_flags, tmp_path):
    values = {}

    def main():
        values.update(seeds=script_flags.seeds, widths=script_flags.widths, large=script_flags.large)
        result = findings.finding("Q9", "loss", 0.5, "holds")
        experiments.publish(script, [result], ["", "quick"])
        (experiments.output(script) / "x.png").write_bytes(b"")

    run = experiments.script(main, quick={"seeds": 2, "widths": ["8"]})
    script_flags(["run.py", "--quick", "--widths=16", f"--runs={tmp_path / 'runs'}"])
    run()
    assert values == {"seeds": 2, "widths": ["16"], "large": True}
    published = tmp_path / "runs" / "quick" / "published"
    assert sorted(path.name for path in published.iterdir()) == ["README.md", "results.json", "x.png"]
    assert "quick" in (published / "README.md").read_text() and (tmp_path / "README.md").read_text() == README
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "runs"]
    script_flags.quick = False
    assert experiments.output(script) == tmp_path


def test_results_say_where_their_models_were_trained(tmp_path, monkeypatch):
    job = jobs.Job(
        "a", ("-c", f"open({str(tmp_path / 'a' / 'done')!r}, 'w')"), tmp_path / "a", (tmp_path / "a" / "done").exists
    )
    old = dataclasses.replace(job, directory=tmp_path / "old", is_done=lambda: True)
    new = dataclasses.replace(OLD, commit="abcdef0123", date="2021-01-01")
    monkeypatch.setattr(provenance, "here", lambda command: OLD)
    failing = dataclasses.replace(job, command=("-c", "raise SystemExit('no')"))
    with pytest.raises(UserError, match="a is failed: no"):
        experiments.train([failing], 1)
    monkeypatch.setattr(provenance, "here", lambda command: new)
    assert experiments.train([job, old], 1) == [OLD, new, provenance.Provenance()]  # it went on at another commit
    monkeypatch.setattr(provenance, "here", lambda command: pytest.fail("trained again"))
    assert experiments.train([job, old], 1) == [OLD, new, provenance.Provenance()]


@pytest.fixture
def script(tmp_path):
    (tmp_path / "README.md").write_text(README)
    return str(tmp_path / "run.py")


@pytest.fixture
def script_flags(monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_integer("seeds", 3, "", flag_values=values)
    flags.DEFINE_boolean("large", True, "", flag_values=values)
    flags.DEFINE_list("widths", ["32", "64"], "", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "", flag_values=values)
    flags.DEFINE_string("runs", "runs", "", flag_values=values)
    values.mark_as_parsed()
    monkeypatch.setattr(experiments.absl_flags, "FLAGS", values)
    return values


def test_the_command_has_every_flag_that_differs_from_its_default(script_flags):
    start = "PYTHONPATH=. python experiments/a/run.py"
    assert experiments.command("x/experiments/a/run.py") == start
    script_flags(["run.py", "--seeds=5", "--widths=8, 16", "--nolarge", "--checkpoint=runs/a b", "--runs=/tmp/runs"])
    command = experiments.command("a/run.py", {"checkpoint": "RUN"})
    assert command.startswith(start) and set(shlex.split(command)[3:]) == {
        "--seeds=5",
        "--widths=8,16",
        "--nolarge",
        "--checkpoint=RUN",
    }
    assert "'--checkpoint=runs/a b'" in experiments.command("a/run.py")


def test_findings_are_published_with_the_command_that_measures_them_again(script, script_flags, tmp_path):
    script_flags.seeds = 5
    results = [findings.finding("Q9", "loss", {"a": Interval(1.0, 0.5, 1.5)}, "holds")]
    text = experiments.publish(script, results, ["", "text"])
    (recorded,) = findings.read(tmp_path / "results.json")
    assert recorded.command == f"PYTHONPATH=. python experiments/{tmp_path.name}/run.py --seeds=5"
    assert recorded.machine and recorded.date and text == "Q9 (loss): holds"
    table = "\ntext\n\n| claim | verdict |\n|---|---|\n| Q9 (loss) | **holds** |\n\n<!-- end"
    assert table in (tmp_path / "README.md").read_text()


OLD = provenance.Provenance("", "0123456789", "another", "2020-01-01")


def test_results_have_the_provenance_of_the_figures_that_they_follow_from(script, tmp_path, monkeypatch):
    def publish(seeds, verdict="holds"):
        figures, origins = experiments.measure(tmp_path / "runs", ["a"], seeds, lambda condition, seed: 0.5)
        results = [findings.finding("Q9", "loss", {"a": min(figures["a"])}, verdict, n=seeds)]
        experiments.publish(script, results, [], origins=origins)
        (result,) = findings.read(tmp_path / "results.json")
        return result.commit, result.machine, result.date

    monkeypatch.setattr(provenance, "here", lambda command: dataclasses.replace(OLD, command=command))
    earlier = publish(1)
    assert earlier == ("0123456789", "another", "2020-01-01")
    new = dataclasses.replace(OLD, commit="abcdef0123", date="2021-01-01")
    monkeypatch.setattr(provenance, "here", lambda command: dataclasses.replace(new, command=command))
    assert publish(1, "fails") == earlier  # rendered and judged again, not measured again
    assert publish(2) == ("0123456789; abcdef0123", "another", "2020-01-01..2021-01-01")
    (tmp_path / "runs" / "a-0.json").unlink()
    (tmp_path / "runs" / "a-1.json").unlink()
    assert publish(1) == ("abcdef0123", "another", "2021-01-01")  # the estimates are equal, the measurement is new
    files.write_json(tmp_path / "runs" / "a-1.json", 0.5)  # a file without an origin
    assert publish(2) == ("unknown; abcdef0123", "unknown; another", "unknown..2021-01-01")


def test_results_of_figures_without_origin_keep_their_provenance(script, tmp_path):
    path = tmp_path / "results.json"
    before = findings.finding("Q9", "loss", {"a": 0.5, "b": [0.1, 2]}, "holds", command=experiments.command(script))
    before = dataclasses.replace(before, commit="0123456789", machine="another", date="2020-01-01")
    files.write_json(path, [findings.as_dict(before)])
    content = path.read_bytes()
    files.write_json(tmp_path / "a-0.json", 0.5)

    def publish(difference=0.0):
        figures, origins = experiments.measure(tmp_path, ["a"], 1, lambda condition, seed: pytest.fail("measured"))
        result = findings.finding("Q9", "loss", {"a": figures["a"][0] + difference, "b": [0.1, 2]}, "holds")
        experiments.publish(script, [result], [], origins=origins)

    publish()
    assert path.read_bytes() == content
    publish(0.25)
    (result,) = findings.read(path)
    assert (result.commit, result.machine, result.date) == ("", "", "")


def test_conditions_with_one_file_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="'a b-0' and 'a_b-0' have the same file name, a_b-0"):
        experiments.measure(tmp_path, ["a b", "a_b"], 1, lambda condition, seed: pytest.fail("measured"))


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
    figures = {"a": [{"x": 1.0}, {"x": 2.0}], "b": [{"x": 3.0}, {"x": 5.0}]}
    assert {name: mean.estimate for name, mean in findings.means(figures, "x").items()} == {"a": 1.5, "b": 4.0}
    assert findings.differences(figures, "x", "a", scale=10) == {"b": intervals.paired([30, 50], [10, 20])}


# Flags that name figure files, or the settings within them, in another way than by the directory.
IN_FILES = {
    "decoding_quality": {"checkpoint", "text"},  # a digest in the directory
    "prompt_sensitivity": {"model", "reference", "paraphrases"},  # the header and the name of each file
    "quantization_quality": {"checkpoint", "llama_python", "smollm2"},  # a digest; which files are measured
    "tokenization": {"sizes"},  # the names of conditions
    "width_transfer": {"widths", "powers"},  # the names of conditions; the base width is in the directory
}


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "experiments").glob("*/*.py")) if "experiments.directory(" in p.read_text()],
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_every_flag_that_changes_figures_is_a_part_of_their_directory(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    by_name = {}
    for node in calls:
        by_name.setdefault(ast.unparse(node.func), []).append(node)
    flags = {ast.literal_eval(n.args[0]) for name, ns in by_name.items() if "flags.DEFINE_" in name for n in ns}
    (directory,) = by_name["experiments.directory"]
    named = set(re.findall(r"\bf\.(\w+)", ast.unparse(directory)))
    assert flags - named <= {"seeds", *experiments.FLAGS_WITHOUT_EFFECT_ON_RESULTS, *IN_FILES.get(path.parent.name, ())}
    assert path.parent.name != "width_transfer" or "widths[0]" in ast.unparse(directory)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("**/*.py")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_the_names_that_an_experiment_imports_exist(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_jax"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
