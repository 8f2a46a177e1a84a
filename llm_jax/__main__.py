"""`python -m llm_jax` and `llm-jax`: list the commands, and run one as `llm-jax NAME`."""

import difflib
import importlib
import sys
from typing import NoReturn

from llm_jax import cli

COMMANDS = {
    "train": "train a model, or resume a run",
    "evaluate": "held-out loss, perplexity and bits per byte of a checkpoint, or its accuracy in a task",
    "generate": "continue a prompt, or answer it, with a checkpoint",
    "chat": "start a conversation with a checkpoint in the terminal",
    "quantize": "quantize the weights of a checkpoint to 8 or fewer bits",
    "convert": "write a checkpoint as Hugging Face, GGUF or peft files",
    "plan": "memory, FLOPs and time of a training step, without running it",
    "kernels": "the kernels for quantized weights on this machine, and their speed",
    "sweep": "train every point of a grid of overrides",
    "compare": "options, metrics and paired differences of runs, in the terminal",
    "report": "an HTML report about runs: tables, curves, parallel coordinates, samples",
    "show": "pictures of a model: tokens, rows, attention, positions, embeddings, quantization, updates, probabilities",
    "tokenize": "tokenize a corpus into the token cache, on this machine or on a Ray cluster",
    "train_tokenizer": "train a tokenizer of any kind",
    "train_embeddings": "train word vectors by word2vec or GloVe",
    "probe_embeddings": "neighbours, analogies, human ratings and a map of word vectors",
    "launch": "start a command on a cluster: Slurm, Kubernetes, a Cloud TPU slice",
    "assets": "models and texts by name: list, fetch, verify",
}
# {name in other codebases: command}
OTHER_NAMES = {
    "benchmark": "kernels",
    "export": "convert",
    "finetune": "train",
    "infer": "generate",
    "inference": "generate",
    "merge": "convert",
    "plot": "report",
    "run": "generate",
    "sample": "generate",
    "test": "evaluate",
    "visualize": "show",
}


def main() -> None:
    """Runs `llm-jax NAME ...` as `python -m llm_jax.NAME ...`."""
    name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(
            "usage: llm-jax COMMAND [--FLAG=VALUE ...], or python -m llm_jax.COMMAND; COMMAND --help lists its flags\n"
        )
        for command, purpose in COMMANDS.items():
            print(f"  {command:<18} {purpose}")
        return
    if name not in COMMANDS:
        exit_unknown(name)
    cli.start(importlib.import_module(f"llm_jax.{name}").COMMAND, arguments)


def exit_unknown(name: str) -> NoReturn:
    """Exits with code 2 and the command that `name` may mean."""
    near = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
    print(f"error: unknown command '{name}'; {hint}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
