"""Benchmarks of a machine with an NVIDIA GPU, in under eight minutes: `python -m experiments.benchmarks.gpu`.

Products with quantized weights by XLA and by the kernel in Pallas, training with cuDNN's attention and without, LoRA,
QLoRA and decoding, beside torch, peft, bitsandbytes and transformers where they are installed. Needs JAX for CUDA: pip
install 'jax[cuda13]'. Writes gpu.json and the tables of README.md. `--only`, `--rounds`, `--peer_python` and `--output`
are those of `python -m experiments.benchmarks`.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping

from absl import flags

from experiments.benchmarks import __main__ as command
from experiments.benchmarks import suites
from experiments.benchmarks.decoding import MODEL
from experiments.benchmarks.runner import Measure, Side
from experiments.benchmarks.training import PLAIN
from llm_jax import cli
from llm_jax.errors import UserError
from llm_jax.kernels import native, pallas

flags.DEFINE_float("seconds", 400.0, "no further measure is begun after this time")
flags.DEFINE_bool("check", False, "say whether this machine can run it, and measure nothing")

ROWS, LENGTH = 8, 1024
_PALLAS = {native.SETTING: pallas.SETTING}
_SIZES = {"rows": ROWS, "length": LENGTH}
_PEER = {"model": suites.MODEL_PATH + "hf", "dtype": "bfloat16", **_SIZES}


def _ours(changes: Mapping[str, object]) -> dict[str, object]:
    plain = {**PLAIN, "init_from": MODEL, "model.precision.compute": "bfloat16", "model.scan_layers": True}
    return {"recipe": "default", "changes": plain | dict(changes), **_SIZES}


def measures() -> list[Measure]:
    """In the order of their weight, for a machine on which the time is over."""
    note = f"SmolLM2-135M, {ROWS} x {LENGTH} tokens, bfloat16 products, AdamW. A turn is one step."
    peers = ("torch eager", "torch.compile")
    adapters = {"lora.rank": 8, "lora.alpha": 16.0}
    peer_adapters = _PEER | {"rank": 8}
    formats = ("bfloat16", "int8", "int4", "nf4")
    decoding = {"batches": [1, 16]}
    transformers = {**decoding, "model": suites.MODEL_PATH + "hf", "dtype": "bfloat16"}
    return [
        Measure(
            "products",
            "Products with quantized weights",
            "bfloat16 activations times a weight of 4096 x 4096, by XLA and by the kernel in Pallas, which has up to "
            "64 rows. The relative error is beside the float32 product with the expanded weight.",
            (
                suites.BOUNDS,
                *(
                    Side(
                        name,
                        "products:llm_jax",
                        {"scheme": name, "rows": [1, 16, 4096]},
                        rivals=("bfloat16",) if name != "bfloat16" else (),
                    )
                    for name in formats
                ),
                *(
                    Side(
                        f"{name}, Pallas",
                        "products:llm_jax",
                        {"scheme": name, "rows": [1, 16, 64]},
                        rivals=("bfloat16", name),
                        environment=_PALLAS,
                    )
                    for name in formats[1:]
                ),
            ),
            5,
        ),
        Measure(
            "training",
            "A training step over all weights",
            note,
            (
                suites.BOUNDS,
                Side(
                    "llm_jax, cuDNN attention",
                    "training:llm_jax",
                    _ours({}),
                    rivals=(*peers, "llm_jax, plain attention"),
                ),
                Side("llm_jax, plain attention", "training:llm_jax", _ours({"model.attention_kernel": "plain"})),
                Side("torch eager", "training:torch", _PEER, peer=True),
                Side("torch.compile", "training:torch", _PEER | {"compile": True}, peer=True),
            ),
            5,
            warm_up=2,
            same_loss=1e-2,
        ),
        Measure(
            "qlora",
            "A QLoRA step",
            note + " Rank 8 on all linear layers, over NF4 weights with double quantization.",
            (
                suites.BOUNDS,
                Side(
                    "llm_jax",
                    "training:llm_jax",
                    _ours(adapters | {"quant.scheme": "nf4", "quant.head": ""}),
                    rivals=("peft + bitsandbytes",),
                ),
                Side("peft + bitsandbytes", "training:torch", peer_adapters | {"nf4": True}, peer=True),
            ),
            5,
            warm_up=2,
        ),
        Measure(
            "decode",
            "Decoding and prefill",
            "SmolLM2-135M, greedy, 32 tokens after a prompt of 16, with 1 or 16 rows; prefill of 512 tokens.",
            (
                suites.BOUNDS,
                *(
                    Side(
                        f"llm_jax {name}",
                        "decoding:llm_jax",
                        decoding | {"weights": name},
                        rivals=(f"transformers {name}",) if name in ("bfloat16", "nf4") else ("llm_jax bfloat16",),
                    )
                    for name in formats
                ),
                *(
                    Side(
                        f"llm_jax {name}, Pallas",
                        "decoding:llm_jax",
                        decoding | {"weights": name},
                        rivals=(f"llm_jax {name}",),
                        environment=_PALLAS,
                    )
                    for name in formats[1:]
                ),
                Side("transformers bfloat16", "decoding:transformers", transformers, peer=True),
                Side("transformers nf4", "decoding:transformers", transformers | {"nf4": True}, peer=True),
            ),
            3,
        ),
        Measure(
            "lora",
            "A LoRA step",
            note + " Rank 8 on all linear layers.",
            (
                suites.BOUNDS,
                Side("llm_jax", "training:llm_jax", _ours(adapters), rivals=("peft",)),
                Side("peft", "training:torch", peer_adapters, peer=True),
            ),
            5,
            warm_up=2,
            same_loss=1e-2,
        ),
    ]


def missing() -> str:
    """What this machine lacks, or ""."""
    if not shutil.which("nvidia-smi"):
        return "nvidia-smi is not found: this machine has no NVIDIA GPU, or no driver for it"
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout.strip():
        return "nvidia-smi lists no GPU"
    script = "import jax; print(jax.default_backend())"  # in a process that ends, or it would keep the GPU's memory
    backend = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout.strip()
    return "" if backend == "gpu" else f"JAX runs on {backend or 'nothing'} here; pip install 'jax[cuda13]'"


def main() -> None:
    f = flags.FLAGS
    if lacking := missing():
        raise UserError(f"the GPU benchmarks need an NVIDIA GPU and JAX for CUDA: {lacking}")
    if f.check:
        print("this machine can run the GPU benchmarks")
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the sides share the GPU
    output = pathlib.Path(f.output or command.HERE / "gpu.json")
    begin = time.monotonic()
    left = command.select(measures(), f.only)
    while left and time.monotonic() - begin < f.seconds:
        command.measure([left.pop(0)], output)
    if left:
        print(f"not measured within {f.seconds:.0f} s: {', '.join(measure.name for measure in left)}")
    print(json.dumps({"seconds": round(time.monotonic() - begin), "results": str(output)}))
    if not f.output:
        command.render(command.HERE / "README.md", command.SPEED, command.HERE / "cpu.png")


if __name__ == "__main__":
    cli.run_script(main)
