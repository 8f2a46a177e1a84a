"""One side of finetune.py: LoRA steps of a Hugging Face directory by llm_jax, or by peft and transformers.

python experiments/benchmarks/finetune_child.py llm_jax DIRECTORY ROWS LENGTH RANK REMAT LOSS_CHUNK
python experiments/benchmarks/finetune_child.py peft    DIRECTORY ROWS LENGTH RANK

Says "ready NAME" and the bytes of its resident peak after the imports and after loading, then answers each line
"STEPS" on stdin with the seconds those steps took, on the clock and of the processor, the resident peak so far in
bytes, and the loss of the last step. Every step takes the same random batch.
"""

import resource
import sys
import time
from typing import Any

import numpy as np

LEARNING_RATE = 1e-3


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ids(rows: int, length: int) -> np.ndarray:
    """(rows, length), int64."""
    return np.random.RandomState(0).randint(100, 40000, (rows, length))


def ours(directory: str, rows: int, length: int, rank: int, remat: str, chunk: str):
    """The step that `llm_jax.train` compiles, over the weights of the directory."""
    import jax
    import jax.numpy as jnp

    from llm_jax import configuration, runtime
    from llm_jax.training import start
    from llm_jax.training.setup import setup

    runtime.retain_freed_memory()
    after_imports = peak()
    changes = {
        "init_from": directory,
        "data.source": "stdlib",
        "data.kind": "text",
        "lora.rank": rank,
        "lora.alpha": 2.0 * rank,
        "model.remat": remat,
        "optim.lr": LEARNING_RATE,
        "optim.warmup_steps": 0,
        "optim.clip_norm": 0.0,
        "train.steps": 10**6,
        "train.batch_size": rows,
        "train.seq_len": length,
        "train.loss_chunk": int(chunk),
    }
    parts = setup(start.find(configuration.load("sentiment_lora", changes)).config)
    state = parts.init()
    tokens = jnp.asarray(ids(rows, length), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    batch = {
        "inputs": tokens,
        "targets": jnp.roll(tokens, -1, 1),
        "positions": places,
        "segments": jnp.ones_like(tokens),
        "mask": (places < length - 1).astype(jnp.int32),
    }

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, metrics = parts.step(state, batch)
        return float(metrics["loss"])

    return run, f"llm_jax on jax {jax.__version__}", after_imports


def theirs(directory: str, rows: int, length: int, rank: int):
    """peft's adapters on transformers' model, with torch's AdamW."""
    import peft
    import torch
    import transformers

    after_imports = peak()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings).train()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = torch.from_numpy(ids(rows, length))

    def run(steps: int) -> float:
        for _ in range(steps):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    return (
        run,
        f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        (after_imports),
    )


def main() -> None:
    kind, directory, rows, length, rank, *own = sys.argv[1:]
    begin: Any = {"llm_jax": ours, "peft": theirs}[kind]
    run, name, after_imports = begin(directory, int(rows), int(length), int(rank), *own)
    print("ready", after_imports, peak(), name, flush=True)
    for line in sys.stdin:
        start, worked = time.perf_counter(), time.process_time()
        loss = run(int(line))
        print(time.perf_counter() - start, time.process_time() - worked, peak(), loss, flush=True)


if __name__ == "__main__":
    main()
