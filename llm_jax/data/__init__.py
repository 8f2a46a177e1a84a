"""Text to batches: sources of documents, the token cache, rows, and batch = f(seed, step)."""
