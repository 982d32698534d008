"""The number of steps of a run, from its settings and the number of its records."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_brain.config.run import RunConfig
from megatron_brain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """Optimizer steps of a run, as far as they are known."""

    train_iters: int | None
    """Steps of the run; None where they depend on records whose number is not known."""
    num_rounds: int | None = None
    """Rounds that the records fill; None: it is not known, or the stage has no rounds."""
    steps_per_round: int | None = None


def length_by_epochs(config: RunConfig, num_samples: int | None) -> RunLength:
    """Length of a run over a list of samples: --train-iters, or --train-epochs rounded up to whole steps."""
    training = config.training
    if training.train_iters is not None or num_samples is None:
        return RunLength(train_iters=training.train_iters)
    return RunLength(train_iters=math.ceil((training.train_epochs or 1.0) * num_samples / training.global_batch_size))


def length_by_rounds(config: RunConfig, num_prompts: int | None) -> RunLength:
    """Length of a run in rounds of --prompts-per-round: --train-iters, or --train-epochs rounded up to whole rounds."""
    groups = config.brain.prompts_per_round
    epochs = config.training.train_epochs or 1.0
    return length_of_rounds(config, None if num_prompts is None else math.ceil(epochs * num_prompts / groups), groups)


def length_of_rounds(config: RunConfig, num_rounds: int | None, groups_per_round: int) -> RunLength:
    """Length of a run: --train-iters, or that of `num_rounds` rounds.

    A round has --refresh-interval steps, or those of one pass over the round.
    """
    steps = config.brain.refresh_interval or max(1, groups_per_round // config.training.global_batch_size)
    by_rounds = None if num_rounds is None else num_rounds * steps
    return RunLength(train_iters=config.training.train_iters or by_rounds, num_rounds=num_rounds, steps_per_round=steps)


def check_warmup(config: RunConfig, train_iters: int) -> None:
    """Check that warm-up ends before the run, whose length may depend on its records.

    Raises:
        ConfigError: it does not.
    """
    warmup = config.optimizer.lr_warmup_iters
    if warmup and warmup >= train_iters:
        raise ConfigError(f"lr_warmup_iters={warmup} must be less than the run's {train_iters} iterations")
