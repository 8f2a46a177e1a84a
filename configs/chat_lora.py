"""LoRA on SmolLM2-135M-Instruct with your own conversations.

    python -m llm_jax.train --config=configs/chat_lora.py --workdir=runs/chat --config.data.source=chats.jsonl
    python -m llm_jax.chat --checkpoint=runs/chat

A line of chats.jsonl is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
The loss counts only the answers of the assistant, in the model's chat template. The recipe trains 100 steps of 4 x 256
tokens. Set train.steps to about three passes over your data, and train.seq_len to the length of the longest
conversation (`python -m llm_jax.show rows`).
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("default")
    config.init_from = "asset:smollm2-135m-instruct"
    config.data.update({"source": "chats.jsonl", "kind": "instructions"})
    config.lora.update({"rank": 8, "alpha": 16.0, "targets": ("linear",)})
    config.train.update({"steps": 100, "batch_size": 4, "seq_len": 256, "loss_chunk": 32})
    config.optim.update({"lr": 1e-3, "schedule": "linear", "weight_decay": 0.0})
    config.eval.update({"every": 0, "prompts": ()})
    config.checkpoint.update({"every": 25, "keep_last": 1, "keep_best": 0})
    return config
