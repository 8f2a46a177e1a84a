"""A model as EleutherAI's lm-eval harness wants it, so that its catalogue of tasks runs on our checkpoints.

pip install lm-eval; it is imported only here, and only when asked for.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from llm_jax.decoding import score, stops
from llm_jax.decoding.complete import complete
from llm_jax.decoding.options import Options
from llm_jax.errors import UserError
from llm_jax.evaluation import ask
from llm_jax.model import positions
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers import Foreign, chat
from llm_jax.tokenizers.base import Tokenizer


def language_model(
    model: Transformer, params: Any, tokenizer: Tokenizer, batch_size: int = 8, context: int = 2048
) -> Any:
    """An `lm_eval.api.model.LM` of the model.

    Args:
      context: tokens of a request at most; longer ones lose their left end. A model with fewer positions has fewer.

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

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [self._pair(*request.args) for request in requests]
            return [(sum(one.log_probabilities), one.greedy) for one in score.score(model, params, pairs, batch_size)]

        def _pair(self, before: str, text: str) -> tuple[list[int], list[int]]:
            if before:
                head, tail = ask.split(tokenizer, before, text)
            else:
                head, tail = [], tokenizer.encode(text)
            tail = tail[-(context - 1) :]
            head = head[-(context - len(tail)) :] or _first(prefix)
            return head, tail

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            windows, owners = [], []
            for owner, request in enumerate(requests):
                ids = [*_first(prefix), *tokenizer.encode(request.args[0])]
                for window in rolling(ids, context):
                    windows.append(window)
                    owners.append(owner)
            totals = [0.0] * len(requests)
            for owner, one in zip(owners, score.score(model, params, windows, batch_size), strict=True):
                totals[owner] += sum(one.log_probabilities)
            return totals

        def generate_until(self, requests: list[Any]) -> list[str]:
            found: list[str] = []
            for request in requests:
                text, how = request.args
                until, limit = how.get("until") or [], min(how.get("max_gen_toks", 256), context - 1)
                options = Options(
                    temperature=how.get("temperature", 0.0) if how.get("do_sample") else 0.0,
                    top_p=how.get("top_p", 1.0) if how.get("do_sample") else 1.0,
                    max_new_tokens=limit,
                    stop=stops.possible(tokenizer, [until] if isinstance(until, str) else until, limit),
                    context=context,
                    truncate="left",
                )
                found.append(complete(model, params, tokenizer, [text], options)[0][0].text)
            return found

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if not isinstance(tokenizer, Foreign):
                raise UserError(f"a chat template is needed; this checkpoint's tokenizer is {tokenizer.kind}")
            return chat.render(tokenizer.special, chat_history, add_generation_prompt)

    return Adapter()


def rolling(ids: Sequence[int], context: int) -> list[tuple[list[int], list[int]]]:
    """Windows of `context` tokens in which every token but the first is predicted once, with all context there is."""
    found, start = [], 1
    while start < len(ids):
        end = min(start + context - 1 if start == 1 else start + context // 2, len(ids))
        begin = max(0, end - context)
        found.append((list(ids[begin:start]), list(ids[start:end])))
        start = end
    return found


def run(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    path: pathlib.Path | None = None,
    batch_size: int = 8,
    limit: int = 0,
) -> dict[str, Any]:
    """The harness's own results for some of its tasks: {task: {metric: value}}.

    Args:
      path: a directory with more task files.
      limit: examples of each task; 0: all.

    Raises:
      UserError: lm-eval is not installed, or does not know a task or cannot fetch it.
    """
    adapter = language_model(model, params, tokenizer, batch_size)
    import lm_eval
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_path=str(path) if path else None)
        found = lm_eval.simple_evaluate(adapter, tasks=list(tasks), task_manager=manager, limit=limit or None)
    except Exception as error:  # unknown names, data sets that cannot be fetched, faults in task files
        raise UserError(
            f"--harness={','.join(tasks)}: {str(error).splitlines()[0] if str(error) else error}"
        ) from error
    return found["results"]


def _first(prefix: int | None) -> list[int]:
    if prefix is None:
        raise UserError("an empty context needs a vocabulary with BOS or EOS to begin with")
    return [prefix]
