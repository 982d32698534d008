"""What is wrong with a checkpoint that is there, and what helps."""

from megatron_brain.errors import ConfigError

COPY = "Copy it again from where it was saved, or load an earlier checkpoint (--load DIR/iter_NNNNNNN)"
"""What helps where a file is not whole."""

CURE = (
    "Copy it again from where it was saved, load an earlier checkpoint (--load DIR/iter_NNNNNNN), or load it as it is "
    "with --no-verify"
)
"""What helps where a file may be whole and is not what was saved."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read on some rank; raised on all of them."""


class DamagedError(ConfigError):
    """A checkpoint is there and not, or no more, what was saved."""
