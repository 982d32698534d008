"""Errors of checkpoints, and what helps against them."""

from megatron_brain.errors import ConfigError

COPY = "Copy it again from where it was saved, or load an earlier checkpoint (--load DIR/iter_NNNNNNN)"
"""What helps if a file is not complete."""

CURE = (
    "Copy it again from where it was saved, load an earlier checkpoint (--load DIR/iter_NNNNNNN), or load it as it is "
    "with --no-verify"
)
"""What helps if a file is not what was saved, but may be complete."""


class CheckpointError(RuntimeError):
    """Some rank could not write or read a checkpoint. All ranks raise it."""


class DamagedError(ConfigError):
    """A checkpoint exists, but it is not what was saved, or no longer."""
