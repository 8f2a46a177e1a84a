"""The earlier name of `python -m llm_jax.show rows`; kept for one version."""

from llm_jax import cli

if __name__ == "__main__":
    cli.run_renamed("data.show", "show", "rows")
