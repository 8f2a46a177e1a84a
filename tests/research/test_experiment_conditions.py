"""`research.experiments`: the default of --runs, trainings of conditions, alternating computations, and tables."""

import functools

from absl import flags

from llm_jax import configuration
from llm_jax.research import experiments, findings


def test_the_default_of_runs_is_the_name_of_the_experiment(monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(experiments.absl_flags, "FLAGS", values)
    experiments.script(test_the_default_of_runs_is_the_name_of_the_experiment, {})
    assert values["runs"].default == "runs/research" and values["quick"].default is False


def test_trainings_of_conditions_start_from_those_of_the_same_seed(tmp_path):
    def configs(conditions, **options):
        trainings = experiments.trainings(tmp_path, "default", conditions, 2, **options)
        return [(job.directory.name, configuration.load(job.directory / "recipe.json")) for job in trainings]

    first = configs({"a b": {"model.position.kind": "alibi"}, "c": {"train.steps": 7}})
    assert [name for name, _ in first] == ["a_b-0", "c-0", "a_b-1", "c-1"]
    kinds = [(c.train.seed, c.model.position.kind, c.train.steps == 7, c.init_from) for _, c in first]
    assert kinds == [(0, "alibi", False, ""), (0, "rope", True, ""), (1, "alibi", False, ""), (1, "rope", True, "")]
    (_, second), (_, third) = configs({"d": {}}, start="a b", first_seed=1000)
    assert [second.train.seed, third.train.seed] == [1000, 1001]
    assert [second.init_from, third.init_from] == [str(experiments.run_directory(tmp_path, "a b", i)) for i in (0, 1)]


def test_computations_take_turns_after_a_round_that_compiles():
    calls = []

    def compute(name):
        calls.append(name)
        return len(calls)

    computations = {name: functools.partial(compute, name) for name in "ab"}
    assert experiments.in_turns(computations, 2) == {"a": [3, 5], "b": [4, 6]}
    assert calls == ["a", "b"] * 3


def test_a_table_has_a_row_for_each_condition():
    runs = {"a": [{"x": 1.0, "n": 1000}, {"x": 3.0, "n": 7}], "b": [{"x": 2.0, "n": 5}, {"x": 2.5, "n": 7}]}
    columns = {"x": findings.deviation("x", 2), "interval": findings.interval("x", 1, 10), "seeds": len}
    columns |= {"n": findings.first("n", ","), "10 n": findings.first("n", ".1f", 10)}
    assert findings.condition_table("kind", runs, columns) == [
        "| kind | x | interval | seeds | n | 10 n |",
        "|---|---|---|---|---|---|",
        "| a | 2.00 ± 1.41 | 20.0 (-107.1 to 147.1) | 2 | 1,000 | 10000.0 |",
        "| b | 2.25 ± 0.35 | 22.5 (-9.3 to 54.3) | 2 | 5 | 50.0 |",
    ]
