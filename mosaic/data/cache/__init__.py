"""Latents and embeddings that are computed once and kept on disk."""
