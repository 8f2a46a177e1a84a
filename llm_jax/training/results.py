"""The results of a finished run: the metrics in summary.json and their printed form."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from llm_jax.evaluation import classification
from llm_jax.parallel import processes
from llm_jax.schema import Config
from llm_jax.training import attempts, evaluator, measurements
from llm_jax.training import setup as setup_lib
from llm_jax.training.inputs import Inputs
from llm_jax.training.setup import Setup
from llm_jax.training.step import TrainState


def summarize(
    setup: Setup, data: Inputs, state: TrainState, workdir: pathlib.Path, metrics: Mapping[str, Any], rate: float | None
) -> dict[str, Any]:
    """Returns the metrics of summary.json, without "seconds".

    Args:
      metrics: metrics of the final evaluation.
      rate: input tokens per second, without padding.
    """
    config = setup.config
    summary = {
        **metrics,
        "compressed_bits_per_byte": data.source.compressed_bits_per_byte() if config.loss.masked == "none" else {},
        "steps": config.train.steps,
        "parameters": setup_lib.num_parameters(setup.base),
        "trained_parameters": setup_lib.num_parameters(setup.state.params),
        "tokens_per_second": rate,
        "corpus": {"source": config.data.source, "sha256": data.source.sha256, "bytes": data.source.num_bytes},
        "goodput": attempts.goodput(workdir),
        **measurements.peak_memory(),
        "jax": jax.__version__,
    }
    params = processes.local_copy(setup.model_params(state)) if data.test else None
    if data.test and processes.is_main():
        is_single = processes.count() == 1
        sharding = setup.batch_sharding if is_single else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        test = classification.accuracy(setup.model, params, data.test, config.train.batch_size, sharding)
        summary |= {f"test_{name}": value for name, value in test.items()}
    return summary


def describe_results(workdir: pathlib.Path, config: Config, summary: Mapping[str, Any]) -> str:
    """Returns the final metrics and the path of the checkpoint as text."""
    key = "validation_bits_per_byte"
    test = {name.removeprefix("test_"): value for name, value in summary.items() if name.startswith("test_")}
    if key in summary:
        packed = ", ".join(f"{name} {value:.3f}" for name, value in summary["compressed_bits_per_byte"].items())
        first = (
            f"held-out: loss {summary['validation_loss']:.4f}, perplexity {summary['validation_perplexity']:.2f}, "
            f"{summary[key]:.3f} bits per byte{packed and f' ({packed})'}"
        )
    else:
        first = "held-out: no text (data.validation_fraction=0); the model was trained on all text"
    lines = [
        first,
        *([f"held-out: {preference}"] if (preference := evaluator.describe_preferences(summary)) else []),
        *(f"of {name.split('/', 1)[1]}: {value:.3f}" for name, value in summary.items() if name.startswith(f"{key}/")),
        *([f"test: {classification.describe(test)}"] if test else []),
        f"checkpoint: {workdir / 'checkpoints' / str(config.train.steps)}",
    ]
    return "\n".join(lines)
