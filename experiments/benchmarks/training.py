"""Training steps: the step that `llm_jax.train` compiles, and those of torch, transformers and peft.

Every turn is one step on the same random batch; the first loss of all sides of a measure must agree.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.benchmarks.worker import Job, peak_mib, rates, timed

LEARNING_RATE = 1e-3
# The names in transformers of what lora.targets=linear matches.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# On top of a recipe: a constant learning rate without clipping or weight decay, as the peers are set below.
PLAIN = {"optim.lr": LEARNING_RATE, "optim.warmup_steps": 0, "optim.clip_norm": 0.0, "optim.weight_decay": 0.0}


def ids(rows: int, length: int, vocabulary: int) -> np.ndarray:
    """Random token ids (rows, length), int64, the same in every process."""
    return np.random.RandomState(0).randint(0, vocabulary, (rows, length))


def llm_jax(recipe: str, changes: Mapping[str, Any], rows: int, length: int) -> Job:
    """A step of the recipe `configs/RECIPE.py` with overrides, the model that of `init_from` where it is set."""
    import jax
    import jax.numpy as jnp

    from llm_jax import configuration, runtime
    from llm_jax.model import transformer
    from llm_jax.training import start
    from llm_jax.training.setup import setup

    runtime.retain_freed_memory()
    imports = peak_mib()
    sizes = {"train.steps": 10**6, "train.batch_size": rows, "train.seq_len": length}
    text = {"data.source": "stdlib", "data.kind": "text"}
    config = configuration.load(recipe, text | sizes | dict(changes))
    parts = setup(start.find(config).config, config.tokenizer.vocab_size if not config.init_from else 0)
    state = parts.init()
    tokens = jnp.asarray(ids(rows, length, min(40000, parts.config.model.vocab_size)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    batch = {
        "inputs": tokens,
        "targets": jnp.roll(tokens, -1, 1),
        "positions": positions,
        "segments": jnp.ones_like(tokens),
        "mask": (positions < length - 1).astype(jnp.int32),
    }

    def turn(number: int) -> dict[str, float]:
        nonlocal state
        metrics: dict[str, Any] = {}

        def step() -> Any:
            nonlocal state
            state, new = parts.step(state, batch)
            metrics.update(new)
            return new

        return rates("tokens", rows * length, timed(step)) | {"loss": float(metrics["loss"])}

    model = parts.config.model
    passes = 1 if parts.config.lora.rank == 0 else 2 / 3  # frozen weights have no gradients of their own
    flops = passes * transformer.flops_per_token(model, length)
    kept = (state.opt_state, state.ema)
    details = {
        "imports MiB": round(imports),
        "optimizer state MiB": round(sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) / 2**20, 2),
        "layers": "scanned" if model.scan_layers else "unrolled",
        "bounds": [["tokens/s", f"{model.precision.compute} GFLOP/s", flops / 1e9]],
    }
    return Job(turn, f"jax {jax.__version__} on {jax.default_backend()}", details)


def torch(
    model: str, rows: int, length: int, dtype: str, compile: bool = False, rank: int = 0, nf4: bool = False
) -> Job:
    """A step of transformers' model on torch with its AdamW, eager or compiled; peft's adapters where `rank` is set.

    Args:
      model: directory in Hugging Face's format.
      dtype: "float32"; or "bfloat16", which computes under autocast with float32 weights.
      rank: of adapters on all linear layers; 0: all weights are trained.
      nf4: with `rank`, the frozen weights are quantized by bitsandbytes to NF4 with double quantization.
    """
    import torch
    import transformers

    if rank:
        import peft
    options: dict[str, Any] = {"dtype": torch.float32}
    if nf4:
        import bitsandbytes

        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    imports = peak_mib()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = transformers.AutoModelForCausalLM.from_pretrained(model, **options)
    if not nf4:
        net = net.to(device)
    software = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if rank:
        net = peft.get_peft_model(
            net, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEAR), task_type="CAUSAL_LM")
        )
        software += f", peft {peft.__version__}"
    if nf4:
        software += f", bitsandbytes {bitsandbytes.__version__}"
    trained = [p for p in net.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    forward = torch.compile(net) if compile else net
    tokens = torch.from_numpy(ids(rows, length, 40000)).to(device)
    low = dtype == "bfloat16"

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=low):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for the device

    def turn(number: int) -> dict[str, float]:
        losses: list[float] = []
        times = timed(lambda: losses.append(step()))
        return rates("tokens", rows * length, times) | {"loss": losses[-1]}

    return Job(turn, software, {"imports MiB": round(imports)})
