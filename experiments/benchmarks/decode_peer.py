"""A peer of decode.py, run by an interpreter that has transformers or llama_cpp installed.

python experiments/benchmarks/decode_peer.py transformers DIRECTORY float32
python experiments/benchmarks/decode_peer.py llama.cpp FILE.gguf Q4_1

Says "ready NAME", then answers each line "BATCH PROMPT NEW" on stdin with the seconds of one greedy generation, on the
clock and of the processor.
"""

import sys
import time


def transformers_model(path: str, dtype: str):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None

    def generate(batch: int, prompt: int, new: int) -> None:
        ids = torch.arange(100, 100 + prompt)[None].repeat(batch, 1)
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)

    return generate, f"transformers {transformers.__version__}, torch {torch.__version__}"


def llama_model(path: str, dtype: str):
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=1024, n_batch=512, logits_all=False, verbose=False)

    def generate(batch: int, prompt: int, new: int) -> None:
        if batch > 1:
            raise ValueError("llama_cpp's generate has no batches")
        model.reset()
        tokens = model.generate(list(range(100, 100 + prompt)), temp=0.0)
        for _ in range(new):
            next(tokens)

    return generate, f"llama_cpp {llama_cpp.__version__}"


def main() -> None:
    kind, path, dtype = sys.argv[1:]
    generate, name = (transformers_model if kind == "transformers" else llama_model)(path, dtype)
    print("ready", name, flush=True)
    for line in sys.stdin:
        start, worked = time.perf_counter(), time.process_time()
        generate(*map(int, line.split()))
        print(time.perf_counter() - start, time.process_time() - worked, flush=True)


if __name__ == "__main__":
    main()
