"""`python -m llm_jax`: the commands."""

COMMANDS = {
    "train": "train a model, or go on with a run",
    "evaluate": "held-out loss, perplexity and bits per byte of a checkpoint",
    "generate": "continue a prompt with a checkpoint",
}

if __name__ == "__main__":
    print("python -m llm_jax.COMMAND --help\n")
    for name, what in COMMANDS.items():
        print(f"  {name:<10} {what}")
