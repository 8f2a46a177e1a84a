"""The answers of a model to the examples of a task, and whether they are correct."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax import bars, files
from llm_jax.decoding import score, stops
from llm_jax.decoding.complete import complete, fit_to_context
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.evaluation import prompts as prompts_lib
from llm_jax.evaluation.prompts import NORMALIZERS, PromptConfig
from llm_jax.evaluation.tasks import Task
from llm_jax.evaluation.templates import STYLES, Example
from llm_jax.intervals import wilson
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers import Tokenizer

Model = tuple[Transformer, Any, Tokenizer]


class _Answer(NamedTuple):
    """The answer to an example, the number of generated tokens, and the scores of its choices (None if generated)."""

    text: str
    tokens: int
    scores: list[float] | None = None


def records(
    model: Model, task: Task, config: PromptConfig, indices: Sequence[int], batch_size: int = 8
) -> Iterator[dict[str, Any]]:
    """Evaluates the model on the examples with these indices and yields one record for each, in this order.

    Decoding is greedy. A record is {"index", "right", "prediction", "answer", "reasoning_tokens", "tokens"}. If choices
    are scored, it also has "scores": natural log-probabilities, normalized by `config.normalize`.

    Args:
      model: (model, params, tokenizer).

    Raises:
      UserError: an option is out of range for the task, or the tokenizer lacks a chat template that is needed.
    """
    config.check(task)
    answer = _choose if task.scoring == "likelihood" else _generate
    for first in range(0, len(indices), batch_size):
        batch = list(indices[first : first + batch_size])
        examples = [task.examples[i] for i in batch]
        texts, lengths = _prompts_after_reasoning(model, task, config, examples, batch_size)
        answers = answer(model, task, config, examples, texts, batch_size)
        for index, example, length, (text, tokens, scores) in zip(batch, examples, lengths, answers, strict=True):
            right = text == example.answer if scores else task.is_correct(text, example)
            record = {"index": index, "right": right, "prediction": text, "answer": example.answer}
            record |= {"reasoning_tokens": length, "tokens": tokens}
            yield record | ({"scores": scores} if scores else {})


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy with its 95 % interval (`wilson`), and the mean numbers of tokens of reasoning and answer."""
    count, right = len(records), sum(bool(record["right"]) for record in records)
    low, high = wilson(right, count)
    means = {key: sum(record[key] for record in records) / count for key in ("reasoning_tokens", "tokens")}
    return {"examples": count, "accuracy": right / count, "low": low, "high": high, **means}


class AnswerLog:
    """A file with a line of settings and one record per line, from which an interrupted evaluation resumes.

    Args:
      path: the file; None: records are kept in memory only.
      settings: all settings that the records depend on.

    Raises:
      UserError: the file has records with other settings, is not a file of records, or cannot be written.
    """

    def __init__(self, path: pathlib.Path | None, settings: Mapping[str, Any]):
        self.records: list[dict[str, Any]] = []
        self._path = path
        if path is None:
            return
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # an interruption may truncate the last line
        try:
            header, *self.records = [json.loads(line) for line in lines] or [dict(settings)]
        except ValueError as error:
            raise UserError(f"--output={path}: not a file of records ({error})") from error
        if header != dict(settings):
            other = [k for k in settings if not isinstance(header, dict) or header.get(k) != settings[k]]
            raise UserError(
                f"--output={path} contains the records of another evaluation ({', '.join(other)} differ); choose "
                "another directory"
            )
        with files.new_file(path, source=f"--output={path}:") as file:
            file.write("".join(f"{line}\n" for line in lines or [json.dumps(dict(settings))]).encode())

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _prompts_after_reasoning(
    model: Model, task: Task, config: PromptConfig, examples: Sequence[Example], batch_size: int
) -> tuple[list[str], list[int]]:
    """Returns (the prompts that the answers continue, including any reasoning; the number of reasoning tokens)."""
    template = task.templates[config.template]
    prompts = prompts_lib.prompts(task, config, examples)
    texts = prompts_lib.render(model[2], prompts, config.chat)
    if not prompts[0].reason:
        return texts, [0] * len(texts)
    # The reasoning ends where the model begins its conclusion or another example.
    ends = (template.separator, prompts[0].conclude) if template.separator else (prompts[0].conclude,)
    thoughts = _write(model, texts, config, task.reasoning_tokens, ends, batch_size)
    joined = zip(texts, thoughts, prompts, strict=True)
    texts = [text + thought.text.rstrip() + prompt.conclude for text, thought, prompt in joined]
    return texts, [thought.tokens for thought in thoughts]


def _generate(
    model: Model, task: Task, config: PromptConfig, examples: Sequence[Example], texts: Sequence[str], batch_size: int
) -> list[_Answer]:
    written = _write(model, texts, config, task.max_new_tokens, task.stop, batch_size)
    return [_Answer(task.extract_answer(answer.text), answer.tokens) for answer in written]


def _write(
    model: Model, texts: Sequence[str], config: PromptConfig, limit: int, stop: tuple[str, ...], batch_size: int
) -> list[_Answer]:
    """The greedy continuation of each text."""
    network, params, tokenizer = model
    stop = stops.fitting_stops(tokenizer, stop, limit)
    options = DecodingOptions(temperature=0, max_new_tokens=limit, stop=stop, context=config.context, truncate="left")
    rows = [prompts_lib.encode(tokenizer, text, config.chat) for text in texts]
    rows += [rows[-1]] * (batch_size - len(rows))  # a last, smaller batch would compile again
    completions = [first for first, *_ in complete(network, params, tokenizer, rows, options)]
    return [_Answer(completion.text, len(completion.generated.ids)) for completion in completions[: len(texts)]]


def _choose(
    model: Model, task: Task, config: PromptConfig, examples: Sequence[Example], texts: Sequence[str], batch_size: int
) -> list[_Answer]:
    """The most likely choice of each example."""
    network, params, tokenizer = model
    template = task.templates[config.template]
    pairs, divisors = [], []
    for example, text in zip(examples, texts, strict=True):
        for choice in example.choices:
            answer = template.solve(example, choice)
            if config.chat and not STYLES[config.style].reason:  # a turn has no leading space, as in the shots
                answer = answer.lstrip()
            head, tail = prompts_lib.encode_pair(tokenizer, text, answer, config.chat)
            head = fit_to_context(
                network, head, DecodingOptions(max_new_tokens=len(tail), context=config.context, truncate="left")
            )
            pairs.append((head, tail))
            divisors.append(NORMALIZERS[config.normalize](answer, tail))
    scored = score.score(network, params, pairs, batch_size)
    values = iter(sum(s.log_probabilities) / divisor for s, divisor in zip(scored, divisors, strict=True))
    answers = []
    for example in examples:
        scores = [next(values) for _ in example.choices]
        answers.append(_Answer(example.choices[scores.index(max(scores))], 0, scores))
    return answers


def records_by_prompt(
    model: Model,
    task: Task,
    configs: Sequence[PromptConfig],
    count: int,
    batch_size: int,
    directory: pathlib.Path | None,
    settings: Mapping[str, Any],
) -> list[list[dict[str, Any]]]:
    """Returns, for each prompt in `configs`, the records of the first `count` examples in the order of the examples.

    Args:
      directory: directory of an `AnswerLog` for each prompt; recorded examples are not evaluated again. None: no log.
      settings: settings that the records depend on in addition to the prompt.

    Raises:
      UserError: the log of a prompt has other settings, or cannot be read or written.
    """
    by_prompt: list[list[dict[str, Any]]] = []
    with bars.bar(total=count * len(configs), desc=task.name, leave=False, delay=2) as bar:
        for config in configs:
            path = directory / f"{task.name}-{config.style}-{config.template}.jsonl" if directory else None
            log = AnswerLog(path, {**settings, **dataclasses.asdict(config)})
            done = {record["index"] for record in log.records}
            bar.update(len(done))
            missing = [i for i in range(count) if i not in done]
            for record in records(model, task, config, missing, batch_size):
                log.add(record)
                bar.update()
            requested = (record for record in log.records if record["index"] < count)
            by_prompt.append(sorted(requested, key=lambda record: record["index"]))
    return by_prompt


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Formats results as a table with a row for each prompt and checkpoint.

    Args:
      results: mappings with "checkpoint", the values of a `PromptConfig` and of `summary`, and for all checkpoints
        except the first "difference", "difference_low" and "difference_high": the difference from the first, and the
        limits of its 95 % interval.
    """
    names = [row["checkpoint"] for row in results]
    width = max(map(len, ("checkpoint", *names))) if any("difference" in row for row in results) else 0
    head = f"{'style':<14} {'template':>8} {'examples':>8} {'accuracy':>8}  {'95 % interval':<14} {'tokens':>6}"
    lines = [
        f"{'checkpoint':<{width}}  {head}  difference from the first, 95 % interval over the examples"
        if width
        else head
    ]
    for row in results:
        tokens = row["reasoning_tokens"] + row["tokens"]
        line = (
            f"{row['style']:<14} {row['template']:>8} {row['examples']:>8} {row['accuracy']:>8.3f}  "
            f"{row['low']:.3f} to {row['high']:.3f} {tokens:>6.1f}"
        )
        if "difference" in row:
            interval = f"{row['difference_low']:+.3f} to {row['difference_high']:+.3f}"
            line += f"  {row['difference']:+.3f} ({interval})"
        lines.append(f"{row['checkpoint']:<{width}}  {line}" if width else line)
    return "\n".join(lines)
