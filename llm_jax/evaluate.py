"""Evaluates a checkpoint: held-out loss, perplexity and bits per byte, or its accuracy on a task.

python -m llm_jax.evaluate --checkpoint=runs/x [--data=FILE]
python -m llm_jax.evaluate --checkpoint=runs/x --task=arithmetic       # or a JSONL file of examples
python -m llm_jax.evaluate --checkpoint=runs/x --harness=piqa,hellaswag    # tasks of lm-eval
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from llm_jax import cli
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.string(
    "checkpoint",
    None,
    "checkpoint: a run, a Hugging Face directory, a .gguf file, a peft directory, asset:NAME or hf:ORG/NAME",
    required=True,
)
FLAGS.string("base", "", "with adapters: checkpoint of their base; default: the one that they name")
FLAGS.string(
    "data", "", "text to evaluate on, as data.source takes it; default: the held-out part of the run's own data"
)
FLAGS.string("kind", "", "with --data: its data.kind, e.g. instructions; default: that of the run, or text")
FLAGS.string("field", "", "with --data: the field of a record that holds its text; default: that of the run, or text")
FLAGS.integer("seq_len", 0, "tokens per window; default: train.seq_len of the run, or 512")
FLAGS.integer(
    "stride", 0, "sliding window: count only the last N targets of each window, e.g. 64; 0 counts all, without overlap"
)
FLAGS.integer("batch_size", 16, "number of windows, or of examples of a task, that are evaluated together")
FLAGS.boolean(
    "as_stored", False, "keep the quantized tensors of a .gguf file quantized instead of expanding them to floats"
)
FLAGS.boolean("json", False, "print one JSON object instead of text")
FLAGS.enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16"],
    "with --task or --harness: dtype of checkpoints that llm_jax did not train",
)
FLAGS.string("task", "", "task to measure accuracy on: arithmetic, copying, sentiment, or a JSONL file of examples")
FLAGS.string(
    "style",
    "zero_shot",
    "prompting style: zero_shot, few_shot, expert, cot_zero_shot or cot_few_shot; all evaluates each",
)
FLAGS.integer("template", 0, "index of the task's prompt template; -1 evaluates each")
FLAGS.integer("shots", -1, "number of solved examples in the prompt; -1: the number of the style")
FLAGS.string("select", "random", "how these examples are chosen: first, random or balanced (over the answers)")
FLAGS.integer("shot_seed", 0, "seed of the choice and the order of the examples in the prompt")
FLAGS.boolean("chat", False, "format prompts with the chat template of the tokenizer")
FLAGS.string("normalize", "none", "length normalization of the log-probabilities of choices: none, tokens or bytes")
FLAGS.integer(
    "context", 0, "maximum number of tokens of a prompt with its answer; 0: the number of positions of the model"
)
FLAGS.integer("limit", 0, "maximum number of examples to evaluate; 0: all")
FLAGS.string("output", "", "directory for one record per example; the same command resumes from them")
FLAGS.string("harness", "", "tasks of lm-eval, separated by commas, e.g. piqa,hellaswag (pip install lm-eval)")
FLAGS.string("harness_path", "", "directory with additional lm-eval tasks")

_OF_TASKS = ("style", "template", "shots", "select", "shot_seed", "chat", "normalize", "context", "output")
NEEDS: cli.Needs = (
    (_OF_TASKS, "--task is not given", lambda f: f.task),
    (("limit", "dtype"), "neither --task nor --harness is given", lambda f: f.task or f.harness),
    (("harness_path",), "--harness is not given", lambda f: f.harness),
    (("kind", "field"), "--data is not given", lambda f: f.data),
    (("seq_len", "stride"), "--task or --harness is given", lambda f: not (f.task or f.harness)),
)


def main(f: cli.Flags) -> None:
    if f.batch_size < 1 or f.seq_len < 0 or f.limit < 0:
        raise UserError(
            f"--batch_size={f.batch_size} --seq_len={f.seq_len} --limit={f.limit}; expected positive numbers"
        )
    if bool(f.task) + bool(f.harness) + bool(f.data) > 1:
        raise UserError("--task, --harness and --data are different evaluations; choose one")
    if f.task:
        on_task(f)
    elif f.harness:
        on_harness(f)
    else:
        on_text(f)


def on_text(f: cli.Flags) -> None:
    import jax

    from llm_jax import checkpoints, configuration
    from llm_jax.data import masking
    from llm_jax.data.kinds import open_source
    from llm_jax.data.rows import ROWS, Packed, Rows
    from llm_jax.evaluation import classification, held_out
    from llm_jax.model import transformer
    from llm_jax.training import losses

    checkpoint = checkpoints.open(f.checkpoint, f.base)
    model, params, tokenizer = checkpoint.load(scan_layers=True, as_stored=f.as_stored)
    config = checkpoint.run_config
    if config is None:
        if not f.data:
            raise UserError(f"{f.checkpoint} names no corpus of its own; give --data=FILE")
        data, length, hides = configuration.default("data"), f.seq_len or 512, False
    else:
        data, length, hides = config.data, f.seq_len or config.train.seq_len, config.loss.masked != "none"
    if not model.config.causal and not hides:
        raise UserError(f"{f.checkpoint} is a bidirectional model (model.causal=False); it sees what it would predict")
    transformer.check_length(model.config, length)
    if not 0 <= f.stride <= length:
        raise UserError(f"--stride={f.stride}; expected 0 to the window of {length} tokens")
    whole = bool(f.data)
    if f.data:
        data = dataclasses.replace(data, source=f.data, kind=f.kind or data.kind, field=f.field or data.field)
    if former := configuration.former_source(data.source):  # it names the test split of an asset
        data, whole = configuration.replace(data, former, "data."), False
    if hides and (f.stride or data.kind != "text"):
        raise UserError(f"{f.checkpoint} finds hidden tokens (loss.masked); it takes text, without --stride")
    source = open_source(data, whole)
    corpus = source.corpus(tokenizer)
    split = corpus.validation
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if split.choices:
        rows = Packed(corpus.test or split, length)
        accuracy = classification.accuracy(model, params, rows, f.batch_size, device)
        print(json.dumps(accuracy) if f.json else f"{data.source}: {classification.describe(accuracy)}")
        return
    loss = jax.jit(lambda params, batch: losses.language_model(model, params, batch, 0))
    if f.stride and data.kind != "text":
        raise UserError(f"--stride={f.stride}; examples (data.kind={data.kind}) are never cut")
    windows = Rows(split, length, f.stride) if f.stride else ROWS[data.kind](split, length)
    if config is not None and hides:
        windows = masking.hider(config.loss, tokenizer)(windows, 0)
    found = held_out.evaluate(loss, params, windows, f.batch_size, device)
    compressed = {} if hides else source.compressed_bits_per_byte()
    if f.json:
        print(json.dumps({**found, "compressed_bits_per_byte": compressed}))
        return
    packed = ", ".join(f"{name} {value:.3f}" for name, value in compressed.items())
    print(
        f"{f.data or data.source}: {split.num_bytes:,} bytes, "
        f"{found['tokens']:,.0f} tokens in windows of {length}{f', {f.stride} counted in each' if f.stride else ''}\n"
        f"loss {found['loss']:.4f} nats a token, perplexity {found['perplexity']:.2f}\n"
        f"{found['bits_per_byte']:.3f} bits per byte{packed and f' ({packed})'}"
    )


def on_task(f: cli.Flags) -> None:
    from tqdm import tqdm

    from llm_jax import checkpoints
    from llm_jax.evaluation import answers, builtin
    from llm_jax.evaluation.prompts import PromptConfig
    from llm_jax.evaluation.templates import STYLES

    task = builtin.named(f.task)
    templates = range(len(task.templates)) if f.template == -1 else [f.template]
    configs = [
        PromptConfig(style, template, f.shots, f.select, f.shot_seed, f.chat, f.normalize, f.context)
        for style in (STYLES if f.style == "all" else [f.style])
        for template in templates
    ]
    for config in configs:
        config.check(task)
    count = min(f.limit or len(task.examples), len(task.examples))
    checkpoint = checkpoints.open(f.checkpoint, f.base)
    loaded = checkpoint.load(dtype=f.dtype, as_stored=f.as_stored)
    weights = hashlib.sha256(checkpoint.identity.encode()).hexdigest()[:16]
    settings = {"checkpoint": f.checkpoint, "weights": weights, "task": task.digest()}
    settings |= {"dtype": f.dtype, "as_stored": f.as_stored}
    found: list[dict[str, Any]] = []
    with tqdm(total=count * len(configs), desc=task.name, leave=False, delay=2, disable=None) as bar:
        for config in configs:
            name = f"{task.name}-{config.style}-{config.template}.jsonl"
            log = answers.AnswerLog(
                pathlib.Path(f.output) / name if f.output else None, settings | dataclasses.asdict(config)
            )
            done = {record["index"] for record in log.records}
            bar.update(len(done))
            for record in answers.records(
                loaded, task, config, [i for i in range(count) if i not in done], f.batch_size
            ):
                log.add(record)
                bar.update()
            asked = [record for record in log.records if record["index"] < count]
            found.append({"task": task.name, **dataclasses.asdict(config), **answers.summary(asked)})
    if f.json:
        print(json.dumps(found))
        return
    print(f"{'style':<14} {'template':>8} {'examples':>8} {'accuracy':>8}  {'95 % interval':<14} {'tokens':>6}")
    for one in found:
        tokens = one["reasoning_tokens"] + one["tokens"]
        print(
            f"{one['style']:<14} {one['template']:>8} {one['examples']:>8} {one['accuracy']:>8.3f}  "
            f"{one['low']:.3f} to {one['high']:.3f} {tokens:>6.1f}"
        )


def on_harness(f: cli.Flags) -> None:
    from llm_jax import checkpoints
    from llm_jax.evaluation import harness

    path = pathlib.Path(f.harness_path) if f.harness_path else None
    if path and not path.is_dir():
        raise UserError(f"--harness_path={path}: no such directory")
    model, params, tokenizer = checkpoints.load(f.checkpoint, dtype=f.dtype, as_stored=f.as_stored, base=f.base)
    found = harness.run(model, params, tokenizer, f.harness.split(","), path, f.batch_size, f.limit)
    if f.json:
        print(json.dumps(found, default=str))
        return
    for name, metrics in found.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                print(f"{name:<24} {metric:<24} {value:.4f}")


COMMAND = cli.Command("evaluate", main, FLAGS, needs=NEEDS)

if __name__ == "__main__":
    cli.start(COMMAND)
