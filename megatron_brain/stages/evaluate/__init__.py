"""Comparison of checkpoints on held-out prompts."""
