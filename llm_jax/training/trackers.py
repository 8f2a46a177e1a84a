"""Experiment trackers that receive the metrics, texts and pictures of a run: `report.to`.

A resumed run continues the same run of its tracker; WORKDIR/wandb_run and WORKDIR/mlflow_run contain its id.
"""

import html
import importlib.util
import os
import pathlib
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from llm_jax import files, object_store
from llm_jax.errors import UserError
from llm_jax.schema import choice

_PROJECT = "llm_jax"  # default of WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME
_FINAL = ("validation_", "task_", "test_")  # prefixes of the metrics of the final evaluation
# In the table of hyperparameters of TensorBoard.
_COMPARED = ("loss", "final/validation_loss", "final/validation_bits_per_byte")
_AT_ONCE = 100  # maximum number of parameters in one call of MLflow; the maximum number of metrics is ten times this
_MAX_LENGTH = 500  # maximum length of the value of a parameter in MLflow


class Tracker(Protocol):
    """A destination of the metrics, texts and pictures of a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """Logs a PNG file."""

    def finish(self, summary: Mapping[str, float], attachments: Sequence[pathlib.Path]) -> None:
        """Logs the final metrics of a complete run, and files such as its report."""

    def close(self) -> None:
        """Closes the tracker; the run may be resumed later if it did not `finish`."""


class TensorBoard:
    """Event files in WORKDIR/tensorboard. TensorBoard ignores events of a killed run after step `start`."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start: int):
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        directory = workdir / "tensorboard"
        begins = not (start and directory.is_dir())
        self._writer = SummaryWriter(str(directory), purge_step=start + 1)
        values = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in config.items()}
        *beginning, self._end = hparams(values, dict.fromkeys(_COMPARED, 0.0))
        if begins:
            self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in values.items()), 0)
            for summary in beginning:
                self._writer.file_writer.add_summary(summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        indented = "    " + text.replace("\n", "\n    ")  # Markdown does not format indented text
        self._writer.add_text(name, indented, step)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        from matplotlib import image

        self._writer.add_image(name, image.imread(path), step, dataformats="HWC")

    def finish(self, summary: Mapping[str, float], attachments: Sequence[pathlib.Path]) -> None:
        self._writer.file_writer.add_summary(self._end)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases. The terminal, the command line and the environment are not sent."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start: int):
        import wandb

        self._wandb = wandb
        name = workdir.resolve().name
        # Runs from version 0.1 use the name of their directory as id.
        run_id = (_recorded(workdir, "wandb") or name) if start else secrets.token_hex(8)
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        directory = tempfile.mkdtemp() if object_store.is_object(workdir) else str(workdir)
        settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True)
        self._run = wandb.init(project=project, name=name, id=run_id, resume="allow", dir=directory, settings=settings)
        self._run.config.update(dict(config), allow_val_change=True)
        _record(workdir, "wandb", run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def finish(self, summary: Mapping[str, float], attachments: Sequence[pathlib.Path]) -> None:
        self._run.summary.update(dict(summary))
        for path in attachments:
            artifact = self._wandb.Artifact(f"{path.stem}-{self._run.id}", type=path.stem)
            artifact.add_file(str(path))
            self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow at the tracking URI of MLflow's settings, such as MLFLOW_TRACKING_URI."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start: int):
        import mlflow
        from mlflow.entities import Metric, Param

        # A separate client, because the functions of the module fail if the user's program has an active run.
        self._client, self._metric, self._status = mlflow.MlflowClient(), Metric, "KILLED"
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        recorded = _recorded(workdir, "mlflow") if start else ""
        if recorded:
            self._client.set_terminated(recorded, "RUNNING")
            self._run = recorded
            return  # MLflow rejects a changed value of a parameter
        self._run = self._client.create_run(experiment_id, run_name=workdir.resolve().name).info.run_id
        _record(workdir, "mlflow", self._run)
        params = [Param(key, str(value)[:_MAX_LENGTH]) for key, value in config.items()]
        for first in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._run, params=params[first : first + _AT_ONCE])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        for first in range(0, len(metrics), 10 * _AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[first : first + 10 * _AT_ONCE])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._run, text, f"{name}/{step}.txt")

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        self._client.log_artifact(self._run, str(path), _mlflow_name(name))

    def finish(self, summary: Mapping[str, float], attachments: Sequence[pathlib.Path]) -> None:
        self._client.log_dict(self._run, dict(summary), "summary.json")
        for path in attachments:
            self._client.log_artifact(self._run, str(path), path.stem)
        self._status = "FINISHED"

    def close(self) -> None:
        self._client.set_terminated(self._run, self._status)


TRACKERS: dict[str, Callable[[pathlib.Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


_PACKAGES = {"tensorboard": "tensorboardX"}  # packages whose name differs from the tracker's


def check(names: tuple[str, ...]) -> None:
    """Raises UserError if a tracker is unknown or its package is not installed."""
    for name in names:
        choice("report.to", name, TRACKERS)
        package = _PACKAGES.get(name, name)
        if importlib.util.find_spec(package) is None:
            raise UserError(f"report.to={name} needs the package {package}; pip install {package}")


class Trackers:
    """Forwards everything to several trackers. If a tracker fails, a note is printed and it is no longer used.

    Args:
      trackers: {name in `TRACKERS`: tracker}.
    """

    def __init__(self, trackers: Mapping[str, Tracker] | None = None):
        self._trackers = dict(trackers or {})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the metrics of a step."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Logs a text, such as samples, after replacing passwords and tokens by "***"."""
        public = redact(text)
        self._each(lambda tracker: tracker.text(step, name, public))

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """Logs a PNG."""
        self._each(lambda tracker: tracker.picture(step, name, path))

    def finish(self, summary: Mapping[str, Any], attachments: Sequence[pathlib.Path] = ()) -> None:
        """Logs the final metrics of a complete run, nested metrics by dotted names, and files.

        The metrics of the final evaluation are also logged as scalars "final/NAME" of the last step: it may use other
        rows and examples than the periodic evaluations, whose scalars are called NAME.
        """
        numbers = _numbers(summary)
        final = {f"final/{name}": float(value) for name, value in numbers.items() if name.startswith(_FINAL)}
        if final:
            self.scalars(summary["steps"], final)
        self._each(lambda tracker: tracker.finish(numbers, attachments))

    def close(self) -> None:
        """Closes all trackers; further calls have no effect."""
        self._each(lambda tracker: tracker.close())
        self._trackers = {}

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # many types, such as network errors
                del self._trackers[name]
                print(
                    f"note: report.to={name} has failed ({_reason(error)}); the run continues without it, and the "
                    "files in the run directory are complete",
                    file=sys.stderr,
                )


def open_all(names: tuple[str, ...], workdir: pathlib.Path, config: Mapping[str, Any], start: int) -> Trackers:
    """Opens the trackers of a run that is at step `start`.

    Args:
      config: {dotted key: value}; passwords and tokens in it are replaced by "***".

    Raises:
      UserError: the package of a tracker is not installed, or the tracker cannot start.
    """
    check(names)
    opened: dict[str, Tracker] = {}
    public = redact(config)
    for name in names:
        try:
            opened[name] = TRACKERS[name](workdir, public, start)
        except Exception as error:  # many types: no network, not logged in, an unwritable path
            Trackers(opened).close()
            raise UserError(f"report.to={name} cannot start ({_reason(error)})") from error
    return Trackers(opened)


_NAME = r"[\w-]*(?:token|secret|passw(?:or)?d|key|sig|signature|credential)s?"
_ASSIGNED = rf"(?i)(\b{_NAME}[\"']?\s*[=:]\s*)(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s&;,'\")]+)"
_TOKENS = r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA|AIza|ya29\.)[\w.\-]{12,}"
# Patterns of secrets: USER:PASSWORD@ in a URL, assignments to secret names, tokens of well-known services.
_SECRETS = (
    (re.compile(r"(?<=://)[^@\s'\"]+(?=@)"), "***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ***"),
    (re.compile(_ASSIGNED), r"\1***"),
    (re.compile(_TOKENS), "***"),
)


def redact(value: Any) -> Any:
    """Replaces passwords and tokens by "***" in a text, or in the texts of a tuple, list or mapping."""
    if isinstance(value, str):
        for pattern, replacement in _SECRETS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, Mapping):
        return {key: redact(item) for key, item in value.items()}
    return type(value)(map(redact, value)) if isinstance(value, tuple | list) else value


def _reason(error: Exception) -> str:
    return str(redact((str(error).strip().splitlines() or [type(error).__name__])[-1]))


def _numbers(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns {dotted name: number} of nested mappings."""
    numbers: dict[str, float] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            numbers |= _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[prefix + key] = value
    return numbers


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)


def _recorded(workdir: pathlib.Path, tracker: str) -> str:
    path = workdir / f"{tracker}_run"
    return path.read_text().strip() if path.exists() else ""


def _record(workdir: pathlib.Path, tracker: str, run: str) -> None:
    files.write(workdir / f"{tracker}_run", run)
