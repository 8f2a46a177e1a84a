"""The names of options: what exists, what was renamed, and what other codebases call it."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from llm_jax.schema import Config

# Options that have been renamed: an old checkpoint is read under the new name, an old override is answered with it.
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
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "amp": "model.precision.compute=bfloat16",
    "attn_implementation": "model.attention_kernel",
    "base_model_name_or_path": "init_from",
    "batch": "train.batch_size",
    "bf16": "model.precision.compute=bfloat16",
    "block_size": "train.seq_len",
    "bptt": "train.seq_len",
    "context_length": "train.seq_len",
    "ctx_len": "train.seq_len",
    "d_ff": "model.mlp_dim",
    "d_model": "model.width",
    "dataloader_num_workers": "data.workers",
    "dataset": "data.source",
    "dataset_name": "data.source",
    "dataset_text_field": "data.field",
    "decay_lr": "optim.schedule",
    "depth": "model.num_layers",
    "dim": "model.width",
    "dtype": "model.precision.compute",
    "embedding_dim": "model.width",
    "eval_interval": "eval.every",
    "eval_iters": "eval.rows",
    "eval_steps": "eval.every",
    "eval_strategy": "eval.every",
    "evaluation_strategy": "eval.every",
    "ffn_dim": "model.mlp_dim",
    "fp16": "model.precision.compute=float16",
    "grad_clip": "optim.clip_norm",
    "gradient_accumulation": "train.grad_accumulation",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "gradient_checkpointing": "model.remat=full",
    "head_size": "model.head_dim",
    "hidden_act": "model.activation",
    "hidden_size": "model.width",
    "intermediate_size": "model.mlp_dim",
    "iterations": "train.steps",
    "label_names": "data.labelled.choices",
    "label_smoothing_factor": "loss.label_smoothing",
    "layer_norm_eps": "model.norm_eps",
    "layers": "model.num_layers",
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
    "optimizer": "optim.kind",
    "per_device_train_batch_size": "train.batch_size",
    "pretrained": "init_from",
    "quant.bits": "quant.scheme",
    "quant.kind": "quant.scheme",
    "quantization": "quant.scheme",
    "r": "lora.rank",
    "random_seed": "train.seed",
    "report_to": "report.to",
    "resume_from": "init_from",
    "rms_norm_eps": "model.norm_eps",
    "rope_theta": "model.position.base",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "sequence_length": "train.seq_len",
    "sliding_window": "model.window",
    "target_modules": "lora.targets",
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
    "checkpoint": ("input",),
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
    "max_length": ("max_new_tokens",),
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
    "num_samples": ("n",),
    "out_dir": ("workdir", "output", "checkpoint", "input"),
    "output_dir": ("workdir", "output", "checkpoint", "input"),
    "output_path": ("output",),
    "outtype": ("format",),
    "peft": ("checkpoint",),
    "penalty_alpha": ("contrastive",),
    "per_device_eval_batch_size": ("batch_size",),
    "pretrained": ("checkpoint", "input"),
    "pretrained_model_name_or_path": ("checkpoint", "input"),
    "prompt_lookup_num_tokens": ("draft=prompt",),
    "quantization": ("scheme",),
    "repeat_penalty": ("repetition_penalty",),
    "save_dir": ("workdir", "output"),
    "start": ("prompt",),
    "logits_processor": ("filter",),
    "stop_strings": ("stop",),
    "stopping_criteria": ("stop",),
    "streamer": ("stream",),
    "system_prompt": ("system",),
    "tasks": ("task",),
    "temp": ("temperature",),
    "text": ("prompt",),
    "torch_dtype": ("dtype",),
    "workdir": ("checkpoint", "output"),
}

# Names that other codebases use for options and flags that do not exist here, and what holds or is done instead.
EXPLAINED = {
    "always_save_checkpoint": "checkpoint.every, checkpoint.keep_last and checkpoint.keep_best decide what is kept",
    "assistant_tokenizer": "a draft model has the tokenizer of the model",
    "attention_dropout": "the model has no dropout; lora.dropout is that of adapters",
    "backend": "devices of one machine need no backend; --coordinator_address connects several processes",
    "cpu": "the environment variable JAX_PLATFORMS=cpu chooses the CPU",
    "compile": "every step is compiled",
    "device": "JAX takes an accelerator if there is one; the variable JAX_PLATFORMS=cpu, cuda or tpu chooses",
    "device_map": "the model is placed on the default device; JAX_PLATFORMS=cpu, cuda or tpu chooses it",
    "dropout": "the model has no dropout; lora.dropout is that of adapters",
    "eval_only": "python -m llm_jax.evaluate --checkpoint=WORKDIR evaluates a run",
    "generation_config": "give its options by themselves; generate and chat read generation_config.json",
    "group_by_length": "examples are always packed into rows of train.seq_len tokens",
    "hidden_dropout": "the model has no dropout; lora.dropout is that of adapters",
    "log_interval": "metrics.jsonl in the workdir has a line for every step",
    "logging_dir": "metrics.jsonl and the files of report.to are written into --workdir",
    "load_in_4bit": "python -m llm_jax.quantize --scheme=nf4 writes a quantized checkpoint",
    "load_in_8bit": "python -m llm_jax.quantize --scheme=int8 writes a quantized checkpoint",
    "logging_steps": "metrics.jsonl in the workdir has a line for every step",
    "logging_strategy": "metrics.jsonl in the workdir has a line for every step",
    "low_cpu_mem_usage": "weights are always read from the file straight to the device",
    "min_length": "there is no smallest length; --ignore_eos continues to --max_new_tokens",
    "min_new_tokens": "there is no smallest length; --ignore_eos continues to --max_new_tokens",
    "no_cuda": "the environment variable JAX_PLATFORMS=cpu chooses the CPU",
    "num_samples": "training prints one continuation for each of eval.prompts; generate --n=N prints several",
    "packing": "documents and examples are always packed into rows, and attention does not cross them",
    "pad_token_id": "padding is masked, and needs no token",
    "push_to_hub": "nothing is uploaded; convert --to=hf writes a directory that huggingface_hub uploads",
    "quantization_config": "python -m llm_jax.quantize --scheme=nf4 writes a quantized checkpoint",
    "remove_unused_columns": "fields that data.kind does not read are ignored",
    "resume": "the same command with the same --workdir resumes from its last checkpoint",
    "resume_from_checkpoint": "the same command with the same --workdir resumes from its last checkpoint",
    "torch_compile": "every step is compiled",
    "trust_remote_code": "no code of a checkpoint is run",
    "use_cache": "the key-value cache is always used",
    "use_cpu": "the environment variable JAX_PLATFORMS=cpu chooses the CPU",
    "assistant_only_loss": (
        "data.kind=instructions counts the answers of the assistant only; data.kind=text counts every token"
    ),
    "auto_find_batch_size": "train --dry_run estimates the memory of a train.batch_size",
    "attn_implementation": (
        "the attention kernel is chosen for the machine; model.attention_kernel chooses it in training"
    ),
    "cache_dir": "the environment variables LLM_JAX_CACHE and HF_HOME name the caches",
    "completion_only_loss": (
        "data.kind=instructions counts the answers of the assistant only; data.kind=text counts every token"
    ),
    "do_eval": "python -m llm_jax.evaluate evaluates a checkpoint; training evaluates every eval.every steps",
    "do_train": "python -m llm_jax.train trains",
    "epochs": (
        "train.steps is the length of a run; an epoch has about (training tokens) / (train.batch_size * "
        "train.seq_len) steps"
    ),
    "eval_packing": "documents and examples are always packed into rows, and attention does not cross them",
    "local_files_only": "the environment variable HF_HUB_OFFLINE=1 keeps the hub out",
    "lora.bias": "adapters train no biases",
    "lora.task_type": "the task is that of the model",
    "max_length": (
        "train.seq_len is the number of tokens of a row, model.position.max_length the number of positions of the model"
    ),
    "metric_for_best_model": "checkpoint.keep_best keeps the checkpoints of the lowest held-out loss",
    "modules_to_save": "with lora.rank, only adapters are trained; lora.targets may name the embeddings and the head",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "num_epochs": (
        "train.steps is the length of a run; an epoch has about (training tokens) / (train.batch_size * "
        "train.seq_len) steps"
    ),
    "num_train_epochs": (
        "train.steps is the length of a run; an epoch has about (training tokens) / (train.batch_size * "
        "train.seq_len) steps"
    ),
    "overwrite_output_dir": "a run resumes from its --workdir; to begin anew, give another one or remove it",
    "padding_free": "documents and examples are always packed into rows, and attention does not cross them",
    "ref_model": "the reference model of DPO is the model that training starts from (init_from)",
    "ref_model_name_or_path": "the reference model of DPO is the model that training starts from (init_from)",
    "return_dict_in_generate": "complete returns texts, token ids and log-probabilities",
    "revision": (
        "the main branch is taken; for another one, download it (hf download ORG/NAME --revision=X "
        "--local-dir=DIR) and give DIR"
    ),
    "run_name": "a run has the name of its --workdir",
    "subfolder": "give the path of the subdirectory",
    "token": "huggingface_hub takes the token of `hf auth login` or of the environment variable HF_TOKEN",
    "tokenizer_name": "the tokenizer is that of init_from; a new model takes tokenizer.kind or tokenizer.path",
    "train_on_inputs": (
        "data.kind=instructions counts the answers of the assistant only; data.kind=text counts every token"
    ),
    "use_auth_token": "huggingface_hub takes the token of `hf auth login` or of the environment variable HF_TOKEN",
    "warmup_ratio": "optim.warmup_steps is the number of steps of the warmup: the ratio times train.steps",
    "wandb_project": "the environment variable WANDB_PROJECT names the project",
    "wandb_run_name": "a run has the name of its --workdir",
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

    For a name of `EXPLAINED`, that says what is done instead; for a name that resembles no option, how to list them.
    """
    if cls is Config and key in RENAMED:
        return f"it is now '{RENAMED[key]}'"
    if key in EXPLAINED and "." in key:
        return EXPLAINED[key]
    if (name := _last(key)) in EXPLAINED and name not in OTHER_NAMES:
        return EXPLAINED[name]
    option = resolve(key, cls) or _similar(key, cls)
    return f"did you mean '{option}'?" if option else "--help-config describes the options"


def resolve(key: str, cls: Any = Config) -> str:
    """The option that a name without its section, or a name of other codebases, stands for; "" if there is none."""
    options = list(keys(cls))
    name = _last(key)
    ends = [option for option in options if option.endswith(f".{key}")]  # the section is missing
    if not ends and cls is Config and (other := OTHER_NAMES.get(key, OTHER_NAMES.get(name))):
        return other
    ends = ends or [option for option in options if option.rsplit(".", 1)[-1] == name]  # another section's name
    return max(ends, key=lambda option: (-option.count("."), _similarity(option, key)), default="")


def unknown(key: str, cls: Any = Config, value: str = "VALUE") -> str:
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
    """The option whose dotted name, or whose name without the section, is nearest to that of `key`; "" if none is."""
    options = list(keys(cls))
    similarity = {option: max(_similarity(option, key), _similarity(_last(option), _last(key))) for option in options}
    best = max(options, key=lambda option: (similarity[option], _similarity(option, key)))
    return best if similarity[best] >= 0.6 else ""


def _similarity(option: str, key: str) -> float:
    return difflib.SequenceMatcher(None, key, option).ratio()
