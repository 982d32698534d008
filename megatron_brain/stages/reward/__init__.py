"""The reward model."""
