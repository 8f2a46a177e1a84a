"""`python -m llm_jax`: the commands."""

import sys

COMMANDS = {
    "train": "train a model, or go on with a run",
    "evaluate": "held-out loss, perplexity and bits per byte of a checkpoint, or its accuracy in a task",
    "generate": "continue a prompt, or answer it, with a checkpoint",
    "quantize": "a checkpoint with weights of 8 bits or fewer",
    "convert": "a checkpoint into Hugging Face's form or a GGUF file",
    "tokenizers.train": "a tokenizer of any kind from text",
    "tokenizers.show": "a text cut into tokens by one or several tokenizers",
    "embeddings.train": "word vectors by word2vec or GloVe",
    "embeddings.probe": "neighbours, analogies, agreement with people, a map of word vectors",
    "data.show": "rows as the model sees them: segments, and what the loss counts",
    "plan": "what a run would take, before it runs",
    "data.assets": "real models and texts: list, fetch, verify",
}

if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1:] != ["--help"]:
        print(f"error: commands are modules: python -m llm_jax.{sys.argv[1]}", file=sys.stderr)
        sys.exit(2)
    print("python -m llm_jax.COMMAND --help\n")
    for name, what in COMMANDS.items():
        print(f"  {name:<16} {what}")
