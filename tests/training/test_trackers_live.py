"""Trackers with their real clients, offline and in files; gs:// against an emulator of Google Cloud Storage."""

import json
import os
import pathlib

import pytest

import llm_jax
from llm_jax import trees
from tests.conftest import ROOT

pytestmark = pytest.mark.live
SECRET = "hunter2"


@pytest.fixture
def train(text_file, cache, tmp_path):
    """train(tracker, steps) trains or resumes one run, as the command does."""
    import llm_jax.train as command

    def run(tracker, steps):
        changes = {
            "data.source": str(text_file),
            "data.cache_dir": str(cache),
            "report.to": (tracker,),
            "report.norms_every": 2,
            "report.samples_every": 2,
            "report.pictures": ("attention",),
            "eval.prompts": ("the ", f"https://me:{SECRET}@host/"),
            "train.steps": steps,
            "optim.schedule": "constant",
        }
        config = llm_jax.config(ROOT / "tests" / "tiny.py", changes)
        from llm_jax.training import trainer

        return trainer.train(config, tmp_path / "run", attachments=command.write_report, verbose=False)

    return run


def contents(directory):
    return {path: path.read_bytes() for path in pathlib.Path(directory).rglob("*") if path.is_file()}


def test_mlflow_gets_one_run_with_config_metrics_samples_and_report(train, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    train("mlflow", 4)
    train("mlflow", 8)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("llm_jax").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["model.width"] == "32" and len(run.data.params) > 100
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in losses) == list(range(1, 9))
    for name in ("final/validation_loss", "parameter_norm", "attention_entropy/layers/0", "gradient_norm/embed/table"):
        assert name in run.data.metrics
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"samples", "report", "pictures", "summary.json"} <= artifacts
    (report,) = client.list_artifacts(run.info.run_id, "report")
    page = pathlib.Path(client.download_artifacts(run.info.run_id, report.path)).read_text()
    assert page.lower().startswith("<!doctype html>") and SECRET not in page
    assert SECRET not in json.dumps(run.data.params)


def test_wandb_gets_config_metrics_samples_and_report_without_secrets(train, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    train("wandb", 4)
    train("wandb", 8)
    run_id = (tmp_path / "run" / "wandb_run").read_text()
    offline = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(offline) == 2  # two processes' parts of one run, which `wandb sync` joins
    records = b"".join(contents(offline[0]).values()) + b"".join(contents(offline[1]).values())
    for text in (b"model.width", b"validation_loss", b"parameter_norm", b"attention_entropy/layers/1", b"samples"):
        assert text in records, text
    assert {".html", ".png"} <= {path.suffix for path in contents(offline[1])}
    assert b"report-" in b"".join(contents(offline[1]).values())
    assert SECRET.encode() not in records and b"f" * 40 not in records


def test_tensorboard_reads_its_hyperparameters(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("tensorboard", 4)
    train("tensorboard", 8)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert [event.step for event in events.Images("pictures/attention")] == [4, 8]
    # tests/tiny.py evaluates 8 rows during training and all at the end, here twice.
    assert [event.step for event in events.Scalars("final/validation_loss")] == [4, 8]
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert plugin.plugin_name == "hparams" and b"optim.lr" in plugin.content


@pytest.fixture
def bucket(monkeypatch):
    from gcp_storage_emulator.server import create_server

    server = create_server("localhost", 9123, in_memory=True, default_bucket="models")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:9123")
    yield "models"
    server.stop()


def test_a_run_is_loaded_from_google_cloud_storage(trained, bucket, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    system = fsspec.filesystem("gs", skip_instance_cache=True)
    for path in trained.rglob("*"):
        if path.is_file():
            system.pipe_file(f"{bucket}/runs/a/{path.relative_to(trained).as_posix()}", path.read_bytes())
    params = llm_jax.load(f"gs://{bucket}/runs/a").params
    assert trees.fingerprint(params) == trees.fingerprint(llm_jax.load(trained).params)
    with pytest.raises(llm_jax.errors.UserError, match="gs://models/runs/b: nothing there"):
        llm_jax.load(f"gs://{bucket}/runs/b")
