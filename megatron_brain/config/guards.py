"""What a run does when the numbers of a step are wrong."""

from dataclasses import dataclass
from typing import Literal

from megatron_brain.errors import ConfigError


@dataclass(kw_only=True)
class GuardConfig:
    """What to do about steps whose loss or gradient is not finite or is a spike, and about replicas that differ."""

    on_nan: Literal["skip", "stop"] = "stop"
    """What to do with a step whose loss or gradient is not finite: stop the run, or go on without the update."""

    max_consecutive_skips: int = 10
    """Largest number of steps in a row that may be skipped; one more stops the run."""

    loss_spike_factor: float | None = None
    """A loss above this many times the median of the last applied steps is a spike; unset: off. It needs losses well
    above zero, which those of BRAIn may not be."""

    loss_spike_window: int = 20
    """Number of applied steps for the median of the loss; before so many steps there are no loss spikes."""

    grad_norm_limit: float | None = None
    """A gradient norm (before clipping) above this is a spike; unset: off."""

    on_spike: Literal["warn", "skip", "stop"] = "warn"
    """What to do with a spike: apply the update with a warning, go on without the update, or stop the run."""

    check_replicas_interval: int | None = None
    """Steps between comparisons of the weights that several processes hold; unset: no comparison."""

    def __post_init__(self) -> None:
        for name in ("max_consecutive_skips", "loss_spike_window", "check_replicas_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if self.loss_spike_factor is not None and self.loss_spike_factor <= 1:
            raise ConfigError(f"loss_spike_factor={self.loss_spike_factor}: must be above 1, the median itself")
        if self.grad_norm_limit is not None and self.grad_norm_limit <= 0:
            raise ConfigError(f"grad_norm_limit={self.grad_norm_limit}: must be positive")
