"""The held-out tokens whose losses differ most between two runs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from llm_jax import checkpoints
from llm_jax.data.kinds import open_source
from llm_jax.data.rows import ROWS
from llm_jax.errors import UserError
from llm_jax.pictures import token_differences
from llm_jax.pictures.token_differences import TokenDifferences
from llm_jax.research.runs import RunRecord
from llm_jax.tokenizers import digest


def differences(runs: Sequence[RunRecord], limit: int, token_losses: Callable[..., jax.Array]) -> TokenDifferences:
    """Compares two runs on the first `limit` rows of their held-out text.

    Args:
      token_losses: (model, parameters, batch) -> nats of every counted target, 0 for others, float32 (B, T); see
        `training.losses.token_losses`.

    Raises:
      UserError: there are not exactly two runs, or no rows; the held-out texts or the tokenizers differ; or a run does
        not predict next tokens.
    """
    if len(runs) != 2 or limit < 1:
        raise UserError(f"--tokens compares 2 runs on at least 1 row; {len(runs)} runs, --token_rows={limit}")
    names = (runs[0].name, runs[1].name)
    opened = [checkpoints.open(run.path) for run in runs]
    configs: list[Any] = [checkpoint.run_config for checkpoint in opened]
    for name, config in zip(names, configs, strict=True):
        if not config.model.causal or config.loss.masked != "none":
            raise UserError(f"--tokens compares losses of next tokens; {name} does not predict them")
    for key in ("source", "kind", "format", "field", "validation_fraction"):
        values = [getattr(config.data, key) for config in configs]
        if values[0] != values[1]:
            raise UserError(
                f"--tokens: the runs hold out different texts (data.{key} is {values[0]!r} and {values[1]!r})"
            )
    loaded = [checkpoint.load(scan_layers=True) for checkpoint in opened]
    if digest(loaded[0].tokenizer) != digest(loaded[1].tokenizer):
        raise UserError("--tokens: the runs have different tokenizers, so their tokens cannot be compared")
    data, length = configs[0].data, min(config.train.seq_len for config in configs)
    split = open_source(data).corpus(loaded[0].tokenizer).validation
    if not len(split.tokens):
        raise UserError("--tokens: the runs have no held-out text (data.validation_fraction=0)")

    def loss(model: Any) -> Any:
        return jax.jit(lambda params, batch: token_losses(model, params, batch))

    models = [(loss(model), params) for model, params, _ in loaded]
    rows = ROWS[data.kind](split, length)
    return token_differences.token_differences(names, models, loaded[0].tokenizer, rows, limit=limit)
