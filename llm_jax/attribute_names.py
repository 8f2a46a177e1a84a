"""Attributes of other libraries, and what does the same here. This module imports nothing of the package."""

# Attributes that modules, models and tokenizers of other codebases have, and what does the same here.
ATTRIBUTES = {
    "AutoModel": "llm_jax.load",
    "AutoModelForCausalLM": "llm_jax.load",
    "AutoModelForSequenceClassification": "llm_jax.load",
    "AutoPeftModelForCausalLM": "llm_jax.load",
    "AutoTokenizer": "llm_jax.load, or checkpoints.load_tokenizer",
    "DPOTrainer": "llm_jax.train, with data.kind=preferences and loss.kind=dpo",
    "GenerationConfig": "llm_jax.decoding.options.DecodingOptions",
    "LoraConfig": 'the options of lora: llm_jax.config(RECIPE, {"lora.rank": 8})',
    "PeftModel": "llm_jax.load, or checkpoints.load_separately",
    "SFTTrainer": "llm_jax.train, with data.kind=instructions",
    "Trainer": "llm_jax.train",
    "TrainingArguments": "llm_jax.config",
    "apply_chat_template": "llm_jax.apply_chat_template(tokenizer, messages)",
    "batch_decode": "tokenizer.decode of each",
    "bos_token_id": "tokenizer.bos",
    "convert_ids_to_tokens": "tokenizer.decode of each id",
    "eos_token": "tokenizer.special",
    "eos_token_id": "tokenizer.eos",
    "from_pretrained": "llm_jax.load",
    "generate": "llm_jax.decoding.complete.complete(model, params, tokenizer, prompts)",
    "get_peft_model": "llm_jax.lora.init and llm_jax.lora.attach",
    "get_vocab": "tokenizer.vocab_size, encode and decode",
    "load_dataset": "the option data.source",
    "load_model": "llm_jax.load",
    "merge_and_unload": "llm_jax.lora.merge, or python -m llm_jax.convert --to=hf",
    "pad_token": "no token: padding is masked",
    "pad_token_id": "no token: padding is masked",
    "pipeline": "llm_jax.decoding.complete.complete(model, params, tokenizer, prompts)",
    "push_to_hub": "no function: convert --to=hf writes a directory that huggingface_hub uploads",
    "save_pretrained": "llm_jax.save(model, params, tokenizer, path), or python -m llm_jax.convert --to=hf",
}


def no_attribute(owner: str, name: str) -> AttributeError:
    """The error for an attribute that `owner` lacks, with what does the same if another codebase has it."""
    cure = f"; here it is {ATTRIBUTES[name]}" if name in ATTRIBUTES else ""
    return AttributeError(f"{owner} has no attribute '{name}'{cure}")
