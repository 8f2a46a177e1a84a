"""Names of options and flags of other codebases without a counterpart here. It imports nothing of the package."""

# {option or flag of other codebases that does not exist here: the reason or the alternative}.
# A name that ends with an underscore is a prefix of names.
EXPLAINED: dict[str, str] = {
    "always_save_checkpoint": "checkpoint.every, checkpoint.keep_last and checkpoint.keep_best decide what is kept",
    "assistant_tokenizer": "a draft model has the tokenizer of the model",
    "attention_dropout": "the model has no dropout; lora.dropout applies to adapters",
    "backend": "devices of one machine need no backend; --coordinator_address connects several processes",
    "cpu": "the environment variable JAX_PLATFORMS=cpu chooses the CPU",
    "compile": "every step is compiled",
    "device": "JAX uses an accelerator if there is one; the variable JAX_PLATFORMS=cpu, cuda or tpu chooses",
    "device_map": "the model is placed on the default device; JAX_PLATFORMS=cpu, cuda or tpu chooses it",
    "dropout": "the model has no dropout; lora.dropout applies to adapters",
    "eval_only": "python -m llm_jax.evaluate --checkpoint=WORKDIR evaluates a run",
    "generation_config": "give its options by themselves; generate and chat read generation_config.json",
    "group_by_length": "examples are always packed into rows of train.seq_len tokens",
    "hidden_dropout": "the model has no dropout; lora.dropout applies to adapters",
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
    "quant": "python -m llm_jax.quantize --scheme=nf4 writes a quantized checkpoint",
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
    "local_files_only": "the environment variable HF_HUB_OFFLINE=1 prevents access to the hub",
    "lora.bias": "adapters train no biases",
    "lora.task_type": "the model determines the task",
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
    "token": "huggingface_hub uses the token of `hf auth login` or of the environment variable HF_TOKEN",
    "tokenizer_name": "the tokenizer is that of init_from; a new model takes tokenizer.kind or tokenizer.path",
    "train_on_inputs": (
        "data.kind=instructions counts the answers of the assistant only; data.kind=text counts every token"
    ),
    "use_auth_token": "huggingface_hub uses the token of `hf auth login` or of the environment variable HF_TOKEN",
    "warmup_ratio": "optim.warmup_steps is the number of steps of the warmup: the ratio times train.steps",
    "wandb_project": "the environment variable WANDB_PROJECT names the project",
    "wandb_run_name": "a run has the name of its --workdir",
    "output_dir": "--workdir is the directory of a run",
    "add_special_tokens": "encode adds no special tokens; llm_jax.tokenizers.prompt(tokenizer, TEXT) adds BOS",
    "continue_final_message": "append tokenizer.encode_chat(TEXT) to the ids to continue an answer",
    "return_dict": "the result is a list of token ids; jnp.asarray([ids]) makes a batch",
    "return_tensors": "the result is a list of token ids; jnp.asarray([ids]) makes a batch",
    "skip_special_tokens": "decode always omits special tokens; tokenizer.piece(ID) is the text of one",
    "tokenize": "the result is a list of token ids; tokenizer.piece(ID) is the text of one",
    "activation_offloading": "activations stay on the device; model.remat recomputes them",
    "alpha_pattern": "lora.alpha applies to all weights; lora.ranks sets ranks by weight",
    "average_tokens_across_devices": "the loss is the mean over the targets of all devices",
    "bf16_full_eval": "evaluation has the dtypes of model.precision",
    "fp16_full_eval": "evaluation has the dtypes of model.precision",
    "bnb_4bit_use_double_quant": "nf4 always has double quantization: the scales are stored in 8 bits",
    "use_bnb_nested_quant": "nf4 always has double quantization: the scales are stored in 8 bits",
    "bnb_4bit_quant_storage": "the scheme determines the format of the codes",
    "constraints": "constrained decoding is not supported; --filter adds a filter of your own",
    "force_words_ids": "constrained decoding is not supported; --filter adds a filter of your own",
    "grammar": "constrained decoding is not supported; --filter adds a filter of your own",
    "json_schema": "constrained decoding is not supported; --filter adds a filter of your own",
    "conversation": "python -m llm_jax.chat starts a conversation",
    "interactive": "python -m llm_jax.chat starts a conversation",
    "dataloader_": "a batch is a function of the seed and the step; data.workers sets the processes that tokenize",
    "dataset_config": "the configuration of a data set is part of its name: data.source=hf:NAME:CONFIG:SPLIT",
    "dataset_config_name": "the configuration of a data set is part of its name: data.source=hf:NAME:CONFIG:SPLIT",
    "dataset_train_split": "the split of a data set is part of its name: data.source=hf:NAME:SPLIT",
    "dataset_test_split": (
        "data.validation_fraction of the data is held out; the split is part of the name: hf:NAME:SPLIT"
    ),
    "dataset_split": "the split of a data set is part of its name: data.source=hf:NAME:SPLIT",
    "dataset_streaming": "the tokens of a data set are cached on disk and memory-mapped",
    "ddp_": "mesh.data is the number of copies of the model; every process runs the same compiled step",
    "disable_dropout": "the model has no dropout; lora.dropout applies to adapters",
    "eos_token": "the tokenizer determines the end-of-text token",
    "pad_token": "padding is masked, and needs no token",
    "exclude_modules": "lora.targets lists the weights that are adapted, by regular expressions over their names",
    "full_determinism": "a run is a function of its configuration; on the same mesh it repeats bit for bit",
    "hub_": "nothing is uploaded; convert --to=hf writes a directory that huggingface_hub uploads",
    "layer_replication": "layers are not replicated",
    "liger_kernel_config": "kernels are chosen for the machine; train.loss_chunk computes the loss in chunks",
    "use_liger_kernel": "kernels are chosen for the machine; train.loss_chunk computes the loss in chunks",
    "llm_int8_": "int8 schemes have no parts in other dtypes; quant.rules and quantize --rule choose schemes by weight",
    "local_rank": "--process_id is the number of a process; --coordinator_address connects several processes",
    "logging_first_step": "metrics.jsonl in the workdir has a line for every step",
    "lora_bias": "adapters train no biases",
    "lora_modules_to_save": (
        "with lora.rank, only adapters are trained; lora.targets may name the embeddings and the head"
    ),
    "lora_task_type": "the model determines the task",
    "task_type": "the model determines the task",
    "lr_scheduler_kwargs": "optim.warmup_steps, optim.final_lr_fraction and the options of optim set the schedule",
    "max_completion_length": "train.seq_len is the number of tokens of a row, including prompt and answer",
    "max_prompt_length": "train.seq_len is the number of tokens of a row, including prompt and answer",
    "max_time": "there is no limit of time; --max_new_tokens limits the tokens",
    "model_revision": (
        "the main branch is taken; for another one, download it (hf download ORG/NAME --revision=X "
        "--local-dir=DIR) and give DIR"
    ),
    "n_gpu_layers": "the model is placed on the default device; JAX_PLATFORMS=cpu, cuda or tpu chooses it",
    "ngl": "the model is placed on the default device; JAX_PLATFORMS=cpu, cuda or tpu chooses it",
    "optim_args": "the options of optim have flags of their own, such as --config.optim.beta1",
    "optim_target_modules": "optim.lr_rules and optim.decay_rules set factors by weight",
    "output_attentions": (
        "llm_jax.model.capture.capture returns attentions and hidden states; show attention draws them"
    ),
    "output_hidden_states": (
        "llm_jax.model.capture.capture returns attentions and hidden states; show attention draws them"
    ),
    "packing_strategy": "documents and examples are always packed into rows, and attention does not cross them",
    "precompute_ref_log_probs": "the reference model of DPO is the model that training starts from (init_from)",
    "file": 'a prompt is text: --prompt="$(cat FILE)"; --prompt may be repeated',
    "split": "the split of a data set is part of its name: hf:NAME:SPLIT",
    "threads": "all CPU cores that the process may use are used",
    "prompt_file": 'a prompt is text: --prompt="$(cat FILE)"; --prompt may be repeated',
    "rpo_alpha": "loss.kind=dpo has the option loss.beta only",
    "ld_alpha": "loss.kind=dpo has the option loss.beta only",
    "f_divergence_type": "loss.kind=dpo has the option loss.beta only",
    "reference_free": "loss.kind=dpo has the option loss.beta only",
    "safe_serialization": "weights are always written as safetensors",
    "save_only_model": "checkpoints contain the state of the optimizer; convert --to=hf writes the weights alone",
    "shuffle_dataset": "rows are always shuffled, by train.seed",
    "sync_ref_model": "the reference model of DPO is the model that training starts from (init_from)",
    "torch_compile_backend": "every step is compiled",
    "torch_compile_mode": "every step is compiled",
    "trainable_token_indices": "adapters of the embeddings are lora.targets=embeddings; single rows are not trained",
    "truncation_mode": "examples that do not fit into train.seq_len are left out or refused, not cut",
    "eval_delay": "eval.every is the number of steps between evaluations",
    "keep_ckpt_steps": "checkpoint.keep_last and checkpoint.keep_best decide what is kept",
    "log_steps": "eval.every is the interval of evaluations; metrics.jsonl has a line for every step",
    "log_training_steps": "metrics.jsonl in the workdir has a line for every step",
    "model_name": "--config=RECIPE and the options of model determine the model",
    "prefetch_to_device": "batches are always prefetched",
    "shuffle_buffer_size": "every epoch is a permutation of all rows, by train.seed",
    "total_epochs": (
        "train.steps is the length of a run; an epoch has about (training tokens) / (train.batch_size * "
        "train.seq_len) steps"
    ),
    "use_qalora": "lora.variant chooses the variant; it is not implemented",
    "corda_config": "lora.variant chooses how adapters are initialized",
    "eva_config": "lora.variant chooses how adapters are initialized",
    "loftq_config": "lora.variant=loftq initializes adapters by the error of quant.scheme",
    "megatron_": "mesh.tensor splits heads, the MLP and the vocabulary",
}


# {(command, flag of another command): the reason or the alternative}.
_OF_COMMANDS = {
    ("chat", "batch_size"): "a chat has one conversation",
    ("convert", "scheme"): "python -m llm_jax.quantize --scheme=nf4 writes a quantized checkpoint",
    ("generate", "batch_size"): "all prompts are decoded in one batch; --prompt may be repeated",
    ("generate", "scheme"): "python -m llm_jax.quantize --scheme=nf4 writes a quantized checkpoint",
    ("chat", "scheme"): "python -m llm_jax.quantize --scheme=nf4 writes a quantized checkpoint",
}


def explanation(name: str, command: str = "") -> str:
    """The reason or alternative for the option or flag `name` of another codebase; "" for unknown names.

    Args:
      command: name of the command that has no flag `name`, which another command may have.
    """
    if (command, name) in _OF_COMMANDS:
        return _OF_COMMANDS[command, name]
    if name in EXPLAINED:
        return EXPLAINED[name]
    return next((text for prefix, text in EXPLAINED.items() if prefix.endswith("_") and name.startswith(prefix)), "")
