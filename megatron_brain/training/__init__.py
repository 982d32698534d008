"""The one training loop and what it is made of: schedule, optimizer, checkpoints, metrics."""
