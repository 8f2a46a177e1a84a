"""Runs the tasks of EleutherAI's lm-eval harness on a checkpoint: pip install lm-eval."""

import pathlib
from collections.abc import Sequence
from typing import Any

from llm_jax.decoding import score, stops
from llm_jax.decoding.complete import complete
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.evaluation import prompts
from llm_jax.model import positions
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers import Tokenizer


def language_model(
    model: Transformer, params: Any, tokenizer: Tokenizer, batch_size: int = 8, context: int = 2048
) -> Any:
    """Wraps the model as an `lm_eval.api.model.LM`.

    After lm-eval has called `apply_chat_template`, contexts are rendered conversations, and the names of special tokens
    in them are converted to their ids.

    Args:
      context: maximum number of tokens of a request, bounded by the maximum length of the model; longer requests are
        truncated on the left.

    Raises:
      UserError: the package lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError("the harness needs the package lm-eval; pip install lm-eval") from error
    context = min(context, positions.make(model.config).max_length() or context)
    prefix = next((i for i in (tokenizer.bos, tokenizer.eos) if i is not None), None)

    class Adapter(LM):
        tokenizer_name = tokenizer.kind
        rendered = False  # whether contexts come from the chat template

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [self._pair(*request.args) for request in requests]
            scores = score.score(model, params, pairs, batch_size)
            return [(sum(scored.log_probabilities), scored.greedy) for scored in scores]

        def _pair(self, before: str, text: str) -> tuple[list[int], list[int]]:
            if before:
                head, tail = prompts.encode_pair(tokenizer, before, text, self.rendered)
            else:
                head, tail = [], tokenizer.encode(text)
            tail = tail[-(context - 1) :]
            head = head[-(context - len(tail)) :] or _first(prefix)
            return head, tail

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            windows, owners = [], []
            for owner, request in enumerate(requests):
                ids = [*_first(prefix), *tokenizer.encode(request.args[0])]
                for window in rolling_windows(ids, context):
                    windows.append(window)
                    owners.append(owner)
            totals = [0.0] * len(requests)
            for owner, scored in zip(owners, score.score(model, params, windows, batch_size), strict=True):
                totals[owner] += sum(scored.log_probabilities)
            return totals

        def generate_until(self, requests: list[Any]) -> list[str]:
            texts: list[str] = []
            for request in requests:
                text, settings = request.args
                until, limit = settings.get("until") or [], min(settings.get("max_gen_toks", 256), context - 1)
                options = DecodingOptions(
                    temperature=settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0,
                    top_p=settings.get("top_p", 1.0) if settings.get("do_sample") else 1.0,
                    max_new_tokens=limit,
                    stop=stops.fitting_stops(tokenizer, [until] if isinstance(until, str) else until, limit),
                    context=context,
                    truncate="left",
                )
                ids = prompts.encode(tokenizer, text, self.rendered)
                texts.append(complete(model, params, tokenizer, [ids], options)[0][0].text)
            return texts

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            self.rendered = True
            return prompts.render_chat(tokenizer, [chat_history], add_generation_prompt)[0]

    return Adapter()


def rolling_windows(ids: Sequence[int], context: int) -> list[tuple[list[int], list[int]]]:
    """Splits a text into (head, tail) windows of at most `context` tokens. Every token except the first is in one tail.

    The head of a window is the context of its tail; it has at least half of `context` tokens if as many precede it.
    """
    windows, start = [], 1
    while start < len(ids):
        end = min(start + context - 1 if start == 1 else start + context // 2, len(ids))
        begin = max(0, end - context)
        windows.append((list(ids[begin:start]), list(ids[start:end])))
        start = end
    return windows


def run(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    path: pathlib.Path | None = None,
    batch_size: int = 8,
    limit: int = 0,
) -> dict[str, Any]:
    """Runs tasks of lm-eval and returns {task: {metric: value}}.

    Args:
      path: a directory with additional task files.
      limit: maximum number of examples per task; 0: all.

    Raises:
      UserError: lm-eval is not installed, has no such task, or cannot fetch its data.
    """
    adapter = language_model(model, params, tokenizer, batch_size)
    import lm_eval
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_path=str(path) if path else None)
        evaluation = lm_eval.simple_evaluate(adapter, tasks=list(tasks), task_manager=manager, limit=limit or None)
    except Exception as error:  # unknown names, data sets that cannot be fetched, invalid task files
        raise UserError(
            f"--harness={','.join(tasks)}: {str(error).splitlines()[0] if str(error) else error}"
        ) from error
    return evaluation["results"]


def _first(prefix: int | None) -> list[int]:
    if prefix is None:
        raise UserError("lm-eval passes an empty context, which needs a tokenizer with BOS or EOS")
    return [prefix]
