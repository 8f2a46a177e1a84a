"""What a document costs in memory: scan, build and opening of the token cache, as the documents become more.

    python -m experiments.benchmarks.documents CORPUS CACHE WORKERS     the stages of a start, in a process of their own

JSON lines of some 40 bytes each, byte tokens. Of each stage the largest anonymous memory counts (RssAnon, which leaves
out mapped files), that of the processes it starts included, read every few milliseconds from outside.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from experiments.benchmarks.worker import Job

STAGES = ("scan", "build", "open")
STARTS = ("first start", "second start")


def llm_jax(documents: Sequence[int], workers: int) -> Job:
    """A turn measures corpora of two sizes; "bytes per document" is the difference of their peaks per document."""
    fewer, more = documents

    def turn(number: int) -> dict[str, float]:
        peaks = {size: _starts(size, workers) for size in documents}
        figures: dict[str, float] = {}
        for name in peaks[fewer]:
            figures |= {f"{name}, {size:,} documents, MiB": peaks[size][name] / 2**20 for size in documents}
            if peaks[fewer][name] and peaks[more][name]:  # 0: over before it was looked at
                figures[f"{name}, bytes per document"] = (peaks[more][name] - peaks[fewer][name]) / (more - fewer)
        return figures | {"peak MiB": max(max(of_size.values()) for of_size in peaks.values()) / 2**20}

    return Job(turn, f"Python {sys.version.split()[0]}")


def _starts(documents: int, workers: int) -> dict[str, int]:
    """Bytes at the peak of every stage of a first and a second start: {"first start: scan": ...}."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus, cache = pathlib.Path(scratch) / "corpus.jsonl", pathlib.Path(scratch) / "cache"
        with corpus.open("w") as file:
            for i in range(documents):
                file.write(f'{{"text": "document {i}, {"x" * (i * 7919 % 20)}"}}\n')
        time.sleep(2.1)  # a file that has just changed is not remembered
        return {
            f"{start}: {stage}": peak
            for start in STARTS
            for stage, peak in _peaks(corpus, cache, workers).items()
            if stage in STAGES
        }


def _peaks(corpus: pathlib.Path, cache: pathlib.Path, workers: int) -> dict[str, int]:
    log = corpus.with_suffix(".log")
    command = [sys.executable, "-m", "experiments.benchmarks.documents", str(corpus), str(cache), str(workers)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out)
    peaks = dict.fromkeys(("begin", *STAGES, "end"), 0)
    while process.poll() is None:
        memory = _anonymous(process.pid)
        stage = (log.read_text().split() or ["begin"])[-1]
        peaks[stage] = max(peaks[stage], memory)
        time.sleep(0.004)
    if process.returncode:
        raise RuntimeError(f"the process of the stages ended with exit code {process.returncode}")
    return peaks


def _anonymous(pid: int) -> int:
    """Bytes of a process and of all that it has started."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+)", status)
    return 1024 * int(match[1] if match else 0) + sum(_anonymous(int(child)) for child in children)


def main() -> None:
    from llm_jax import configuration, tokenizers
    from llm_jax.data import rows
    from llm_jax.data.corpus import Source

    corpus_path, cache, workers = sys.argv[1:]
    tokenizer = tokenizers.get("byte").train([], 0)
    print("scan", flush=True)
    options = {"source": corpus_path, "kind": "text", "cache_dir": cache, "workers": int(workers)}
    source = Source(configuration.replace(configuration.default("data"), options, "data."))
    print("build", flush=True)
    corpus = source.corpus(tokenizer)
    print("open", flush=True)
    shuffled = rows.Shuffled(rows.ROWS["text"](corpus.train, 256), 0)
    for i in range(2000):
        shuffled[i]
    print("end", flush=True)


if __name__ == "__main__":
    main()
