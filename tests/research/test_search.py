"""The text of a search space, and searches by Optuna with a stub for the trainer."""

import concurrent.futures
import json
import time

import pytest

from llm_jax import configuration, files
from llm_jax.errors import UserError
from llm_jax.research import jobs, points, search
from llm_jax.research.provenance import Provenance
from tests.conftest import ROOT, call

SPACE = "optim.lr=loguniform(1e-5, 1e-1); model.width=32,64; model.num_layers=1..3"
# A run whose bits per byte have their least value at a learning rate of 1e-3.
TRAINER = """
import json, math, pathlib, sys
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
rate = json.loads((workdir / "recipe.json").read_text())["optim"]["lr"]
bits = 2 + abs(math.log10(rate) + 3)
(workdir / "metrics.jsonl").write_text(json.dumps({"step": 8, "validation_bits_per_byte": bits}) + "\\n")
(workdir / "summary.json").write_text(json.dumps({"steps": 8, "validation_bits_per_byte": bits}))
"""


class Trial:
    """Takes the low end of every range and the last choice."""

    def suggest_float(self, key, low, high, **options):
        return low

    def suggest_int(self, key, low, high, **options):
        return low

    def suggest_categorical(self, key, choices):
        return choices[-1]


def test_a_space_is_read():
    space = search.parse(SPACE + "; report.to=(),('tensorboard',)")
    assert {key: suggest(Trial()) for key, suggest in space.items()} == {
        "optim.lr": 1e-5,
        "model.width": 64,
        "model.num_layers": 1,
        "report.to": ("tensorboard",),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr=loguniform(1, 0.1)", "FROM below TO"),
        ("optim.lr=loguniform(0, 0.1)", "FROM below TO"),
        ("optim.lr=uniform(1)", "FROM below TO"),
        ("optim.rate=1", "unknown config key"),
        ("optim.lr", "is not an assignment"),
        ("optim.lr=1; optim.lr=2", "given twice"),
        ("model.width=8,a", "--search: model.width=a"),
    ],
)
def test_a_space_that_cannot_be_read_is_one_line(text, message):
    with pytest.raises(UserError, match=message):
        search.parse(text)


def test_flags_of_a_search_are_checked(tmp_path):
    for flags, message in (
        (["--search=optim.lr=1,2", "--grid=train.seed=0"], "cannot be combined"),
        (["--grid=train.seed=0", "--trials=3"], "--trials=3 has no effect"),
        (["--search=optim.lr=1,2", "--trials=0"], "--trials of at least 1"),
    ):
        done = call("sweep", f"--output={tmp_path / 'x'}", *flags)
        assert done.returncode == 2 and message in done.stderr


def test_a_job_can_be_ended_early_and_further_ones_added(tmp_path):
    def job(name, code):
        result = tmp_path / name / "result"
        return jobs.Job(name, ("-c", code.format(str(result))), tmp_path / name, result.exists)

    rest = [job("b", "open({!r}, 'w')"), job("c", "open({!r}, 'w')")]
    first = job("a", "import time; time.sleep(60)")
    statuses = jobs.run(
        [first],
        jobs.machine_shares(1),
        more=lambda s: rest.pop() if rest else None,
        should_end=lambda job: job is first,
    )
    assert [(s.job.name, s.state) for s in statuses] == [("a", "ended early"), ("c", "done"), ("b", "done")]
    assert not (tmp_path / "a" / "failed.json").exists()


@pytest.fixture
def base(monkeypatch):
    """The configuration of searches whose trials run the stub."""
    real = points.job

    def job_with_stub(point):
        job = real(point)
        return jobs.Job(job.name, ("-c", TRAINER, *job.command[2:]), job.directory, job.is_done)

    monkeypatch.setattr(points, "job", job_with_stub)
    return configuration.load(ROOT / "tests" / "tiny.py")


def states(study):
    return [trial.state.name for trial in study.trials]


@pytest.mark.live
def test_an_invalid_trial_fails_and_the_search_goes_on(tmp_path, base):
    space = "data.validation_fraction=uniform(1.5, 2)"  # more than all examples
    study, statuses = search.run(base, space, tmp_path, 2, jobs.machine_shares(1), Provenance("command"))
    assert states(study) == ["FAIL", "FAIL"] and statuses == []
    assert all("validation_fraction" in trial.user_attrs["error"] for trial in study.trials)


@pytest.mark.live
def test_trials_of_another_process_are_left_alone_until_they_are_free(tmp_path, base):
    import optuna

    space, options = "optim.lr=1e-4,1e-2", {"shares": jobs.machine_shares(1), "provenance": Provenance("command")}
    study, _ = search.run(base, space, tmp_path, 1, **options)
    other = optuna.load_study(study_name="search", storage=study._storage)
    running, created = other.ask(), other.ask()  # of the second, no option has been chosen yet
    search.parse(space)["optim.lr"](running)
    (tmp_path / "trial-0001").mkdir()
    with files.lock(tmp_path / "trial-0001", ".job.lock"):
        study, statuses = search.run(base, space, tmp_path, 4, **options)
    assert states(study) == ["COMPLETE", "RUNNING", "RUNNING", "COMPLETE"] and len(statuses) == 1
    study, statuses = search.run(base, space, tmp_path, 4, **options)
    assert states(study) == ["COMPLETE", "COMPLETE", "RUNNING", "COMPLETE"]
    assert [status.job.name for status in statuses] == ["trial-0001"]

    def end(points, statuses):  # another process records the end of every trial while it runs here
        for status in statuses:
            if status.state == jobs.RUNNING:
                other.tell(int(status.job.name[-4:]), 7.0, skip_if_finished=True)

    study, _ = search.run(base, space, tmp_path, 5, show=end, **options)
    assert study.trials[created.number].state.name == "RUNNING" and study.trials[4].value == 7.0


@pytest.mark.live
def test_another_experiment_in_the_same_directory_is_refused(tmp_path, base):
    def run(space="optim.lr=loguniform(1e-4, 1e-2)", **overrides):
        changed = configuration.load(base, {key.replace("__", "."): value for key, value in overrides.items()})
        return search.run(changed, space, tmp_path, 1, jobs.machine_shares(1), Provenance("command"))

    run()
    with pytest.raises(
        UserError, match=r"started with --config.data.source=.*, now other.txt; choose another --output"
    ):
        run(data__source="other.txt")
    with pytest.raises(UserError, match=r"started with --search: optim.lr=loguniform\(1e-4,1e-2\), now 1e-3; choose"):
        run("optim.lr=1e-3")
    with pytest.raises(UserError, match=r"--search: model.width=None, now 32,64"):
        run("optim.lr=loguniform(1e-4, 1e-2); model.width=32,64")
    # Another way to write the same space, and options that change no result or are searched, continue the study.
    study, _ = run(" optim.lr = loguniform(1e-4,1e-2) ", checkpoint__every=3, optim__lr=5e-4)
    assert states(study) == ["COMPLETE"]


@pytest.mark.live
def test_a_search_finds_the_best_rate_and_continues(tmp_path, base):
    stops = iter([False] * 8)
    options = {"shares": jobs.machine_shares(2), "provenance": Provenance("command")}
    study, _ = search.run(base, SPACE, tmp_path, 25, stop=lambda: next(stops, True), **options)
    stopped_at = len(study.trials)
    assert stopped_at < 25
    study, _ = search.run(base, SPACE, tmp_path, 25, **options)
    ended = states(study)
    assert len(ended) == 25 and set(ended) <= {"COMPLETE", "PRUNED"}
    # The suggestions after the stop are not those before it again.
    rates = [trial.params["optim.lr"] for trial in study.trials]
    assert len(set(rates)) == 25
    assert study.best_value < 2.3 and 5e-4 < study.best_params["optim.lr"] < 2e-3
    assert f"best of {ended.count('COMPLETE')} trials" in search.describe(study, tmp_path)
    best = points.read(tmp_path)["points"][f"trial-{study.best_trial.number:04d}"]
    assert best["optim.lr"] == pytest.approx(study.best_params["optim.lr"], rel=1e-3)
    config = configuration.load(tmp_path / f"trial-{study.best_trial.number:04d}" / "recipe.json")
    assert config.model.width == best["model.width"] and json.loads((tmp_path / "sweep.json").read_text())["command"]


# A run that is evaluated at steps 4 and 8; one with a large learning rate has bad figures and does not end by itself.
EVALUATED = """
import json, pathlib, sys, time
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
bad = json.loads((workdir / "recipe.json").read_text())["optim"]["lr"] == 1
lines = [{"step": 4, "validation_bits_per_byte": 9 if bad else 3}, {"step": 8, "validation_bits_per_byte": 2}]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines[: 1 if bad else 2]))
time.sleep(60 if bad else 1.5)  # the search reads the figures of running trials once a second
(workdir / "summary.json").write_text(json.dumps({"steps": 8, **lines[1]}))
"""


@pytest.mark.live
def test_a_bad_trial_is_pruned_and_a_complete_study_is_left_alone(tmp_path, base, monkeypatch):
    monkeypatch.setitem(globals(), "TRAINER", EVALUATED)
    options = {"shares": jobs.machine_shares(1), "provenance": Provenance("command")}

    def run(trials, rate):
        monkeypatch.setattr(search, "parse", lambda text: {"optim.lr": lambda trial: rate})
        return search.run(base, "optim.lr=0.5,1", tmp_path, trials, **options)

    run(5, 0.5)  # Optuna's MedianPruner prunes none of the first five
    study, statuses = run(6, 1)
    assert states(study) == ["COMPLETE"] * 5 + ["PRUNED"] and [status.state for status in statuses] == [jobs.ENDED]
    # The last evaluation may be over other rows, so it is not compared with the periodic ones.
    assert [trial.intermediate_values for trial in study.trials] == [{4: 3}] * 5 + [{4: 9}]
    runs_before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    study, statuses = run(6, 1)
    assert statuses == [] and len(study.trials) == 6
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == runs_before


@pytest.mark.live
def test_two_processes_do_not_exceed_the_number_of_trials(tmp_path, base, monkeypatch):
    import optuna

    ask = optuna.Study.ask
    monkeypatch.setattr(optuna.Study, "ask", lambda study: time.sleep(0.3) or ask(study))  # both count before one asks
    options = {"shares": jobs.machine_shares(1), "provenance": Provenance("command")}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        calls = [pool.submit(search.run, base, "optim.lr=1e-4,1e-2", tmp_path, 3, **options) for _ in range(2)]
        studies = [call.result()[0] for call in calls]
    assert states(studies[0]) == states(studies[1]) == ["COMPLETE"] * 3
    assert len(points.read(tmp_path)["points"]) == 3


def test_searches_with_different_seeds_have_different_draws():
    seeds = {search.sampler_seed(seed, number) for seed in range(4) for number in range(100)}
    assert len(seeds) == 400 and all(0 <= seed < 2**32 for seed in seeds)
    assert search.sampler_seed(3, 5) == search.sampler_seed(3, 5)
