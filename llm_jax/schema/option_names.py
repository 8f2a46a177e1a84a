"""The names of options: what exists, what was renamed, and what other codebases call it."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from llm_jax.schema.config import Config
from llm_jax.schema.unsupported_names import explanation

# {old name of a renamed option: new name}. Old checkpoints are converted; the error for an old override names the new.
RENAMED = {
    "loss.masked_share": "loss.mask_prob",
    "model.attention": "model.attention_kernel",
    "model.cache": "model.kv_cache",
    "model.head_width": "model.head_dim",
    "model.mlp_width": "model.mlp_dim",
    "model.norm_place": "model.norm_placement",
    "model.num_types": "model.type_vocab_size",
    "model.parallel": "model.parallel_residual",
    "model.position.buckets": "model.position.num_buckets",
    "model.position.clip": "model.position.max_relative_position",
    "model.position.factor": "model.position.scaling_factor",
    "model.position.fraction": "model.position.partial_rotary_factor",
    "model.position.high_frequency": "model.position.high_freq_factor",
    "model.position.low_frequency": "model.position.low_freq_factor",
    "model.position.shaw": "model.position.relative_embeddings",
    "model.tie_head": "model.tie_embeddings",
}
# Names that other codebases use for options: the section and the option here, or a complete override.
OTHER_NAMES = {
    "activation_checkpointing": "model.remat=full",
    "activation_checkpointing_kwargs": "model.remat",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "amp": "model.precision.compute=bfloat16",
    "attn_implementation": "model.attention_kernel",
    "b1": "optim.beta1",
    "b2": "optim.beta2",
    "base_model_name_or_path": "init_from",
    "batch": "train.batch_size",
    "bf16": "model.precision.compute=bfloat16",
    "block_size": "train.seq_len",
    "bptt": "train.seq_len",
    "ckpt_steps": "checkpoint.every",
    "context_length": "train.seq_len",
    "ctx_len": "train.seq_len",
    "d_ff": "model.mlp_dim",
    "d_model": "model.width",
    "dataloader_num_workers": "data.workers",
    "dataset": "data.source",
    "dataset_name": "data.source",
    "dataset_text_field": "data.field",
    "decay_lr": "optim.schedule",
    "decay_type": "optim.schedule",
    "depth": "model.num_layers",
    "dim": "model.width",
    "dtype": "model.precision.compute",
    "embedding_dim": "model.width",
    "eval_interval": "eval.every",
    "eval_iters": "eval.rows",
    "eval_steps": "eval.every",
    "eval_strategy": "eval.every",
    "evals": "eval.tasks",
    "evaluation_strategy": "eval.every",
    "ffn_dim": "model.mlp_dim",
    "eval_accumulation_steps": "train.batch_size",
    "eval_on_start": "eval.every",
    "fp16": "model.precision.compute=float16",
    "grad_clip": "optim.clip_norm",
    "grad_clip_norm": "optim.clip_norm",
    "gradient_accumulation": "train.grad_accumulation",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "gradient_checkpointing": "model.remat=full",
    "gradient_checkpointing_kwargs": "model.remat",
    "head_size": "model.head_dim",
    "hidden_act": "model.activation",
    "hidden_size": "model.width",
    "intermediate_size": "model.mlp_dim",
    "iterations": "train.steps",
    "label_names": "data.labelled.choices",
    "label_smoothing_factor": "loss.label_smoothing",
    "layer_norm_eps": "model.norm_eps",
    "layers": "model.num_layers",
    "layers_pattern": "lora.targets",
    "layers_to_transform": "lora.targets",
    "learning_rate": "optim.lr",
    "load_in_4bit": "quant.scheme=nf4",
    "load_in_8bit": "quant.scheme=int8",
    "logging_to": "report.to",
    "lora.kind": "lora.variant",
    "lora.type": "lora.variant",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lr_decay_iters": "train.steps",
    "lr_mults": "optim.lr_rules",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip_norm",
    "max_iters": "train.steps",
    "max_position_embeddings": "model.position.max_length",
    "max_seq_len": "train.seq_len",
    "max_seq_length": "train.seq_len",
    "max_steps": "train.steps",
    "min_lr": "optim.final_lr_fraction",
    "mixed_precision": "model.precision.compute=bfloat16",
    "mlm_probability": "loss.mask_prob",
    "model_init": "init_from",
    "model_max_length": "train.seq_len",
    "model_name_or_path": "init_from",
    "n_ctx": "train.seq_len",
    "n_embd": "model.width",
    "n_head": "model.num_heads",
    "n_heads": "model.num_heads",
    "n_inner": "model.mlp_dim",
    "n_kv_head": "model.num_kv_heads",
    "n_layer": "model.num_layers",
    "n_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_hidden_layers": "model.num_layers",
    "num_key_value_heads": "model.num_kv_heads",
    "num_steps": "train.steps",
    "num_workers": "data.workers",
    "optax_name": "optim.kind",
    "optimizer": "optim.kind",
    "per_device_train_batch_size": "train.batch_size",
    "pretrained": "init_from",
    "quant.bits": "quant.scheme",
    "quant.kind": "quant.scheme",
    "quant": "quant.scheme",
    "quantization": "quant.scheme",
    "r": "lora.rank",
    "random_seed": "train.seed",
    "rank_pattern": "lora.ranks",
    "report_to": "report.to",
    "resume_from": "init_from",
    "rms_norm_eps": "model.norm_eps",
    "rope_theta": "model.position.base",
    "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "sequence_length": "train.seq_len",
    "sharding_rules": "mesh.rules",
    "sharding_strategy": "mesh.rules",
    "sliding_window": "model.window",
    "target_modules": "lora.targets",
    "target_parameters": "lora.targets",
    "tie_word_embeddings": "model.tie_embeddings",
    "tied_embeddings": "model.tie_embeddings",
    "torch_dtype": "model.precision.compute",
    "total_steps": "train.steps",
    "train_file": "data.source",
    "train_steps": "train.steps",
    "use_dora": "lora.variant=dora",
    "use_rslora": "lora.rank_stabilized",
    "val_fraction": "data.validation_fraction",
    "validation_split": "data.validation_fraction",
    "wandb_log": "report.to",
    "warmup": "optim.warmup_steps",
    "warmup_iters": "optim.warmup_steps",
    "wd": "optim.weight_decay",
    "wd_mults": "optim.decay_rules",
    "bnb_4bit_compute_dtype": "model.precision.compute",
    "bnb_4bit_quant_type": "quant.scheme",
    "data_seed": "train.seed",
    "dataset_num_proc": "data.workers",
    "deepspeed": "mesh.fsdp",
    "init_lora_weights": "lora.variant",
    "load_best_model_at_end": "checkpoint.keep_best",
    "lora_target_modules": "lora.targets",
    "loss_type": "loss.kind",
    "optim": "optim.kind",
    "per_device_eval_batch_size": "train.batch_size",
    "preprocessing_num_workers": "data.workers",
    "use_peft": "lora.rank",
}


# Names that other codebases use for flags: the flags here, of which the first that a command has is meant.
OTHER_FLAGS: dict[str, tuple[str, ...]] = {
    "adapter": ("checkpoint",),
    "adapter_name_or_path": ("checkpoint",),
    "assistant_model": ("draft",),
    "batch": ("batch_size",),
    "bits": ("scheme",),
    "checkpoint": ("input", "tokenizer=CHECKPOINT"),
    "ctx_size": ("context",),
    "dataset": ("data", "task"),
    "diversity_penalty": ("diversity",),
    "do_sample": ("temperature=0 (greedy) or 1",),
    "early_stopping": ("early_stop",),
    "eos_token_id": ("eos",),
    "epsilon_cutoff": ("epsilon",),
    "eta_cutoff": ("eta",),
    "greedy": ("temperature=0",),
    "input": ("checkpoint", "data"),
    "input_text": ("prompt",),
    "load_in_4bit": ("scheme=nf4",),
    "load_in_8bit": ("scheme=int8",),
    "lora": ("checkpoint",),
    "max_gen_toks": ("max_new_tokens",),
    "max_position_embeddings": ("context",),
    "max_seq_len": ("seq_len", "context"),
    "max_seq_length": ("seq_len", "context"),
    "max_tokens": ("max_new_tokens",),
    "model": ("checkpoint", "input"),
    "model_args": ("checkpoint",),
    "model_id": ("checkpoint", "input"),
    "model_name_or_path": ("checkpoint", "input"),
    "model_path": ("checkpoint", "input"),
    "n_ctx": ("context",),
    "n_predict": ("max_new_tokens",),
    "no_repeat_ngram_size": ("no_repeat_ngram",),
    "num_beam_groups": ("beam_groups",),
    "num_beams": ("beams",),
    "num_fewshot": ("shots",),
    "num_predict": ("max_new_tokens",),
    "num_return_sequences": ("n",),
    "out_dir": ("workdir", "output", "checkpoint", "input"),
    "output_dir": ("workdir", "output", "checkpoint", "input"),
    "output_path": ("output",),
    "peft": ("checkpoint",),
    "penalty_alpha": ("contrastive",),
    "per_device_eval_batch_size": ("batch_size",),
    "pretrained": ("checkpoint", "input"),
    "pretrained_model_name_or_path": ("checkpoint", "input"),
    "prompt_lookup_num_tokens": ("draft=prompt",),
    "repeat_penalty": ("repetition_penalty",),
    "save_dir": ("workdir", "output"),
    "start": ("prompt",),
    "logits_processor": ("filter",),
    "stop_strings": ("stop",),
    "stopping_criteria": ("stop",),
    "streamer": ("stream",),
    "system_prompt": ("system",),
    "tasks": ("harness", "task"),
    "temp": ("temperature",),
    "text": ("prompt",),
    "torch_dtype": ("dtype",),
    "workdir": ("checkpoint", "output"),
    "apply_chat_template": ("chat",),
    "bad_words_ids": ("logit_bias",),
    "base_model": ("base",),
    "base_model_name_or_path": ("base",),
    "bnb_4bit_quant_type": ("scheme",),
    "cache_implementation": ("cache",),
    "cache_type_k": ("cache",),
    "cache_type_v": ("cache",),
    "calibration_data": ("data",),
    "calibration_dataset": ("data",),
    "hf_repo": ("checkpoint=hf:ORG/NAME",),
    "log_samples": ("output",),
    "max_length": ("max_new_tokens", "seq_len"),
    "num_assistant_tokens": ("draft_tokens",),
    "num_samples": ("n", "sequences"),
    "outfile": ("output",),
    "outtype": ("format", "scheme"),
    "output_logits": ("json",),
    "output_scores": ("json",),
    "quant": ("scheme", "format"),
    "quantization": ("scheme", "format"),
    "q_group_size": ("scheme=int4:64",),
    "group_size": ("scheme=int4:64",),
    "w_bit": ("scheme",),
    "reverse_prompt": ("stop",),
    "sequence_bias": ("logit_bias",),
    "suppress_tokens": ("logit_bias",),
}


def options(cls: Any) -> dict[str, Any]:
    """{name: annotated type} of the options and sections of a configuration dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: kind for name, kind in hints.items() if name != "explicit"}


def keys(cls: Any = Config, prefix: str = "") -> Iterator[str]:
    """The dotted names of all options."""
    for key, kind in options(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{key}.")
        else:
            yield prefix + key


def nearest(key: str, cls: Any = Config) -> str:
    """A phrase that names the option that `key` was renamed to, is called elsewhere, or is nearest to.

    For a name of `unsupported_names`, that says what is done instead; for a name that resembles no option, how to list
    them.
    """
    if cls is Config and key in RENAMED:
        return f"it is now '{RENAMED[key]}'"
    if "." in key and (text := explanation(key)):
        return text
    if (name := _last(key)) not in OTHER_NAMES and (text := explanation(name)):
        return text
    option = resolve(key, cls) or _similar(key, cls)
    return f"did you mean '{option}'?" if option else "--help-config describes the options"


def resolve(key: str, cls: Any = Config) -> str:
    """The option that a name without its section, or a name of another codebase, refers to; "" if there is none."""
    options = list(keys(cls))
    name = _last(key)
    ends = [option for option in options if option.endswith(f".{key}")]  # the section is missing
    if not ends and cls is Config and (other := OTHER_NAMES.get(key, OTHER_NAMES.get(name))):
        return other
    ends = ends or [option for option in options if option.rsplit(".", 1)[-1] == name]  # another section's name
    return max(ends, key=lambda option: (-option.count("."), _similarity(option, key)), default="")


def unknown_option(key: str, cls: Any = Config, value: str = "VALUE") -> str:
    """The error message for an override of `key` where this is no option, with the cure; "" for an option.

    Args:
      value: the text of the override, for the example in the message.
    """
    options = list(keys(cls))
    if key in options:
        return ""
    inside = [option for option in options if option.startswith(f"{key}.")]
    if not inside:
        return f"unknown config key '{key}'; {nearest(key, cls)}"
    if f"{key}.kind" in inside:
        return f"config key '{key}' is a section; did you mean --config.{key}.kind={value}?"
    return f"config key '{key}' is a section; set one of its options, as in --config.{inside[0]}=VALUE"


def annotation(key: str, cls: Any = Config) -> Any:
    """The annotated type of the option with a dotted name."""
    section, _, rest = key.partition(".")
    return annotation(rest, options(cls)[section]) if rest else options(cls)[section]


def _last(key: str) -> str:
    """The name of an option without its section, with underscores."""
    return key.rsplit(".", 1)[-1].lower().replace("-", "_")


def _similar(key: str, cls: Any) -> str:
    """The option whose dotted name, or whose name without the section, is nearest to that of `key`; "" if none is.

    Options of the same section come first; those of other sections must have nearly the same name.
    """
    options, section = list(keys(cls)), key.rpartition(".")[0]
    if inside := [option for option in options if section and option.rpartition(".")[0] == section]:
        least = {option: 0.6 if option in inside else 0.8 for option in options}
        ratios = {option: _similarity(_last(option), _last(key)) for option in options}
        near = [option for option in options if ratios[option] >= least[option]]
        return max(near, key=lambda option: ratios[option] + 0.2 * (option in inside), default="")
    similarity = {option: max(_similarity(option, key), _similarity(_last(option), _last(key))) for option in options}
    best = max(options, key=lambda option: (similarity[option], _similarity(option, key)))
    return best if similarity[best] >= 0.6 else ""


def _similarity(option: str, key: str) -> float:
    return difflib.SequenceMatcher(None, key, option).ratio()
