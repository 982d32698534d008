"""How many steps a run takes: functions of its settings and of the number of its records."""

import math

from megatron_brain.config.run import RunConfig
from megatron_brain.config.training import TrainingConfig
from megatron_brain.errors import ConfigError


def iterations(training: TrainingConfig, num_samples: int) -> int:
    """Steps of a run over a list of samples: --train-iters, or --train-epochs rounded up to whole steps."""
    epochs = training.train_epochs or 1.0
    return training.train_iters or math.ceil(epochs * num_samples / training.global_batch_size)


def rounds(epochs: float, num_prompts: int, groups_per_round: int) -> int:
    """Rounds of so many passes over the prompts, rounded up."""
    return math.ceil(epochs * num_prompts / groups_per_round)


def steps_per_round(config: RunConfig, groups_per_round: int) -> int:
    """Optimizer steps between refreshes of the proposal: --refresh-interval, or one pass over the round."""
    return config.brain.refresh_interval or max(1, groups_per_round // config.training.global_batch_size)


def check_warmup(config: RunConfig, train_iters: int) -> None:
    """Warm-up ends before the run does, whose length may follow from its records.

    Raises:
        ConfigError: it does not.
    """
    warmup = config.optimizer.lr_warmup_iters
    if warmup and warmup >= train_iters:
        raise ConfigError(f"lr_warmup_iters={warmup} must be less than the run's {train_iters} iterations")
