"""Attributes of other libraries, and what does the same here. This module imports nothing of the package."""

# Attributes that modules, models and tokenizers of other codebases have, and what does the same here.
ATTRIBUTES = {
    "AutoModel": "llm_jax.load",
    "AutoModelForCausalLM": "llm_jax.load",
    "AutoModelForSequenceClassification": "llm_jax.load",
    "AutoPeftModelForCausalLM": "llm_jax.load",
    "AutoTokenizer": "llm_jax.load, or checkpoints.load_tokenizer",
    "DPOTrainer": "llm_jax.train, with data.kind=preferences and loss.kind=dpo",
    "GPT": "llm_jax.model.transformer.Transformer(config.model)",
    "GPTConfig": "llm_jax.config",
    "GenerationConfig": "llm_jax.decoding.options.DecodingOptions",
    "LoraConfig": 'the options of lora: llm_jax.config(RECIPE, {"lora.rank": 8})',
    "PeftModel": "llm_jax.load, or checkpoints.load_separately",
    "SFTTrainer": "llm_jax.train, with data.kind=instructions",
    "Trainer": "llm_jax.train",
    "TrainingArguments": "llm_jax.config",
    "apply_chat_template": "llm_jax.apply_chat_template(tokenizer, messages)",
    "batch_decode": "tokenizer.decode of each",
    "bos_token_id": "tokenizer.bos",
    "configure_optimizers": "the options of optim; setup_lib.setup(config, vocab_size) returns the compiled step",
    "convert_ids_to_tokens": "tokenizer.decode of each id",
    "eos_token": "tokenizer.special",
    "eos_token_id": "tokenizer.eos",
    "estimate_loss": "python -m llm_jax.evaluate, or setup.loss(params, frozen, batch)",
    "estimate_mfu": "the column mfu of metrics.jsonl; python -m llm_jax.plan prints the FLOPs of a step",
    "forward": 'model.apply({"params": params}, tokens)',
    "from_pretrained": "llm_jax.load",
    "generate": "llm_jax.decoding.complete.complete(model, params, tokenizer, prompts)",
    "get_batch": "setup.batches(data.train, start, stop), after trainer.prepare(config)",
    "get_num_params": "sum(leaf.size for leaf in jax.tree.leaves(params))",
    "get_peft_model": "llm_jax.lora.init and llm_jax.lora.attach",
    "get_vocab": "tokenizer.vocab_size, encode and decode",
    "itos": "tokenizer.decode",
    "load_dataset": "the option data.source",
    "load_model": "llm_jax.load",
    "load_state_dict": "params, an argument of model.apply",
    "merge_and_unload": "llm_jax.lora.merge, or python -m llm_jax.convert --to=hf",
    "pad_token": "no token: padding is masked",
    "pad_token_id": "no token: padding is masked",
    "parameters": "params, the second result of llm_jax.load",
    "pipeline": "llm_jax.decoding.complete.complete(model, params, tokenizer, prompts)",
    "push_to_hub": "no function: convert --to=hf writes a directory that huggingface_hub uploads",
    "save_pretrained": "llm_jax.save(model, params, tokenizer, path), or python -m llm_jax.convert --to=hf",
    "state_dict": "params, the second result of llm_jax.load",
    "stoi": "tokenizer.encode",
}


def no_attribute(owner: str, name: str) -> AttributeError:
    """The error for an attribute that `owner` lacks, with what does the same if another codebase has it."""
    cure = f"; here it is {ATTRIBUTES[name]}" if name in ATTRIBUTES else ""
    return AttributeError(f"{owner} has no attribute '{name}'{cure}")
