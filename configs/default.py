"""The default: a small decoder on the source text of the running Python's standard library.

    python -m llm_jax.train --config=configs/default.py --workdir=runs/default

Every option stands here; `llm_jax/config.py` says what each one means.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"source": "stdlib", "validation_fraction": 0.05, "cache_dir": ""},
            "tokenizer": {"kind": "bpe", "vocab_size": 2048},
            "model": {
                "vocab_size": 0,
                "width": 256,
                "num_layers": 4,
                "layer_pattern": ("global",),
                "window": 128,
                "num_heads": 4,
                "num_kv_heads": 4,
                "head_width": 0,
                "mlp": "gated",
                "mlp_width": 704,
                "activation": "silu",
                "norm": "rms",
                "norm_eps": 1e-5,
                "norm_place": "pre",
                "parallel": False,
                "embed_norm": False,
                "num_types": 0,
                "pooler": False,
                "qk_norm": True,
                "bias": False,
                "qkv_bias": False,
                "head_bias": False,
                "attention_scale": 0.0,
                "attention_softcap": 0.0,
                "logit_softcap": 0.0,
                "scale_embeddings": False,
                "tie_head": True,
                "causal": True,
                "attention": "auto",
                "position": {
                    "kind": "rope",
                    "base": 10000.0,
                    "local_base": 0.0,
                    "combine": "add",
                    "width": 0,
                    "max_length": 1024,
                    "clip": 16,
                    "shaw": "both",
                    "buckets": 32,
                    "max_distance": 128,
                    "fraction": 1.0,
                    "interleaved": False,
                    "scaling": "none",
                    "factor": 1.0,
                    "original_length": 0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "low_frequency": 1.0,
                    "high_frequency": 4.0,
                },
                "precision": {
                    "params": "float32",
                    "compute": "float32",
                    "accumulate": "float32",
                    "output": "float32",
                },
                "scan_layers": True,
                "remat": "none",
            },
            "optim": {
                "kind": "adamw",
                "lr": 3e-3,
                "warmup_steps": 50,
                "schedule": "cosine",
                "final_lr_fraction": 0.05,
                "weight_decay": 0.1,
                "decay_rules": ((r".*(norm|_bias|embed|position).*", 0.0), (r".*", 1.0)),
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-8,
                "clip_norm": 1.0,
            },
            "train": {
                "steps": 700,
                "seed": 0,
                "batch_size": 8,
                "seq_len": 256,
                "grad_accumulation": 1,
                "loss_chunk": 0,
                "on_bad_step": "stop",
                "spike_factor": 0.0,
            },
            "eval": {
                "every": 100,
                "rows": 64,
                "prompts": ("def ", "import os\n\nclass "),
                "max_new_tokens": 64,
            },
            "report": {"to": (), "norms_every": 0, "samples_every": 0},
            "checkpoint": {"every": 350, "keep_last": 2, "keep_best": 1},
            "mesh": {
                "data": -1,
                "fsdp": 1,
                "tensor": 1,
                "rules": (
                    (r".*/(query|key|value|gate|up)|head/kernel", ("fsdp", "tensor")),
                    (r".*/(out|down)|embed/table", ("tensor", "fsdp")),
                    (r".*", ()),
                ),
            },
            "init_from": "",
        }
    )
