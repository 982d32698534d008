"""Losses as pure functions of tensors. Nothing here knows about processes, models or batches."""
