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
    import dataclasses
    import pathlib
    import runpy

    import jax
    import jax.numpy as jnp

    from llm_jax import checkpoints, cli, configuration
    from llm_jax.model.transformer import Transformer
    from llm_jax.training import losses, optim, step, trainable

    cli.keep_memory()
    after_imports = peak()
    recipe = pathlib.Path(__file__).parents[2] / "configs" / "sentiment_lora.py"
    c = configuration.build(runpy.run_path(str(recipe))["get_config"]())
    c = dataclasses.replace(c, init_from=directory, lora=dataclasses.replace(c.lora, rank=rank, alpha=2.0 * rank))
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, remat=remat))
    c = dataclasses.replace(c, optim=dataclasses.replace(c.optim, lr=LEARNING_RATE, warmup_steps=0, clip_norm=0.0))
    kind, model = trainable.kind(c), Transformer(c.model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    origin = checkpoints.open_base(directory)
    base = origin.params(c.model, lambda tree: jax.tree.map(lambda _: device, tree))
    params, fixed = jax.jit(kind.begin)(base, jax.random.key(c.train.seed))
    frozen = kind.freeze(base, fixed)
    optimizer = optim.make(c.optim, 10**6, base, adapters=params)
    del base
    loss_of = losses.make(c.loss, model, int(chunk))

    def loss(params, frozen, batch, count, key):
        return loss_of(kind.whole(params, frozen, key), frozen, batch, count, key)

    one = jax.jit(step.make(loss, optimizer, optim.schedule(c.optim, 10**6), 0, 1), donate_argnums=0)
    state = step.init(optimizer, params)
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
            state, metrics = one(state, frozen, batch)
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
    begin = {"llm_jax": ours, "peft": theirs}[kind]
    run, name, after_imports = begin(directory, int(rows), int(length), int(rank), *own)
    print("ready", after_imports, peak(), name, flush=True)
    for line in sys.stdin:
        start, worked = time.perf_counter(), time.process_time()
        loss = run(int(line))
        print(time.perf_counter() - start, time.process_time() - worked, peak(), loss, flush=True)


if __name__ == "__main__":
    main()
