"""The model of the benchmarks in the formats of the peers, converted once and kept."""

import pathlib
import subprocess
import sys

from experiments.benchmarks.decoding import MODEL
from llm_jax.data import assets

CACHE = pathlib.Path("~/.cache/llm_jax/benchmarks").expanduser()


def path(name: str) -> str:
    """The path of "hf" (a Hugging Face directory), "stored" (the .gguf file as published), or "gguf:FORMAT"."""
    if name == "stored":
        return str(assets.path(MODEL.removeprefix("asset:")))
    kind, _, encoding = name.partition(":")
    target = CACHE / (f"smollm2-135m-instruct.{encoding}.gguf" if encoding else "smollm2-135m-instruct")
    if not target.exists():
        print(f"converting the model to {name}", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "llm_jax.convert", f"--input={MODEL}", f"--output={target}", f"--to={kind}"]
        if encoding:
            command.append(f"--format={encoding}")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(target)
