"""The earlier name of `python -m llm_jax.probe_embeddings`; kept for one version."""

from llm_jax import cli

if __name__ == "__main__":
    cli.run_renamed("embeddings.probe", "probe_embeddings")
