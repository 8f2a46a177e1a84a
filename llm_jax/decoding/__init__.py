"""Decoding: samplers, beam search, contrastive search and speculative decoding."""
