"""Tokenizing a corpus into the cache beside the `tokenizers` library called directly, in one run.

    PYTHONPATH=. python experiments/benchmarks/tokenizing.py [--megabytes=100] [--processes=2] [--rounds=3]

The corpus is the standard library's text, over and over, as JSON lines of about 2 kB. "cache" is all that a
first start does: scan, split, tokenize, put together, by this process and those that it starts. "library" has as
many processes that each read their share of the same lines, call `encode_batch` on 64 of them at a time
(single-threaded), take the ids and keep nothing; once more with `encode_batch_fast`, which finds no offsets into the
text and is what our tokenizers call. They take turns; ratios are medians over rounds. Peak memory is that of the
largest process of the cache's builds at a tenth of the size and at the whole. The table is written to tokenizing.json.
"""

import json
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time

import numpy as np
import tokenizers as library
from absl import flags

from llm_jax import cli, configuration
from llm_jax.data import catalog
from llm_jax.data.corpus import Source
from llm_jax.tokenizers.hub import HubTokenizer

HERE = pathlib.Path(__file__).parent
flags.DEFINE_integer("megabytes", 100, "size of the corpus")
flags.DEFINE_integer("processes", 2, "of either side")
flags.DEFINE_integer("rounds", 3, "turns that are counted")


def write_corpus(path: pathlib.Path, size: int) -> None:
    """Documents of about 2 kB of the standard library's text, each with its own first line."""
    found, _ = catalog.read("stdlib", "text", path.parent / "scans", 1)
    written, number = 0, 0
    with path.open("w") as file:
        while written < size:
            for i in range(len(found)):
                (text,) = found.texts(np.array([i]))
                for begin in range(0, len(text), 2000):
                    line = json.dumps({"text": f"{number}\n{text[begin : begin + 2000]}"}) + "\n"
                    number, written = number + 1, written + len(line)
                    file.write(line)
                    if written >= size:
                        return


def trained(path: pathlib.Path) -> str:
    """A byte-level byte-pair vocabulary of 8,192 on the first megabyte, as tokenizer.json."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(vocab_size=8192, show_progress=False, special_tokens=["<eos>"])
    with path.open() as file:
        made.train_from_iterator((json.loads(next(file))["text"] for _ in range(500)), trainer)
    return made.to_str()


def directly(path: str, begin: int, end: int, vocabulary: str, call: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = library.Tokenizer.from_str(vocabulary)
    with pathlib.Path(path).open("rb") as file:
        file.seek(begin)
        while file.tell() < end:
            texts = [json.loads(line)["text"] for _, line in zip(range(64), file, strict=False)]
            _ = [found.ids for found in getattr(tokenizer, call)(texts, add_special_tokens=False)]


def processor_seconds() -> float:
    """Of this process and all that have ended: on a machine shared with others, what the work itself takes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def in_processes(work, jobs) -> None:
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=work, args=job) for job in jobs]
    for process in running:
        process.start()
    for process in running:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a process ended with {process.exitcode}")


def cached(path: str, cache: str, processes: int, vocabulary: str) -> None:
    tokenizer = HubTokenizer(vocabulary, {"eos_token": "<eos>"})
    options = {"source": path, "cache_dir": cache, "workers": processes}
    Source(configuration.replace(configuration.default("data"), options, "data.")).corpus(tokenizer)


def noted(said: str, *job) -> None:
    """Builds the cache, and notes the peak memory of the largest process."""
    cached(*job)
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    pathlib.Path(said).write_text(json.dumps({"parent": peaks[0], "largest child": peaks[1]}))


def main() -> None:
    f = flags.FLAGS
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch)
        path = root / "corpus.jsonl"
        write_corpus(path, f.megabytes * 10**6)
        small = root / "small.jsonl"
        write_corpus(small, f.megabytes * 10**5)
        vocabulary = trained(path)
        with path.open("rb") as file:
            bounds = [0]
            for i in range(1, f.processes):
                file.seek(path.stat().st_size * i // f.processes)
                file.readline()
                bounds.append(file.tell())
        bounds.append(path.stat().st_size)
        shares = [(str(path), *bounds[i : i + 2], vocabulary) for i in range(f.processes)]
        seconds: dict[str, list[float]] = {"cache": [], "encode_batch": [], "encode_batch_fast": []}
        busy: dict[str, list[float]] = {name: [] for name in seconds}
        memory = {}
        for name, corpus in (("a tenth", small), ("whole", path)):
            said = root / "said.json"
            in_processes(noted, [(str(said), str(corpus), str(root / f"peak {name}"), f.processes, vocabulary)])
            memory[name] = json.loads(said.read_text())
        for turn in range(f.rounds):
            for name in seconds:
                start, used = time.perf_counter(), processor_seconds()
                if name == "cache":
                    cached(str(path), str(root / f"cache {turn}"), f.processes, vocabulary)
                else:
                    in_processes(directly, [(*share, name) for share in shares])
                seconds[name].append(time.perf_counter() - start)
                busy[name].append(processor_seconds() - used)
            print(
                f"turn {turn}: "
                + ", ".join(f"{name} {s[-1]:.1f} s ({busy[name][-1]:.1f} busy)" for name, s in seconds.items()),
                flush=True,
            )
    ratios = {
        f"{name}, {what}": statistics.median(a / b for a, b in zip(of["cache"], of[name], strict=True))
        for name in ("encode_batch", "encode_batch_fast")
        for what, of in (("clock", seconds), ("processor", busy))
    }
    found = {
        "megabytes": f.megabytes,
        "processes": f.processes,
        "seconds": seconds,
        "processor seconds": busy,
        "cache / library": ratios,
        "peak_mebibytes": memory,
        "python": sys.version.split()[0],
        "tokenizers": library.__version__,
    }
    (HERE / "tokenizing.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"cache / library: {ratios}; {memory}")


if __name__ == "__main__":
    cli.run_script(main)
