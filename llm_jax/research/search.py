"""Searches a space of options with Optuna. Each trial is a run directory, and bad trials end early.

    --search="optim.lr=loguniform(1e-4, 1e-2); model.width=64,128; model.num_layers=1..4" --trials=20

`uniform(a, b)`, `loguniform(a, b)`, `a..b` and `a..b..step` are ranges; a list has the values to choose from.
OUTPUT/search.log stores the study: the same command continues it, and several processes can work on it.
"""

import contextlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax import configuration, files
from llm_jax.errors import UserError
from llm_jax.research import grid, jobs, points
from llm_jax.research import runs as runs_lib
from llm_jax.research.points import Point
from llm_jax.research.provenance import Provenance
from llm_jax.schema import Config

Suggest = Callable[[Any], Any]  # (Optuna's trial) -> value of the option

_CONTINUOUS = re.compile(r"(uniform|loguniform)\s*\((.*)\)")


def parse(text: str) -> dict[str, Suggest]:
    """Returns {dotted key: function of a trial that suggests a value of the option}.

    Raises:
      UserError: a clause cannot be read, a key is unknown or repeated, or a value does not fit the option.
    """
    return {key: _suggest(key, values) for key, values in _clauses(text).items()}


def run(
    base: Config,
    text: str,
    output: pathlib.Path,
    trials: int,
    shares: Sequence[jobs.MachineShare],
    provenance: Provenance,
    *,
    seed: int = 0,
    prune: bool = True,
    stop: Callable[[], Any] = lambda: False,
    show: Callable[[Sequence[Point], Sequence[jobs.Status]], None] = lambda points, statuses: None,
) -> tuple[Any, list[jobs.Status]]:
    """Runs trials until the study has `trials` of them.

    Args:
      base: the configuration that the suggested options change.
      text: the search space, see `parse`.
      prune: end trials early whose held-out result is worse than the median of the others at the same step.
      show: called with the points of this call and their states.

    Returns:
      The study of Optuna, which minimizes the held-out bits per byte (or the held-out loss if they are not measured),
      and the states of the jobs.

    Raises:
      UserError: Optuna is not installed, the space cannot be read, or the study in `output` was started with another
        space or other options.
    """
    space = parse(text)
    if importlib.util.find_spec("optuna") is None:
        raise UserError("--search needs Optuna: pip install optuna")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    files.make_directory(output)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(output / "search.log")))
    study = optuna.create_study(
        storage=storage,
        study_name="search",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
    )
    _refuse_another_study(study, base, _clauses(text), output)
    started: list[Point] = []
    active: dict[str, Any] = {}
    reported: dict[str, int] = {}
    steps: dict[str, int] = {}
    State = optuna.trial.TrialState
    Finished = optuna.exceptions.UpdateFinishedTrialError  # another process has recorded the end of the trial

    def start(trial: Any) -> jobs.Job | None:
        overrides = {key: suggest(trial) for key, suggest in space.items()}
        name = f"trial-{trial.number:04d}"
        try:
            point = Point(name, overrides, configuration.load(base, overrides), output / name)
        except UserError as error:
            with contextlib.suppress(Finished):
                trial.set_user_attr("error", str(error))
            study.tell(trial, state=State.FAIL, skip_if_finished=True)
            return None
        reported[name] = max(study.trials[trial.number].intermediate_values, default=0)
        steps[name] = point.config.train.steps
        points.write([point], output, provenance)
        started.append(point)
        active[name] = trial
        return points.job(point)

    def settle(statuses: Sequence[jobs.Status]) -> None:
        for status in statuses:
            if (trial := active.get(status.job.name)) is None:
                continue
            if status.state == jobs.DONE:
                summary = files.read_json(status.job.directory / "summary.json")
                value = summary.get(runs_lib.BITS, summary.get("validation_loss"))
                study.tell(trial, value, skip_if_finished=True)
            elif status.state in (jobs.FAILED, jobs.ENDED):
                state = State.FAIL if status.state == jobs.FAILED else State.PRUNED
                study.tell(trial, state=state, skip_if_finished=True)
            else:
                continue
            del active[status.job.name]

    def interrupted() -> Iterator[Any]:
        """Yields trials that no process is running, except those that another process has just created: they lack
        options."""
        for frozen in study.get_trials(deepcopy=False, states=[State.RUNNING]):
            name = f"trial-{frozen.number:04d}"
            if name not in active and frozen.params.keys() >= space.keys() and not jobs.is_locked(output / name):
                yield optuna.trial.Trial(study, frozen._trial_id)

    def claim() -> Any:
        """Creates a trial, or returns None if all processes together have created `trials` trials."""
        with files.lock(output, points.LOCK, wait=True):
            number = len(study.trials)
            study.sampler = optuna.samplers.TPESampler(seed=sampler_seed(seed, number))
            return study.ask() if number < trials else None

    def more(statuses: Sequence[jobs.Status]) -> jobs.Job | None:
        settle(statuses)
        for trial in interrupted():
            if job := start(trial):
                return job
        while trial := claim():
            if job := start(trial):
                return job
        return None

    def should_end(job: jobs.Job) -> bool:
        trial = active[job.name]
        if study.get_trials(deepcopy=False)[trial.number].state.is_finished():
            return True
        for line in runs_lib.read_lines(job.directory / "metrics.jsonl"):
            value = line.get(runs_lib.BITS, line.get("validation_loss"))
            # The final evaluation may be over other rows, and ends the trial in any case.
            if value is not None and reported[job.name] < line["step"] < steps[job.name]:
                try:
                    trial.report(value, line["step"])
                except Finished:
                    return True
                reported[job.name] = line["step"]
        return bool(reported[job.name]) and trial.should_prune()

    environment = points.environment(output)
    statuses = jobs.run(
        [],
        shares,
        stop=stop,
        show=lambda statuses: show(started, statuses),
        environment=environment,
        more=more,
        should_end=should_end,
    )
    settle(statuses)
    return study, statuses


def sampler_seed(seed: int, number: int) -> int:
    """The 32-bit random seed of one trial, different for every trial and every search."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def describe(study: Any, output: pathlib.Path) -> str:
    """The best trial of a study, in one line."""
    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not finished:
        return "no trial has ended"
    best = min(finished, key=lambda trial: trial.value)
    options = ", ".join(f"{key}={value}" for key, value in best.params.items())
    return f"best of {len(finished)} trials: {best.value:.4f} with {options} ({output / f'trial-{best.number:04d}'})"


def _clauses(text: str) -> dict[str, str]:
    """Parses a search space to {dotted key: text of its range or values}."""
    clauses: dict[str, str] = {}
    for clause in grid.split(text, ";", "--search"):
        key, values = grid.parse_assignment(clause, "--search", "KEY=RANGE or KEY=VALUE,VALUE,...")
        if key in clauses:
            raise UserError(f"--search: '{key}' is given twice")
        clauses[key] = re.sub(r"\s*,\s*", ",", values)
    return clauses


def _refuse_another_study(study: Any, base: Config, clauses: Mapping[str, str], output: pathlib.Path) -> None:
    """Records the space and the options in a new study, or compares them with those of an existing study.

    Raises:
      UserError: the space or an option that changes results differs from the existing study.
    """
    options = json.loads(json.dumps(configuration.flat(base)))
    recorded = study.user_attrs
    if "space" not in recorded:
        study.set_user_attr("options", options)
        study.set_user_attr("space", dict(clauses))
        return
    for source, before, now in (
        ("--search: ", recorded["space"], clauses),
        ("--config.", recorded["options"], options),
    ):
        for key in [*before, *(now.keys() - before.keys())]:
            searched = source == "--config." and (key in clauses or key in runs_lib.OPTIONS_WITHOUT_EFFECT_ON_RESULTS)
            if not searched and before.get(key) != now.get(key):
                raise UserError(
                    f"{output}: this search was started with {source}{key}={before.get(key)}, now {now.get(key)}; "
                    "choose another --output, or use the former value"
                )


def _suggest(key: str, text: str) -> Suggest:
    kind = grid.option_type(key)
    limits, call = grid.RANGE.fullmatch(text), _CONTINUOUS.fullmatch(text)
    if kind in (int, float) and (call or limits):
        function, inside = call.groups() if call else ("", text.replace("..", ","))
        texts, log = grid.split(inside, ",", "--search"), function == "loguniform"
        try:
            low, high, *step = (kind(float(number)) for number in texts)
            if low >= high or (log and low <= 0) or len(step) > (not call) or (step and step[0] <= 0):
                raise ValueError
        except (TypeError, ValueError) as error:
            expected = "a range FROM below TO, as in loguniform(1e-4, 1e-2)"
            raise UserError(f"--search: {key}={text}; expected {expected}") from error
        options = {"step": step[0]} if step else {"log": log}
        if kind is int:
            return lambda trial: trial.suggest_int(key, low, high, **options)
        return lambda trial: float(f"{trial.suggest_float(key, low, high, **options):.4g}")
    choices = {value: grid.convert(key, value, kind, "--search") for value in grid.split(text, ",", "--search")}
    return lambda trial: choices[trial.suggest_categorical(key, list(choices))]
