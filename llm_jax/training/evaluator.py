"""Held-out metrics, task accuracies and samples of a training state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from llm_jax import tokenizers, trees
from llm_jax.decoding import loop
from llm_jax.decoding.options import DecodingOptions
from llm_jax.evaluation import answers, example_counts, held_out
from llm_jax.evaluation.prompts import PromptConfig
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import processes
from llm_jax.training import bad_steps, inputs, losses, measurements, run_pictures
from llm_jax.training.setup import Setup
from llm_jax.training.step import TrainState


def describe_preferences(metrics: Mapping[str, float]) -> str:
    """Returns the accuracy and the mean margin of held-out preferences as text, or "" if they were not measured."""
    if "validation_preference_accuracy" not in metrics:
        return ""
    accuracy, margin = (metrics[f"validation_preference_{name}"] for name in ("accuracy", "margin"))
    return f"chosen answer preferred {accuracy:.1%}, mean margin {margin:.4f}"


class Evaluator:
    """Computes held-out metrics, task accuracies and samples of a state; compiles each function once."""

    def __init__(self, setup: Setup, data: inputs.Inputs, tasks: Mapping[str, Any]):
        self._setup, self._data, self._tasks = setup, data, tasks
        self._decoder = setup.model.clone(config=dataclasses.replace(setup.config.model, scan_layers=False))
        unstack = lambda params, frozen: trees.unstack(setup.method.model_params(params, frozen))  # noqa: E731
        self._unstack = jax.jit(unstack, out_shardings=setup.replicated)
        layers = measurements.layer_statistics(setup.model)

        def statistics(params: Any, frozen: Any, batch: Any) -> dict[str, Any]:
            values = layers(setup.method.model_params(params, frozen), batch)
            return values | {"parameter": dict(zip(setup.weight_names, bad_steps.norms(params), strict=True))}

        def preferences(params: Any, frozen: Any, batch: Any) -> Any:
            weights, c = setup.method.model_params(params, frozen), setup.config
            assert setup.reference is not None
            reference = setup.reference, frozen["reference"]
            return losses.preferences(setup.model, weights, *reference, batch, c.loss.beta, c.train.loss_chunk)

        rules = setup.config.mesh.rules
        self._preferences = jax.jit(mesh_lib.with_mesh(setup.mesh, preferences, rules), out_shardings=setup.replicated)
        self._statistics = jax.jit(mesh_lib.with_mesh(setup.mesh, statistics), out_shardings=setup.replicated)

    def _local_params(self, state: TrainState) -> Any:
        """The parameters of the model, one entry per layer; each of several processes gets a complete copy."""
        return processes.local_copy(self._unstack(state.eval_params, state.frozen))

    def counts(self, final: bool) -> dict[str, int]:
        """The number of held-out rows, also by source, and of examples of every task; see `example_counts.key`.

        Args:
          final: whether of the final evaluation or of the periodic ones.
        """
        config, data = self._setup.config.eval, self._data
        limit = config.final_rows if final else config.rows
        rows = {"": data.held_out, **data.held_out_by_source}
        sizes = {name: len(part) for name, part in rows.items() if part is not None}
        examples = {name: len(task.examples) for name, task in self._tasks.items()}
        most = 0 if final else config.task_examples
        return {
            **{f"validation_rows{name and f'/{name}'}": min(limit or size, size) for name, size in sizes.items()},
            **{f"task_examples/{name}": min(most or size, size) for name, size in examples.items()},
        }

    def final_only(self, metrics: Mapping[str, float]) -> set[str]:
        """The names of the metrics that were measured over other rows or examples than in the periodic evaluations."""
        return example_counts.of_other_examples(metrics, self.counts(final=False))

    def final_note(self) -> str:
        """A note with the number of held-out rows of the final evaluation; "" if every evaluation uses all rows."""
        rows, config = self._data.held_out, self._setup.config.eval
        if rows is None:
            return ""
        count, during = (self.counts(final)["validation_rows"] for final in (True, False))
        if count == during == len(rows):
            return ""
        if count == len(rows):
            return f"last evaluation: all {count:,} held-out rows"
        return f"last evaluation: {count:,} of {len(rows):,} held-out rows (eval.final_rows={config.final_rows})"

    def evaluate(self, state: TrainState, final: bool) -> dict[str, float]:
        """Computes validation_* metrics of the held-out rows, also by source, and task_* accuracies.

        Args:
          final: whether this is the last evaluation, with its own numbers of rows and of examples.

        Returns:
          If there are held-out rows, the metrics of `held_out.evaluate` as "validation_NAME" and
          "validation_NAME/SOURCE". With DPO also "validation_preference_accuracy", the share of pairs whose chosen
          answer has the larger log-ratio to the reference, and "validation_preference_margin", the mean of
          `losses.preference_margin`. The accuracies of tasks as "task_NAME". The numbers of rows and examples, see
          `counts`.
        """
        setup, data, config = self._setup, self._data, self._setup.config
        loss = lambda params, batch: setup.loss(params, state.frozen, batch)  # noqa: E731
        metrics: dict[str, float] = {}
        counts = self.counts(final)
        preferences = lambda params, batch: self._preferences(params, state.frozen, batch)  # noqa: E731
        for source, rows in {"": data.held_out, **data.held_out_by_source}.items():
            if rows is None:
                continue
            suffix = f"/{source}" if source else ""
            count = counts[f"validation_rows{suffix}"]
            arguments = (state.eval_params, rows, config.train.batch_size, setup.batch_sharding, count)
            result = held_out.evaluate(loss, *arguments)
            if config.loss.kind == "dpo":
                right, margin, pairs = held_out.sums(preferences, *arguments)
                result |= {"preference_accuracy": right / pairs, "preference_margin": margin / pairs} if pairs else {}
            metrics |= {f"validation_{name}{suffix}": value for name, value in result.items()}
            metrics[f"validation_rows{suffix}"] = count
        for name, task in self._tasks.items():
            params = self._local_params(state)
            if not processes.is_main():
                continue
            count = counts[f"task_examples/{name}"]
            loaded = (self._decoder, params, data.tokenizer)
            records = list(answers.records(loaded, task, PromptConfig(), range(count)))
            metrics[f"task_{name}"] = answers.summary(records)["accuracy"]
            metrics[f"task_examples/{name}"] = count
        return metrics

    def describe(self, metrics: Mapping[str, float]) -> str:
        """Returns the metrics as one line of text."""
        parts = [f"{name} {metrics[f'task_{name}']:.1%} correct" for name in self._tasks if f"task_{name}" in metrics]
        if "validation_loss" in metrics:
            bits = metrics["validation_bits_per_byte"]
            parts = [f"held-out loss {metrics['validation_loss']:.4f}", f"{bits:.3f} bits per byte", *parts]
        if preference := describe_preferences(metrics):
            parts.append(preference)
        return ", ".join(parts) or "nothing is held out (data.validation_fraction=0)"

    def statistics(self, state: TrainState, batch: Any) -> dict[str, dict[str, Any]]:
        """Statistics of the weights and of a batch, float.

        Returns:
          "parameter": the norm of every trainable weight; "activation": {layer: root mean square of its output};
          "attention_entropy": {layer: mean entropy of its attention probabilities, nats}.
        """
        return jax.device_get(self._statistics(state.params, state.frozen, batch))

    def pictures(self, state: TrainState) -> dict[str, bytes | str]:
        """Returns {name: PNG bytes, or the reason for a missing picture}; {} except in process 0."""
        config, tokenizer = self._setup.config, self._data.tokenizer
        if not config.report.pictures:
            return {}
        params = self._local_params(state)
        if not processes.is_main():
            return {}
        text = config.eval.prompts[0] if config.eval.prompts else ""
        return dict(run_pictures.draw(config.report.pictures, self._decoder, params, tokenizer, text))

    def sample(self, title: str, state: TrainState) -> str:
        """Returns continuations of `eval.prompts` as text under a title; "" except in process 0."""
        params = self._local_params(state)
        if not processes.is_main():
            return ""
        config, tokenizer = self._setup.config, self._data.tokenizer
        prompts = [tokenizers.prompt(tokenizer, text) for text in config.eval.prompts]
        generated = loop.generate(
            self._decoder,
            params,
            prompts,
            DecodingOptions(temperature=0.8, top_p=0.95).sampler(),
            max_new_tokens=config.eval.max_new_tokens,
            eos=tokenizers.eos_ids(tokenizer),
            vocab_size=tokenizer.vocab_size,
        )
        texts = [tokenizer.decode(p + new.ids) for p, new in zip(prompts, generated, strict=True)]
        return "\n".join(f"----- {title}\n{text}" for text in texts)
