"""Attributes of other libraries, and what does the same here. This module imports nothing of the package."""

# Attributes that modules, models and tokenizers of other codebases have, and what does the same here.
ATTRIBUTES = {
    "AutoModel": "llm_jax.load",
    "AutoModelForCausalLM": "llm_jax.load",
    "AutoModelForSequenceClassification": "llm_jax.load",
    "AutoPeftModelForCausalLM": "llm_jax.load",
    "AutoTokenizer": "llm_jax.load, or checkpoints.load_tokenizer",
    "BitsAndBytesConfig": "the option quant.scheme, or python -m llm_jax.quantize",
    "DPOConfig": "llm_jax.config, with data.kind=preferences and loss.kind=dpo",
    "DPOTrainer": "llm_jax.train, with data.kind=preferences and loss.kind=dpo",
    "DecodingOptions": "llm_jax.decoding.options.DecodingOptions",
    "GenerationConfig": "llm_jax.decoding.options.DecodingOptions",
    "LoraConfig": 'the options of lora: llm_jax.config(RECIPE, {"lora.rank": 8})',
    "PeftModel": "llm_jax.load, or checkpoints.load_separately",
    "SFTConfig": "llm_jax.config, with data.kind=instructions",
    "SFTTrainer": "llm_jax.train, with data.kind=instructions",
    "TextStreamer": "the argument show of llm_jax.decoding.complete.complete",
    "Trainer": "llm_jax.train",
    "TrainingArguments": "llm_jax.config",
    "apply_chat_template": "llm_jax.apply_chat_template(tokenizer, messages)",
    "attentions": "llm_jax.model.capture.capture(model, params, tokens).attentions",
    "batch_decode": "tokenizer.decode of each",
    "bos_token_id": "tokenizer.bos",
    "capture": "llm_jax.model.capture.capture",
    "complete": "llm_jax.decoding.complete.complete",
    "convert_ids_to_tokens": "tokenizer.decode of each id",
    "convert_tokens_to_ids": "tokenizer.encode",
    "encode_plus": "tokenizer.encode",
    "eos_token": "tokenizer.special",
    "eos_token_id": "tokenizer.eos",
    "from_pretrained": "llm_jax.load",
    "generate": "llm_jax.decoding.complete.complete(model, params, tokenizer, prompts)",
    "get_peft_model": "llm_jax.lora.init and llm_jax.lora.attach",
    "get_vocab": "tokenizer.vocab_size, encode and decode",
    "hidden_states": "llm_jax.model.capture.capture(model, params, tokens).hidden_states",
    "load_dataset": "the option data.source",
    "load_model": "llm_jax.load",
    "load_adapter": "llm_jax.load, or checkpoints.load_separately",
    "merge_and_unload": "llm_jax.lora.merge, or python -m llm_jax.convert --to=hf",
    "pad_token": "no token: padding is masked",
    "pad_token_id": "no token: padding is masked",
    "pipeline": "llm_jax.decoding.complete.complete(model, params, tokenizer, prompts)",
    "prepare_model_for_kbit_training": "the option quant.scheme",
    "push_to_hub": "no function: convert --to=hf writes a directory that huggingface_hub uploads",
    "set_seed": "the options train.seed and DecodingOptions.seed",
    "save_pretrained": "llm_jax.save(model, params, tokenizer, path), or python -m llm_jax.convert --to=hf",
    "tokenize": "tokenizer.encode, and decode of each id",
}


def no_attribute(owner: str, name: str) -> AttributeError:
    """The error for an attribute that `owner` lacks, with what does the same if another codebase has it."""
    cure = f"; here it is {ATTRIBUTES[name]}" if name in ATTRIBUTES else ""
    return AttributeError(f"{owner} has no attribute '{name}'{cure}")
