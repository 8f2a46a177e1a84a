"""The measures of every suite, as data."""

import os
from collections.abc import Mapping
from typing import Any

from experiments.benchmarks.decoding import MODEL
from experiments.benchmarks.runner import Measure, Side
from experiments.benchmarks.training import PLAIN

# Options of a side whose value starts with this are paths of the model in another format; see `models.path`.
MODEL_PATH = "model:"
_HF = MODEL_PATH + "hf"
BOUNDS = Side("bounds", "machine:bounds")
_QLORA_HEAD = ""  # bitsandbytes leaves embeddings and head as they are


def _ours(rows: int, length: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `training.llm_jax` over the weights of the model."""
    return {"recipe": "default", "changes": {**PLAIN, "init_from": MODEL, **changes}, "rows": rows, "length": length}


def training(dtype: str, rows: int, length: int, rounds: int, full: bool) -> Measure:
    """A step over all weights. `full`: scanned and unrolled layers, and torch.compile too."""
    sizes = {"model": _HF, "rows": rows, "length": length, "dtype": dtype}
    peers = [Side("torch eager", "training:torch", sizes, peer=True)]
    if full:
        peers.append(Side("torch.compile", "training:torch", sizes | {"compile": True}, peer=True))
    rivals = tuple(side.name for side in peers)
    ours = [
        Side(
            f"llm_jax, {'scanned' if scan else 'unrolled'} layers",
            "training:llm_jax",
            _ours(rows, length, {"model.precision.compute": dtype, "model.scan_layers": scan}),
            rivals=rivals,
        )
        for scan in ((False, True) if full else (True,))
    ]
    return Measure(
        f"training_{dtype}",
        f"A training step over all weights, {dtype}",
        f"SmolLM2-135M, {rows} x {length} tokens, AdamW, weights and optimizer in float32, products in {dtype}. "
        "A step of pretraining and one of full fine-tuning are the same. A turn is one step.",
        (BOUNDS, *ours, *peers),
        rounds,
        same_loss=1e-4 if dtype == "float32" else 1e-2,
    )


def lora(rows: int, length: int, rounds: int) -> Measure:
    """A step of adapters beside peft."""
    options = {"lora.rank": 8, "lora.alpha": 16.0}
    peer = {"model": _HF, "rows": rows, "length": length, "dtype": "float32", "rank": 8}
    sparing = options | {"model.remat": "dots", "train.loss_chunk": 64}
    return Measure(
        "lora",
        "A LoRA step",
        f"SmolLM2-135M, {rows} x {length} tokens, float32, rank 8 on all linear layers, AdamW. A turn is one step.",
        (
            BOUNDS,
            Side("llm_jax", "training:llm_jax", _ours(rows, length, options), rivals=("peft",)),
            Side("llm_jax, remat=dots", "training:llm_jax", _ours(rows, length, sparing), rivals=("peft",)),
            Side("peft", "training:torch", peer, peer=True),
        ),
        rounds,
        same_loss=1e-4,
    )


def qlora(rows: int, length: int, rounds: int) -> Measure:
    """A step of adapters over NF4 weights beside peft with bitsandbytes."""
    quantized = {"lora.rank": 8, "lora.alpha": 16.0, "quant.scheme": "nf4", "quant.head": _QLORA_HEAD}
    peer = {"model": _HF, "rows": rows, "length": length, "dtype": "float32", "rank": 8}
    return Measure(
        "qlora",
        "A QLoRA step",
        f"As the LoRA step, {rows} x {length} tokens, over frozen NF4 weights with double quantization.",
        (
            BOUNDS,
            Side("llm_jax", "training:llm_jax", _ours(rows, length, quantized), rivals=("peft + bitsandbytes", "peft")),
            Side("peft + bitsandbytes", "training:torch", peer | {"nf4": True}, peer=True),
            Side("peft", "training:torch", peer, peer=True),
        ),
        rounds,
    )


def decode(formats: list[str], batches: list[int], rounds: int, llama: list[str], dtypes: list[str]) -> Measure:
    """Decoding and prefill, with every format of weights."""
    options = {"batches": batches}
    ours = []
    for name in formats:
        rivals = [f"transformers {name}"] if name in dtypes else ["llm_jax float32"]
        if (stem := name.removesuffix("+a8")) in ("int4", "as stored", "int8"):
            rivals += [f"llama.cpp {kind}" for kind in llama if (kind == "Q8_0") == (stem == "int8")]
        ours.append(Side(f"llm_jax {name}", "decoding:llm_jax", options | {"weights": name}, rivals=tuple(rivals)))
    peers = [
        Side(f"transformers {dtype}", "decoding:transformers", options | {"model": _HF, "dtype": dtype}, peer=True)
        for dtype in dtypes
    ]
    peers += [
        Side(f"llama.cpp {kind}", "decoding:llama_cpp", options | {"model": f"{MODEL_PATH}gguf:{kind}"}, peer=True)
        for kind in llama
    ]
    return Measure(
        "decode",
        "Decoding and prefill",
        "SmolLM2-135M, greedy, 32 tokens after a prompt of 16, with 1, 4 or 16 rows; prefill of 512 tokens. Quantized "
        "weights of llm_jax have the embedding table and the head in int8; 'as stored' is the file in Q4_1; '+a8' "
        "rounds activations to 8 bits (--activations=int8), as llama.cpp does.",
        (BOUNDS, *ours, *peers),
        rounds,
    )


def start(rounds: int, full: bool) -> Measure:
    """From the start of a process to the first token."""
    cached = Side("llm_jax, filled compilation cache", "starting:llm_jax", {"cached": True})
    sides = [cached]
    if full:
        sides.append(Side("llm_jax, empty compilation cache", "starting:llm_jax", {"cached": False}))
    sides.append(Side("transformers", "starting:peer", {"kind": "transformers", "model": _HF}, peer=True))
    gguf = {"kind": "llama_cpp", "model": MODEL_PATH + "gguf:Q4_0"}
    sides.append(Side("llama.cpp", "starting:peer", gguf, peer=True))
    return Measure(
        "start",
        "From the start of a command to its first token",
        "SmolLM2-135M-Instruct, a new process in every turn; 'seconds' end with the first token.",
        tuple(sides),
        rounds,
    )


# ---------------------------------------------------------------- parts of llm_jax beside each other


def optimizers(rounds: int) -> Measure:
    """The step of every optimizer beside that of AdamW."""
    from llm_jax.training import optim

    kinds = ["adamw", *sorted(set(optim.OPTIMIZERS) - {"adamw"})]
    changes = {kind: {"optim.kind": kind} for kind in kinds} | {"adamw, ema": {"optim.ema_decay": 0.999}}
    sides = [
        Side(
            kind,
            "training:llm_jax",
            {"recipe": "default", "changes": options, "rows": 8, "length": 256},
            rivals=("adamw",) if kind != "adamw" else (),
        )
        for kind, options in changes.items()
    ]
    return Measure(
        "optimizers",
        "What an optimizer costs",
        "The model and batch of `configs/default.py` (8 rows of 256 tokens, float32). A turn is one step.",
        tuple(sides),
        rounds,
    )


def positions(rounds: int, length: int = 2048) -> Measure:
    """The training and the decode step of every position scheme beside those of rope."""
    from llm_jax.model import positions

    sizes = {"width": 512, "num_layers": 4, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 1408, "vocab_size": 2048}
    shape = {f"model.{name}": value for name, value in sizes.items()} | {"model.position.max_length": length}
    sides = [
        Side(
            kind,
            "positions:steps",
            {"changes": shape | {"model.position.kind": kind}, "length": length},
            rivals=("rope",) if kind != "rope" else (),
        )
        for kind in positions.SCHEMES
    ]
    note = f"{length:,} tokens, batch 1, float32, width 512, 4 layers, 8 heads; decoding with a full cache."
    return Measure("positions", "What a position scheme costs", note, tuple(sides), rounds)


def layouts(rounds: int) -> Measure:
    """The training step in the dtypes and layouts that `auto` chooses from (`llm_jax.training.machine_choice`)."""
    base = "float32 scanned"
    sides = [
        Side(
            f"{dtype} {layout}",
            "training:llm_jax",
            _ours(2, 256, {"model.precision.compute": dtype, "model.scan_layers": layout == "scanned"}),
            rivals=() if f"{dtype} {layout}" == base else (base,),
        )
        for dtype in ("float32", "bfloat16")
        for layout in ("scanned", "unrolled")
    ]
    note = "SmolLM2-135M (30 layers), 2 x 256 tokens, all weights, AdamW; products in the dtype of the row."
    return Measure("layouts", "Scanned and unrolled layers", note, (BOUNDS, *sides), rounds)


def word2vec(kind: str, seeds: int) -> Measure:
    """word2vec beside gensim, in speed and quality."""
    return Measure(
        f"word2vec_{kind}",
        f"word2vec beside gensim, {kind}",
        "1.48 M words, window 5, width 100, 5 negatives, 5 epochs; a turn is a training with a seed of its own.",
        (
            Side("llm_jax", "word2vec:llm_jax", {"kind": kind}, rivals=("gensim",)),
            Side("gensim", "word2vec:gensim", {"kind": kind}, peer=True),
        ),
        seeds,
        warm_up=0,
    )


def tokenizing(rounds: int, megabytes: int = 100) -> Measure:
    """Building the token cache beside the library called directly."""
    options = {"megabytes": megabytes, "processes": len(os.sched_getaffinity(0))}
    calls = ("encode_batch", "encode_batch_fast")
    sides = [Side("cache", "tokenizing:cache", options, rivals=calls)]
    sides += [Side(call, "tokenizing:library", options | {"call": call}) for call in calls]
    note = f"{megabytes} MB of JSON lines of 2 kB, a byte-level byte-pair vocabulary of 8,192, a process per core."
    return Measure(
        "tokenizing", "What the token cache costs beside the tokenizer", note, tuple(sides), rounds, warm_up=0
    )


def documents() -> Measure:
    """The memory that a document of a corpus takes."""
    sizes = (1_000_000, 2_000_000)
    side = Side("llm_jax", "documents:llm_jax", {"documents": sizes, "workers": 1})
    note = "JSON lines of some 40 bytes, byte tokens, one process; peaks of anonymous memory, imports included."
    return Measure("documents", "What a document costs in memory", note, (side,), 1, warm_up=0)


def suite(name: str) -> list[Measure]:
    """The measures of "quick" (about two minutes), "cpu" (about ten) or "parts" (about half an hour)."""
    if name == "quick":
        return [
            training("float32", 1, 256, 2, full=False),
            decode(["float32", "int8", "int4", "int4+a8"], [1], 2, ["Q4_0"], ["float32"]),
            start(1, full=False),
        ]
    if name == "cpu":
        formats = ["float32", "bfloat16", "int8", "int4", "nf4", "as stored", "int8+a8", "int4+a8", "as stored+a8"]
        return [
            training("float32", 4, 256, 2, full=True),
            training("bfloat16", 4, 256, 2, full=True),
            lora(4, 256, 2),
            qlora(4, 256, 2),
            decode(formats, [1, 4, 16], 3, ["Q8_0", "Q4_0", "Q4_1"], ["float32", "bfloat16"]),
            start(3, full=True),
        ]
    kinds = ("skipgram", "cbow")
    words = [word2vec(kind, 3) for kind in kinds]
    return [layouts(3), optimizers(7), positions(5), *words, tokenizing(3), documents()]
