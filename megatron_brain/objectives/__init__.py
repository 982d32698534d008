"""Losses as pure functions of tensors. Nothing here knows of processes, models or batches."""
