"""Other people's checkpoints: Hugging Face directories and GGUF files, in and out."""
