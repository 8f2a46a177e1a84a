"""Time from the start of a command to its first token. Every turn starts a process that generates one token.

python -m experiments.benchmarks.starting transformers DIRECTORY     the process of a peer
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from experiments.benchmarks.decoding import MODEL
from experiments.benchmarks.worker import Job

TEXT = "The capital of France is"


def llm_jax(cached: bool) -> Job:
    """`llm_jax.generate`, with an empty cache of compiled functions in every turn, or one that the warm-up fills."""
    command = [sys.executable, "-m", "llm_jax.generate", f"--checkpoint={MODEL}", "--max_new_tokens=1"]
    shared = tempfile.TemporaryDirectory()

    def turn(number: int) -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            cache = shared.name if cached else stack.enter_context(tempfile.TemporaryDirectory())
            settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
            return first_token([*command, f"--prompt={TEXT}"], settings | {"JAX_ENABLE_COMPILATION_CACHE": "true"})

    return Job(turn, "llm_jax.generate", {}, shared)


def peer(kind: str, model: str) -> Job:
    """transformers or llama_cpp."""
    __import__(kind)
    command = [sys.executable, "-m", "experiments.benchmarks.starting", kind, model]
    return Job(lambda number: first_token(command, {}), kind)


def first_token(command: Sequence[str], settings: dict[str, str]) -> dict[str, float]:
    """Runs a command; the figures "seconds" until its first output, "CPU seconds" and "peak MiB" of its process."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | settings)
    assert process.stdout is not None
    text = process.stdout.read(1)
    seconds = time.perf_counter() - begin
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if not text or process.returncode:
        raise RuntimeError(f"{command[2]} ended with exit code {process.returncode}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "CPU seconds": cpu_seconds, "peak MiB": usage.ru_maxrss / 1024}


def main() -> None:
    kind, path = sys.argv[1:]
    if kind == "transformers":
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        net = transformers.AutoModelForCausalLM.from_pretrained(path)
        tokens = net.generate(**tokenizer(TEXT, return_tensors="pt"), max_new_tokens=1, do_sample=False)
        print(tokenizer.decode(tokens[0, -1:]), flush=True)
    else:
        import llama_cpp

        net = llama_cpp.Llama(path, n_ctx=1024, verbose=False)
        print(net(TEXT, max_tokens=1, temperature=0.0)["choices"][0]["text"], flush=True)


if __name__ == "__main__":
    main()
