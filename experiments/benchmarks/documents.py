"""What a document costs in memory: scan, build and opening of the token cache, as the documents become more.

    PYTHONPATH=. python experiments/benchmarks/documents.py [--documents=200000,1000000] [--workers=1]

JSON lines of some 40 bytes each, byte tokens. A process goes through the stages of a first start, another one through
those of a second start; from outside, their anonymous memory (RssAnon: not that of mapped files, which the system
takes back as it likes) is read every few milliseconds, together with that of the processes they start. Of each stage
the largest sum counts. "A document" is what the largest corpus takes above the one before, divided by their
difference. The table is written to documents.json.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from absl import flags

from llm_jax import cli

HERE = pathlib.Path(__file__).parent
STAGES = ("scan", "build", "open")
flags.DEFINE_list("documents", ["200000", "1000000"], "sizes of the corpus")
flags.DEFINE_integer("workers", 1, "data.workers")

CHILD = """
import pathlib, sys
path, cache, workers, kind = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

def stage(name):
    print(name, flush=True)

if __name__ == "__main__":
    from llm_jax import configuration, tokenizers
    from llm_jax.data import rows
    from llm_jax.data.corpus import Source
    tokenizer = tokenizers.get("byte").train([], 0)
    stage("scan")
    options = {"source": path, "kind": kind, "cache_dir": cache, "workers": workers}
    source = Source(configuration.replace(configuration.default("data"), options, "data."))
    stage("build")
    corpus = source.corpus(tokenizer)
    stage("open")
    found = rows.Shuffled(rows.ROWS[kind](corpus.train, 256), 0)
    for i in range(2000):
        found[i]
    stage("end")
"""


def write_corpus(path: pathlib.Path, documents: int) -> None:
    with path.open("w") as file:
        for i in range(documents):
            file.write(f'{{"text": "document {i}, {"x" * (i * 7919 % 20)}"}}\n')


def anonymous(pid: int) -> int:
    """Bytes of a process and all that it has started."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", status)
    return 1024 * int(found[1] if found else 0) + sum(anonymous(int(child)) for child in children)


def start(script: pathlib.Path, *given: object) -> dict[str, int]:
    """The peak of each stage of a process, and what it had before the first."""
    said = script.with_suffix(".out")
    with said.open("w") as out:
        process = subprocess.Popen([sys.executable, str(script), *map(str, given)], stdout=out)
    peaks = dict.fromkeys(("begin", *STAGES), 0)
    stage = "begin"
    while process.poll() is None:
        now = anonymous(process.pid)
        written = said.read_text().split()
        stage = written[-1] if written and written[-1] != "end" else stage
        peaks[stage] = max(peaks[stage], now)
        time.sleep(0.004)
    if process.returncode:
        raise SystemExit(f"{script} ended with {process.returncode}")
    return peaks


def main() -> None:
    f = flags.FLAGS
    sizes = [int(n) for n in f.documents]
    found: dict[str, dict[str, dict[str, int]]] = {}
    for documents in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            root = pathlib.Path(scratch)
            script, corpus, cache = root / "child.py", root / "corpus.jsonl", root / "cache"
            script.write_text(CHILD)
            write_corpus(corpus, documents)
            time.sleep(2.1)  # a file that has just changed is not remembered
            found[str(documents)] = {
                name: start(script, corpus, cache, f.workers, "text") for name in ("first start", "second start")
            }
            print(documents, found[str(documents)], flush=True)
    less, more = sizes[-2:]
    a_document = {
        name: {
            stage: round((found[str(more)][name][stage] - found[str(less)][name][stage]) / (more - less), 2)
            for stage in STAGES
            if found[str(more)][name][stage] and found[str(less)][name][stage]  # 0: it was over before it was looked at
        }
        for name in ("first start", "second start")
    }
    table = {"workers": f.workers, "anonymous_bytes": found, "bytes_a_document": a_document}
    print(json.dumps(a_document))
    (HERE / "documents.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    cli.run_script(main)
