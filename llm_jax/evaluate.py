"""Evaluates a checkpoint: held-out loss, perplexity and bits per byte, or accuracy on a task.

python -m llm_jax.evaluate --checkpoint=runs/x [--data=FILE]
python -m llm_jax.evaluate --checkpoint=runs/x --task=arithmetic       # or a JSONL file of examples
python -m llm_jax.evaluate --checkpoint=runs/x --harness=piqa,hellaswag    # tasks of lm-eval
python -m llm_jax.evaluate --checkpoint=runs/x --checkpoint=runs/y         # paired differences, without --harness
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
from typing import Any

from llm_jax import cli, runtime
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.multi_string(
    "checkpoint",
    None,
    f"checkpoint: {cli.CHECKPOINT_FORMS}; may be repeated to compare every other checkpoint with the first on the same "
    "text or examples",
    required=True,
)
FLAGS.define_base()
FLAGS.string("data", "", "text to evaluate, in the form of data.source; default: the held-out part of the run's data")
FLAGS.string("kind", "", "with --data: kind of data, e.g. instructions; default: data.kind of the run, or text")
FLAGS.string("format", "", "with --data: format of the files; default: data.format of the run, or auto")
FLAGS.string("field", "", "with --data: text field of a record; default: data.field of the run, or text")
FLAGS.boolean("whole_file", False, "with --data: treat a text file as one document instead of splitting it")
FLAGS.integer("seq_len", 0, "tokens per window; 0: train.seq_len of the run, or 512")
FLAGS.integer(
    "stride", 0, "sliding window: score only the last N targets of each window, e.g. 64; 0: score all, without overlap"
)
FLAGS.integer("batch_size", 16, "number of windows (or of task examples) that are evaluated in one batch")
FLAGS.define_as_stored()
FLAGS.define_activations()
FLAGS.define_mesh()
FLAGS.boolean("json", False, "print one JSON object instead of text")
FLAGS.define_dtype()
FLAGS.string("task", "", "task to measure accuracy on: arithmetic, copying, sentiment, or a JSONL file of examples")
FLAGS.string(
    "style",
    "zero_shot",
    "prompting style: zero_shot, few_shot, expert, cot_zero_shot or cot_few_shot; all evaluates every style",
)
FLAGS.integer("template", 0, "index of the task's prompt template; -1 evaluates every template")
FLAGS.integer("shots", -1, "number of solved examples in the prompt; -1: the default of the style")
FLAGS.string("select", "random", "how solved examples are selected: first, random or balanced (over the answers)")
FLAGS.integer("shot_seed", 0, "seed for the selection and the order of solved examples")
FLAGS.boolean("chat", False, "format prompts with the chat template of the tokenizer")
FLAGS.string(
    "chat_template", "", "with --chat: name of a chat template of the tokenizer; default: the template named default"
)
FLAGS.string("normalize", "none", "length normalization of the log-probabilities of choices: none, tokens or bytes")
FLAGS.integer("context", 0, "maximum number of tokens of a prompt and its answer; 0: the maximum length of the model")
FLAGS.integer("limit", 0, "maximum number of examples to evaluate; 0: all")
FLAGS.string("output", "", "directory for the records of all examples; the same command resumes from them")
FLAGS.string("harness", "", "tasks of lm-eval, separated by commas, e.g. piqa,hellaswag (pip install lm-eval)")
FLAGS.string("harness_path", "", "directory with additional lm-eval tasks")

_TASK_FLAGS = ("style", "template", "shots", "select", "shot_seed", "chat", "normalize", "context", "output")
NEEDS: cli.Needs = (
    *cli.MESH_NEEDS,
    (_TASK_FLAGS, "--task is not given", lambda f: f.task),
    (("chat_template",), "--chat is not given", lambda f: f.chat),
    (("limit",), "neither --task nor --harness is given", lambda f: f.task or f.harness),
    (("harness_path",), "--harness is not given", lambda f: f.harness),
    (("kind", "format", "field", "whole_file"), "--data is not given", lambda f: f.data),
    (("seq_len", "stride"), "--task or --harness is given", lambda f: not (f.task or f.harness)),
)


def main(f: cli.Flags) -> None:
    runtime.retain_freed_memory()
    runtime.simulate_devices(f.devices)
    if f.batch_size < 1 or f.seq_len < 0 or f.limit < 0:
        numbers = f"--batch_size={f.batch_size} --seq_len={f.seq_len} --limit={f.limit}"
        raise UserError(f"{numbers}; expected positive numbers")
    is_path = lambda name: "://" in name or os.path.exists(os.path.expanduser(name))  # noqa: E731, PTH110, PTH111
    if joined := [name for name in f.checkpoint if "," in name and not is_path(name)]:
        repeated = " ".join(f"--checkpoint={name}" for name in joined[0].split(",") if name)
        raise UserError(f"--checkpoint={joined[0]}: no such directory; did you mean {repeated}?")
    if twice := [name for name in f.checkpoint if f.checkpoint.count(name) > 1]:
        count = f.checkpoint.count(twice[0])
        raise UserError(f"--checkpoint={twice[0]} is given {count} times; expected different checkpoints")
    if bool(f.task) + bool(f.harness) + bool(f.data) > 1:
        raise UserError("--task, --harness and --data are different evaluations; choose one")
    if f.task:
        on_task(f)
    elif f.harness:
        on_harness(f)
    else:
        on_text(f)


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """The held-out text of a checkpoint, before its weights and the text are read.

    Attributes:
      name: value of the flag --checkpoint.
      config: the configuration of the run, or None for other checkpoints.
      data: `DataConfig` of the text.
      is_whole_text: whether to evaluate the whole text instead of its held-out part.
      length: tokens per window.
    """

    name: str
    checkpoint: Any
    config: Any
    data: Any
    is_whole_text: bool
    length: int

    @property
    def is_masked(self) -> bool:
        return self.config is not None and self.config.loss.masked != "none"


def _held_out(f: cli.Flags, name: str) -> _HeldOut:
    from llm_jax import checkpoints, configuration
    from llm_jax.model import transformer

    checkpoint = checkpoints.open(name, f.base)
    config = checkpoint.run_config
    if checkpoint.training_data is None and not f.data:
        raise UserError(f"{name} records no training data; set --data=FILE")
    data = configuration.default("data") if config is None else config.data
    length = f.seq_len or (checkpoints.WINDOW if config is None else config.train.seq_len)
    is_whole_text = bool(f.data)
    if f.data:
        flags = {"kind": f.kind, "format": f.format, "field": f.field}
        data = dataclasses.replace(data, source=f.data, **{name: value for name, value in flags.items() if value})
    if former := configuration.former_source(data.source):  # a former source name selects the test split of an asset
        data, is_whole_text = configuration.replace(data, former, "data."), False
    held_out = _HeldOut(name, checkpoint, config, data, is_whole_text, length)
    if not checkpoint.config.causal and not held_out.is_masked:
        raise UserError(
            f"{name} is a bidirectional model (model.causal=False), which sees the tokens that it would predict; "
            "expected a causal model"
        )
    transformer.check_length(checkpoint.config, length)
    if not 0 <= f.stride <= length:
        raise UserError(f"--stride={f.stride}; expected 0 to {length}, the number of tokens per window")
    if held_out.is_masked and (f.stride or data.kind != "text"):
        raise UserError(f"{name} was trained with loss.masked; expected data.kind=text and no --stride")
    if f.stride and data.kind != "text":
        raise UserError(f"--stride={f.stride} needs data.kind=text; examples of data.kind={data.kind} are not split")
    return held_out


def on_text(f: cli.Flags) -> None:
    from llm_jax.data.kinds import open_source
    from llm_jax.evaluation import held_out as held_out_lib

    held_out_texts = [_held_out(f, name) for name in f.checkpoint]
    if len(held_out_texts) > 1:
        held_out_lib.check_same_text(held_out_texts)
    first = held_out_texts[0]
    if f.whole_file and first.data.kind != "text":
        raise UserError(
            f"--whole_file has no effect where data.kind is {first.data.kind}: each record is an example; omit the flag"
        )
    source: Any = open_source(first.data, first.is_whole_text, split_single_file=not f.whole_file)
    if f.whole_file and all(file.format != "text" for file in source.catalog.files):
        raise UserError(
            f"--whole_file has no effect on --data={f.data}, which has no text file that would be split; omit the flag"
        )
    compressed = {} if first.is_masked else source.compressed_bits_per_byte()
    if f.data and first.data.kind == "text" and source.catalog.is_cut():
        print(
            f"note: {f.data} is split at line breaks into several documents; their first tokens have no context and "
            "thus a higher loss; --whole_file scores the file as one document",
            file=sys.stderr,
        )
    if len(held_out_texts) == 1:
        _print_text(f, first, _measure(f, first, source), compressed)
        return
    _compare_text(f, held_out_texts, source, compressed)


def _measure(f: cli.Flags, held_out: _HeldOut, source: Any, by_unit: bool = False) -> dict[str, Any]:
    """Returns the metrics of one checkpoint, and with `by_unit` its `paired.Units`."""
    import jax
    import numpy as np

    from llm_jax.data import corpus as corpus_lib
    from llm_jax.data import masking
    from llm_jax.data.rows import ROWS, Packed, Rows
    from llm_jax.evaluation import classification, paired
    from llm_jax.evaluation import held_out as held_out_lib
    from llm_jax.parallel import mesh as mesh_lib
    from llm_jax.training import losses

    model, params, tokenizer = held_out.checkpoint.load(
        scan_layers=True, dtype=f.dtype, as_stored=f.as_stored, activations=f.activations, mesh=f.mesh
    )
    corpus = source.corpus(tokenizer)
    split = corpus.validation
    if split.choices and corpus.test:
        split = corpus.test
    if not split.choices and not len(split.tokens):
        raise UserError(f"{held_out.name} has no held-out data (data.validation_fraction=0); set --data=FILE")
    text = f"{held_out.data.source}: {len(split.tokens):,} tokens"
    print(f"evaluating {held_out.name} on {text}", file=sys.stderr, flush=True)
    mesh, rules = mesh_lib.mesh_of(params), held_out.checkpoint.mesh_rules
    shards = mesh_lib.row_shards(mesh) if mesh else 1

    def divisible(size: int) -> int:
        """Rounds a number of rows up to a multiple of the shards; padding rows are not counted in the results."""
        return -(-size // shards) * shards

    def compiled(function: Any) -> Any:
        return jax.jit(mesh_lib.with_mesh(mesh, function, rules) if mesh else function)

    device: Any = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    device = mesh_lib.batch_sharding(mesh, shards) if mesh else device
    if split.choices:
        rows = Packed(split, held_out.length)
        indices, right = classification.correct_answers(model, params, rows, divisible(f.batch_size), device)
        count = len(rows.split.offsets) - 1
        values, measured = np.zeros(count), np.zeros(count, bool)
        values[indices], measured[indices] = right, True
        return {"units": paired.Units(values, np.ones(count), measured), **classification.summary(right)}
    if note := held_out_lib.unknown_note(tokenizer, split.tokens):
        print(note, file=sys.stderr)
    kind = held_out.data.kind
    windows: Any = Rows(split, held_out.length, f.stride) if f.stride else ROWS[kind](split, held_out.length)
    batch_size = divisible(held_out_lib.batch_size(f.batch_size, windows))
    if by_unit:
        sizes = corpus_lib.open_split(split.directory)[1]
        loss_of_tokens = compiled(lambda params, batch: losses.token_losses(model, params, batch))
        return {"units": paired.bits_by_document(loss_of_tokens, params, windows, sizes, batch_size, device)}
    if held_out.is_masked:
        windows = masking.row_masker(held_out.config.loss, tokenizer)(windows, 0)
    loss = compiled(lambda params, batch: losses.language_model(model, params, batch, 0))
    metrics = held_out_lib.evaluate(loss, params, windows, batch_size, device)
    return {"bytes": split.num_bytes, "documents": len(split.offsets) - 1, **metrics}


def _print_text(f: cli.Flags, held_out: _HeldOut, metrics: dict[str, Any], compressed: dict[str, float]) -> None:
    from llm_jax.evaluation import classification

    metrics.pop("units", None)
    if "accuracy" in metrics:
        print(json.dumps(metrics) if f.json else f"{held_out.data.source}: {classification.describe(metrics)}")
        return
    num_bytes = metrics.pop("bytes")
    if f.json:
        print(json.dumps({**_finite(metrics), "compressed_bits_per_byte": compressed}, allow_nan=False))
        return
    packed = ", ".join(f"{name} {value:.3f}" for name, value in compressed.items())
    counted = f", {f.stride} scored in each" if f.stride else ""
    noun, count = "document" if held_out.data.kind == "text" else "example", metrics["documents"]
    ends = " including end-of-text" if held_out.data.kind == "text" and not held_out.is_masked else ""
    print(
        f"{f.data or held_out.data.source}: {num_bytes:,} bytes in {count:,} {noun}{'s' * (count != 1)}, "
        f"{metrics['tokens']:,.0f} tokens{ends}, in windows of {held_out.length}{counted}\n"
        f"loss {metrics['loss']:.4f} nats per token, perplexity {metrics['perplexity']:.2f}\n"
        f"{metrics['bits_per_byte']:.3f} bits per byte{packed and f' ({packed})'}"
    )


def _finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Replaces NaN and infinity, such as the perplexity of a diverged model, by None (null in JSON)."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


def _compare_text(f: cli.Flags, texts: list[_HeldOut], source: Any, compressed: dict[str, float]) -> None:
    from llm_jax import intervals
    from llm_jax.evaluation import paired

    measured = [_measure(f, held_out, source, by_unit=True) for held_out in texts]
    units = [metrics["units"] for metrics in measured]
    for held_out, other in zip(texts, units, strict=True):
        if len(other.sizes) != len(units[0].sizes) or (other.sizes != units[0].sizes).any():
            raise UserError(
                f"--checkpoint={texts[0].name} and --checkpoint={held_out.name} cannot be paired: their tokenizers "
                "divide the data into different examples"
            )
    accuracies = "accuracy" in measured[0]
    comparisons = paired.compare(units, proportions=accuracies)
    value = "accuracy" if accuracies else "bits_per_byte"
    if f.json:
        names = {"value": value, "units": "examples" if accuracies else "documents"}
        rows = [{names.get(key, key): v for key, v in row.items()} for row in comparisons]
        objects = [_finite({"checkpoint": h.name, **row}) for h, row in zip(texts, rows, strict=True)]
        print(json.dumps(objects, allow_nan=False))
        return
    columns = [(value.replace("_", " "), [f"{row['value']:.4f}" for row in comparisons])]
    if not accuracies:
        columns.insert(0, ("window", [f"{held_out.length:,}" for held_out in texts]))
        columns.insert(0, ("tokens", [f"{unit.targets:,}" for unit in units]))
    packed = "".join(f"; {name} {bits:.3f}" for name, bits in compressed.items())
    noun = "examples" if accuracies or texts[0].data.kind != "text" else "documents"
    left_out = len(units[0].sizes) - comparisons[0]["units"]
    missing = f" ({left_out:,} more do not fit into the windows)" if left_out else ""
    print(f"{f.data or texts[0].data.source}: {comparisons[0]['units']:,} {noun} measured by all{missing}{packed}")
    print(paired.table([held_out.name for held_out in texts], columns, comparisons, f"over the {noun}"))
    if any(row.get("low", 0) is None and math.isfinite(row["difference"]) for row in comparisons):
        print(
            f"no interval: the {comparisons[0]['units']:,} {noun} correspond to fewer than {intervals.FEWEST_UNITS} of "
            "equal size, because there are few or a few contain most of the bytes; --data=PATH measures another text"
        )


def on_task(f: cli.Flags) -> None:
    import numpy as np

    from llm_jax.evaluation import answers, builtin, paired
    from llm_jax.evaluation.prompts import PromptConfig
    from llm_jax.evaluation.templates import STYLES

    task = builtin.load_task(f.task)
    templates = range(len(task.templates)) if f.template == -1 else [f.template]
    configs = [
        PromptConfig(style, template, f.shots, f.select, f.shot_seed, f.chat, f.normalize, f.context)
        for style in (STYLES if f.style == "all" else [f.style])
        for template in templates
    ]
    for config in configs:
        config.check(task)
    count = min(f.limit or len(task.examples), len(task.examples))
    results: list[dict[str, Any]] = []  # one entry for each prompt and checkpoint
    by_checkpoint = [_ask(f, name, task, configs, count) for name in f.checkpoint]
    for config, *all_records in zip(configs, *by_checkpoint, strict=True):
        correct = [np.array([bool(record["right"]) for record in records]) for records in all_records]
        units = [paired.Units(right.astype(float), np.ones(count), np.ones(count, bool)) for right in correct]
        rows = paired.compare(units, proportions=True)
        for name, records, row in zip(f.checkpoint, all_records, rows, strict=True):
            result = {"checkpoint": name, "task": task.name, **dataclasses.asdict(config), **answers.summary(records)}
            if "difference" in row:
                result |= {f"difference_{key}": row[key] for key in ("low", "high")} | {"difference": row["difference"]}
            results.append(result)
    print(json.dumps(results) if f.json else answers.table(results))


def _ask(f: cli.Flags, name: str, task: Any, configs: list[Any], count: int) -> list[list[dict[str, Any]]]:
    """Returns, for each prompt in `configs`, the records of the first `count` examples in the order of the examples."""
    from llm_jax import checkpoints, tokenizers
    from llm_jax.evaluation import answers

    checkpoint = checkpoints.open(name, f.base)
    loaded = checkpoint.load(dtype=f.dtype, as_stored=f.as_stored, activations=f.activations, mesh=f.mesh)
    loaded = loaded._replace(tokenizer=tokenizers.with_chat_template(loaded.tokenizer, f.chat_template))
    weights = hashlib.sha256(checkpoint.identity.encode()).hexdigest()[:16]
    settings = {"checkpoint": name, "weights": weights, "task": task.digest()}
    precision = loaded.model.config.precision
    settings |= {"dtype": precision.params, "as_stored": f.as_stored}
    # Older records have none of the following keys.
    settings |= {"compute": precision.compute} if precision.compute != precision.params else {}
    settings |= {"activations": f.activations} if f.activations != "float" else {}
    settings |= {"chat_template": f.chat_template} if f.chat_template else {}
    directory = pathlib.Path(f.output) if f.output else None
    if directory and len(f.checkpoint) > 1:  # a directory for each checkpoint
        directory /= f"{f.checkpoint.index(name)}-{pathlib.Path(name).name}"
    return answers.records_by_prompt(loaded, task, configs, count, f.batch_size, directory, settings)


def on_harness(f: cli.Flags) -> None:
    from llm_jax import checkpoints
    from llm_jax.evaluation import harness

    if len(f.checkpoint) > 1:
        raise UserError("--harness evaluates one --checkpoint: the results of lm-eval cannot be paired")
    path = pathlib.Path(f.harness_path) if f.harness_path else None
    if path and not path.is_dir():
        raise UserError(f"--harness_path={path}: no such directory")
    checkpoint = checkpoints.open(f.checkpoint[0], f.base)
    loaded = checkpoint.load(dtype=f.dtype, as_stored=f.as_stored, activations=f.activations, mesh=f.mesh)
    results = harness.run(*loaded, f.harness.split(","), path, f.batch_size, f.limit)
    if f.json:
        print(json.dumps(results, default=str))
        return
    for name, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                print(f"{name:<24} {metric:<24} {value:.4f}")


COMMAND = cli.Command(
    "evaluate",
    main,
    FLAGS,
    needs=NEEDS,
    compiles=True,
    memory_hint="give a smaller --batch_size or a shorter --seq_len",
)

if __name__ == "__main__":
    cli.start(COMMAND)
