"""Tokenizing a corpus into the cache beside the `tokenizers` library called directly.

The corpus is the standard library's text, over and over, as JSON lines of about 2 kB. "cache" is all that a first start
does: scan, split, tokenize, put together. "library" has as many processes that each read their share of the same lines
and call `encode_batch` or `encode_batch_fast` (without offsets) on 64 of them at a time, and keep nothing.
"""

import json
import multiprocessing
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.worker import Job


def cache(megabytes: int, processes: int) -> Job:
    """Builds the token cache of the corpus, a new one in every turn."""
    directory = tempfile.TemporaryDirectory()
    corpus, vocabulary = _corpus(pathlib.Path(directory.name), megabytes)

    def turn(number: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as target:
            figures = _timed(megabytes, lambda: _build(corpus, target, processes, vocabulary))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        return figures | {"largest child, MiB": peak}

    return Job(turn, _software(), {"corpus MB": megabytes}, directory)


def library(megabytes: int, processes: int, call: str) -> Job:
    """Calls the method `call` of the library's tokenizer."""
    directory = tempfile.TemporaryDirectory()
    corpus, vocabulary = _corpus(pathlib.Path(directory.name), megabytes)
    size = corpus.stat().st_size
    bounds = [0]
    with corpus.open("rb") as file:
        for i in range(1, processes):
            file.seek(size * i // processes)
            file.readline()
            bounds.append(file.tell())
    shares = [(str(corpus), a, b, vocabulary, call) for a, b in zip(bounds, [*bounds[1:], size], strict=True)]

    def turn(number: int) -> dict[str, float]:
        return _timed(megabytes, lambda: _in_processes(_encode, shares))

    return Job(turn, _software(), {"corpus MB": megabytes}, directory)


def _software() -> str:
    import tokenizers

    return f"tokenizers {tokenizers.__version__}"


def _timed(megabytes: int, work: Callable[[], object]) -> dict[str, float]:
    """MB/s on the clock, and of the CPU time of this process and of its children that have ended."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    start, used = time.perf_counter(), cpu()
    work()
    return {
        "MB/s": megabytes / (time.perf_counter() - start),
        "MB/s of CPU time": megabytes / max(cpu() - used, 1e-9),
    }


def _corpus(directory: pathlib.Path, megabytes: int) -> tuple[pathlib.Path, str]:
    """The file, and a byte-level byte-pair vocabulary of 8,192 of its first megabyte, as the text of tokenizer.json."""
    import numpy as np
    import tokenizers

    from llm_jax.data import catalog

    path = directory / "corpus.jsonl"
    documents, _ = catalog.read("stdlib", "text", str(directory), 1)
    texts = [text for i in range(len(documents)) for text in documents.texts(np.array([i]))]
    pieces = [text[begin : begin + 2000] for text in texts for begin in range(0, len(text), 2000)]
    written, number = 0, 0
    with path.open("w") as file:
        while written < megabytes * 10**6:
            line = json.dumps({"text": f"{number}\n{pieces[number % len(pieces)]}"}) + "\n"
            number, written = number + 1, written + len(line)
            file.write(line)
    model: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, show_progress=False, special_tokens=["<eos>"])
    model.train_from_iterator(pieces[:500], trainer)
    return path, model.to_str()


def _build(corpus: pathlib.Path, target: str, processes: int, vocabulary: str) -> None:
    from llm_jax import configuration
    from llm_jax.data.corpus import Source
    from llm_jax.tokenizers.hub import HubTokenizer

    options = {"source": str(corpus), "cache_dir": target, "workers": processes}
    tokenizer = HubTokenizer(vocabulary, {"eos_token": "<eos>"})
    Source(configuration.replace(configuration.default("data"), options, "data.")).corpus(tokenizer)


def _encode(path: str, begin: int, end: int, vocabulary: str, call: str) -> None:
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizers.Tokenizer.from_str(vocabulary)
    with pathlib.Path(path).open("rb") as file:
        file.seek(begin)
        while file.tell() < end:
            texts = [json.loads(line)["text"] for _, line in zip(range(64), file, strict=False)]
            _ = [encoding.ids for encoding in getattr(tokenizer, call)(texts, add_special_tokens=False)]


def _in_processes(work: Callable[..., None], jobs: list[tuple]) -> None:
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=work, args=job) for job in jobs]
    for process in running:
        process.start()
    for process in running:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process ended with exit code {process.exitcode}")
