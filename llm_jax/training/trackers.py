"""Experiment trackers that get the figures of metrics.jsonl as well: `report.to`."""

import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from llm_jax.errors import UserError
from llm_jax.schema import choice


class Tracker(Protocol):
    """Where figures and texts of a run go, besides its own files."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under WORKDIR/tensorboard. What a killed run wrote past step `start` is hidden there."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        if not start:
            self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()), 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)  # Markdown: as it stands

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, the same one when training goes on."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start: int):
        import wandb

        name = workdir.resolve().name
        self._run = wandb.init(project="llm_jax", name=name, id=name, resume="allow", dir=workdir, config=dict(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at the tracking address that its own settings name."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start: int):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment("llm_jax")
        known = workdir / "mlflow_run"
        run = mlflow.start_run(
            run_id=known.read_text() if start and known.exists() else None, run_name=workdir.resolve().name
        )
        known.write_text(run.info.run_id)
        if not start:
            mlflow.log_params(dict(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._mlflow.log_text(text, f"{name}/{step}.txt")

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[pathlib.Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


_PACKAGES = {"tensorboard": "tensorboardX"}  # where the package has another name


def check(names: tuple[str, ...]) -> None:
    """Raises UserError where one is unknown, or its package is not installed."""
    for name in names:
        choice("report.to", name, TRACKERS)
        package = _PACKAGES.get(name, name)
        if importlib.util.find_spec(package) is None:
            raise UserError(f"report.to={name} needs the package {package}; pip install {package}")


def open_all(names: tuple[str, ...], workdir: pathlib.Path, config: Mapping[str, Any], start: int) -> list[Tracker]:
    """The trackers of a run that is at step `start`.

    Args:
      config: {dotted key: value}.

    Raises:
      UserError: one's package is not installed, or it cannot begin.
    """
    check(names)
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(TRACKERS[name](workdir, config, start))
        except Exception as error:  # theirs are many: no network, not logged in, a path that cannot be written
            for tracker in opened:
                tracker.close()
            raise UserError(f"report.to={name} cannot begin ({str(error).strip().splitlines()[-1]})") from error
    return opened
