"""Attributes of other libraries and their equivalents here. This module imports nothing of the package."""

from collections.abc import Mapping

# {attribute of modules, models and tokenizers of other codebases: its equivalent here}.
ATTRIBUTES = {
    "apply_chat_template": "llm_jax.apply_chat_template(tokenizer, messages)",
    "attentions": "llm_jax.model.capture.capture(model, params, tokens).attentions",
    "AutoModel": "llm_jax.load",
    "AutoModelForCausalLM": "llm_jax.load",
    "AutoModelForSequenceClassification": "llm_jax.load",
    "AutoPeftModelForCausalLM": "llm_jax.load",
    "AutoTokenizer": "llm_jax.load, or checkpoints.load_tokenizer",
    "batch_decode": "tokenizer.decode of each",
    "BitsAndBytesConfig": "the option quant.scheme, or python -m llm_jax.quantize",
    "bos_token": "tokenizer.special",
    "bos_token_id": "tokenizer.bos",
    "capture": "llm_jax.model.capture.capture",
    "complete": "llm_jax.decoding.complete.complete",
    "configure_optimizers": "the options of optim; llm_jax.training.setup.setup builds the optimizer and the step",
    "convert_ids_to_tokens": "tokenizer.piece of each id",
    "convert_tokens_to_ids": "tokenizer.encode",
    "DecodingOptions": "llm_jax.decoding.options.DecodingOptions",
    "DPOConfig": "llm_jax.config, with data.kind=preferences and loss.kind=dpo",
    "DPOTrainer": "llm_jax.train, with data.kind=preferences and loss.kind=dpo",
    "encode_plus": "tokenizer.encode",
    "eos_token": "tokenizer.special",
    "eos_token_id": "tokenizer.eos",
    "estimate_loss": "python -m llm_jax.evaluate, or setup.loss(params, frozen, batch)",
    "estimate_mfu": "the column mfu of metrics.jsonl; python -m llm_jax.plan prints the FLOPs of a step",
    "forward": 'model.apply({"params": params}, tokens)',
    "from_pretrained": "llm_jax.load",
    "generate": "llm_jax.decoding.complete.complete(model, params, tokenizer, prompts)",
    "GenerationConfig": "llm_jax.decoding.options.DecodingOptions",
    "get_batch": "setup.batches(data.train, start, stop), after trainer.prepare(config)",
    "get_num_params": "sum(leaf.size for leaf in jax.tree.leaves(params))",
    "get_peft_model": "llm_jax.lora.init and llm_jax.lora.attach",
    "get_vocab": "tokenizer.vocab_size, encode and decode",
    "GPT": "llm_jax.model.transformer.Transformer(config.model)",
    "GPTConfig": "llm_jax.config",
    "hidden_states": "llm_jax.model.capture.capture(model, params, tokens).hidden_states",
    "itos": "tokenizer.decode",
    "load_adapter": "llm_jax.load, or checkpoints.load_separately",
    "load_dataset": "the option data.source",
    "load_model": "llm_jax.load",
    "load_state_dict": "params, an argument of model.apply",
    "LoraConfig": 'the options of lora: llm_jax.config(RECIPE, {"lora.rank": 8})',
    "merge_and_unload": "llm_jax.lora.merge, or python -m llm_jax.convert --to=hf",
    "pad_token": "no token: padding is masked",
    "pad_token_id": "no token: padding is masked",
    "parameters": "params, the second result of llm_jax.load",
    "PeftModel": "llm_jax.load, or checkpoints.load_separately",
    "pipeline": "llm_jax.decoding.complete.complete(model, params, tokenizer, prompts)",
    "prepare_model_for_kbit_training": "the option quant.scheme",
    "push_to_hub": "no function: convert --to=hf writes a directory that huggingface_hub uploads",
    "save_pretrained": "llm_jax.save(model, params, tokenizer, path), or python -m llm_jax.convert --to=hf",
    "set_seed": "the options train.seed and DecodingOptions.seed",
    "SFTConfig": "llm_jax.config, with data.kind=instructions",
    "SFTTrainer": "llm_jax.train, with data.kind=instructions",
    "state_dict": "params, the second result of llm_jax.load",
    "stoi": "tokenizer.encode",
    "TextStreamer": "the argument show of llm_jax.decoding.complete.complete",
    "tokenize": "tokenizer.encode, and tokenizer.piece of each id",
    "Trainer": "llm_jax.train",
    "TrainingArguments": "llm_jax.config",
}

# {attribute of models only (torch.nn.Module, nanoGPT): its equivalent here}.
_SAME_ALWAYS = "not needed: no layer depends on whether the model trains"
_PLACED = "jax.device_put(params, device): the model has no weights"
_CAST = "llm_jax.load(name, dtype=...), or the option model.precision.compute: the model has no weights"
MODEL_ATTRIBUTES = ATTRIBUTES | {
    "bfloat16": _CAST,
    "crop_block_size": "not needed: the model accepts all shorter texts; train.seq_len is the length of rows",
    "cpu": _PLACED,
    "cuda": _PLACED,
    "eval": _SAME_ALWAYS,
    "float": _CAST,
    "half": _CAST,
    "named_parameters": "llm_jax.trees.flatten(params), {name: weight}",
    "requires_grad_": "the argument of jax.grad; the options of lora train adapters over frozen weights",
    "to": _PLACED,
    "train": f"{_SAME_ALWAYS}; llm_jax.train(config, workdir) trains",
    "zero_grad": "not needed: jax.grad returns new gradients",
}

# {keyword argument of the forward pass of other codebases: its equivalent here}.
FORWARD_KEYWORDS = {
    "attention_mask": "metadata=TokenMetadata(positions, segments) of llm_jax.model.attention; segment 0 is padding",
    "idx": "the tokens come after the parameters, without a name",
    "input_ids": "the tokens come after the parameters, without a name",
    "labels": "the model returns logits; jax.nn.log_softmax(logits) has the log-probabilities",
    "output_attentions": "llm_jax.model.capture.capture(model, params, tokens).attentions",
    "output_hidden_states": "llm_jax.model.capture.capture(model, params, tokens).hidden_states",
    "past_key_values": "cache=..., from model.init_cache or an earlier call",
    "position_ids": "metadata=TokenMetadata(positions, segments) of llm_jax.model.attention",
    "return_dict": "the model returns logits, or with a cache (logits, cache)",
    "targets": "the model returns logits; jax.nn.log_softmax(logits) has the log-probabilities",
    "token_type_ids": 'types_BT=... with method="features"; the model calls logits on the features',
    "use_cache": "cache=..., from model.init_cache or an earlier call",
    "where": "it is called metadata since 0.2: metadata=TokenMetadata(positions, segments)",
}


def attribute_error(owner: str, name: str, table: Mapping[str, str] = ATTRIBUTES) -> AttributeError:
    """The error for an attribute that `owner` lacks, with the equivalent of an attribute of another codebase."""
    cure = f"; here it is {table[name]}" if name in table else ""
    return AttributeError(f"{owner} has no attribute '{name}'{cure}")
