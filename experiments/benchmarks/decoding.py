"""Greedy decoding and prefill of SmolLM2-135M: llm_jax, transformers and llama.cpp.

A prompt has `PROMPT` tokens; the time of decoding is that of generating `NEW` + 1 tokens minus that of one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from experiments.benchmarks.worker import Job, timed

MODEL = "asset:smollm2-135m-instruct"
PROMPT, NEW, LONG = 16, 32, 512
Generate = Callable[[int, int, int], Any]  # rows, tokens of the prompt, new tokens


def turns(generate: Generate, batches: Sequence[int], prefill: bool) -> Callable[[int], dict[str, float]]:
    """A turn of every batch size, and of the prefill of one row of `LONG` tokens where wanted."""

    def turn(number: int) -> dict[str, float]:
        figures = {}
        for batch in batches:
            one, many = (timed(functools.partial(generate, batch, PROMPT, new)) for new in (1, NEW + 1))
            clock, cpu = (max(b - a, 1e-9) for a, b in zip(one, many, strict=True))
            figures[f"decode {batch}, tokens/s"] = batch * NEW / clock
            figures[f"decode {batch}, tokens/s of CPU time"] = batch * NEW / cpu
        if prefill:
            clock, cpu = timed(lambda: generate(1, LONG, 1))
            figures[f"prefill {LONG}, tokens/s"] = LONG / clock
            figures[f"prefill {LONG}, tokens/s of CPU time"] = LONG / cpu
        return figures

    return turn


def llm_jax(weights: str, batches: Sequence[int], prefill: bool = True) -> Job:
    """Decoding with weights in "float32", "bfloat16", a scheme of `llm_jax.quantize`, or "as stored" in the file.

    "+a8" after a scheme or "as stored" rounds activations to 8 bits.
    """
    import jax

    from llm_jax import checkpoints, runtime
    from llm_jax import weights as weights_lib
    from llm_jax.decoding import loop
    from llm_jax.decoding.options import DecodingOptions
    from llm_jax.model import transformer
    from llm_jax.quant import post_training

    runtime.retain_freed_memory()
    activations = "int8" if weights.endswith("+a8") else "float"
    weights = weights.removesuffix("+a8")
    dtype = weights if weights == "bfloat16" else "float32"
    model, params, _ = checkpoints.load(MODEL, dtype=dtype, as_stored=weights == "as stored")
    if weights not in ("float32", "bfloat16", "as stored"):
        params = post_training.quantize_params(params, post_training.rules(weights, "int8"), "weights")
    params = weights_lib.lay_out(weights_lib.with_activations(params, activations))  # as `checkpoints.load`
    sampler = DecodingOptions(temperature=0).sampler()

    def generate(batch: int, prompt: int, new: int) -> Any:
        rows = [list(range(100, 100 + prompt))] * batch
        return loop.generate(model, params, rows, sampler, max_new_tokens=new)

    size = weights_lib.num_bytes(params)
    details: dict[str, Any] = {
        "weights MiB": round(size / 2**20, 1),
        "bounds": [["decode 1, tokens/s", "read GB/s", size / 1e9]],
    }
    if prefill:
        c = model.config
        gflop = 2 * (transformer.matmul_parameters(c) - c.width * c.vocab_size) / 1e9  # the head serves the last token
        details["bounds"] += [[f"prefill {LONG}, tokens/s", f"{dtype} GFLOP/s", gflop]]
    return Job(turns(generate, batches, prefill), f"jax {jax.__version__} on {jax.default_backend()}", details)


def transformers(model: str, dtype: str, batches: Sequence[int], prefill: bool = True, nf4: bool = False) -> Job:
    """transformers' `generate`, with weights in `dtype`, or in NF4 by bitsandbytes."""
    import torch
    import transformers

    software = f"transformers {transformers.__version__}, torch {torch.__version__}"
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if nf4:
        import bitsandbytes

        software += f", bitsandbytes {bitsandbytes.__version__}"
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = transformers.AutoModelForCausalLM.from_pretrained(model, **options).eval()
    if not nf4:
        net = net.to(device)
    net.generation_config.eos_token_id = None

    def generate(batch: int, prompt: int, new: int) -> Any:
        tokens = torch.arange(100, 100 + prompt, device=device)[None].repeat(batch, 1)
        with torch.no_grad():
            result = net.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False)
        return result.cpu().numpy()

    return Job(turns(generate, batches, prefill), software)


def llama_cpp(model: str, batches: Sequence[int], prefill: bool = True) -> Job:
    """llama.cpp through its C interface: one `llama_decode` per token of all rows.

    Args:
      model: a .gguf file.
    """
    import os

    import llama_cpp as c
    import numpy as np

    from experiments.benchmarks import runner

    loading = c.llama_model_default_params()
    # Its kernels for AMX end in an illegal instruction on virtual machines; without them it repacks nothing.
    loading.use_extra_bufts = not any(name.startswith("amx") for name in runner.machine()["instructions"])
    net = c.llama_model_load_from_file(model.encode(), loading)
    options = c.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 2048, LONG, LONG, max(batches)
    options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
    options.kv_unified = True
    context = c.llama_init_from_model(net, options)
    if not context:
        raise RuntimeError("llama_init_from_model failed")
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(net))
    batch = c.llama_batch_init(2048, 0, 1)

    def decode(entries: list[tuple[int, int, int, bool]]) -> None:
        """One call for entries (token, position, row, whether its logits are wanted)."""
        batch.n_tokens = len(entries)
        for i, (token, position, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if c.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def best(i: int) -> int:
        return int(np.ctypeslib.as_array(c.llama_get_logits_ith(context, i), (vocabulary,)).argmax())

    def generate(rows: int, prompt: int, new: int) -> list[int]:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        decode([(100 + i, i, row, i == prompt - 1) for row in range(rows) for i in range(prompt)])
        tokens = [best((row + 1) * prompt - 1) for row in range(rows)]
        for step in range(new - 1):
            decode([(token, prompt + step, row, True) for row, token in enumerate(tokens)])
            tokens = [best(row) for row in range(rows)]
        return tokens

    return Job(turns(generate, batches, prefill), f"llama.cpp of llama_cpp_python {c.__version__}")
