"""What stages that train on a fixed set of samples have in common."""

import logging
import math
from collections.abc import Sequence

from megatron_brain.config.errors import ConfigError
from megatron_brain.data.groups import Group
from megatron_brain.data.order import SampleOrder, replica_share
from megatron_brain.models.provider import Head
from megatron_brain.training.run import Run
from megatron_brain.training.trainer import Trainer
from megatron_brain.training.validation import mean_loss

log = logging.getLogger(__name__)


class SampledStage:
    """A stage over a list of samples, each a few groups: shuffled epochs to train on, a fixed list to validate on.

    Every replica holds all samples; which ones a step takes follows from the seed and the iteration.
    """

    head: Head
    mean_metrics: tuple[str, ...] = ()
    max_metrics: tuple[str, ...] = ()

    def __init__(self, run: Run, train: Sequence[Sequence[Group]], valid: Sequence[Sequence[Group]]) -> None:
        settings = run.config.training
        self.shared_prefix = settings.shared_prefix
        self._train, self._valid = train, valid
        self._order = SampleOrder(len(train), seed=settings.seed)
        epochs = settings.train_epochs or 1.0
        self.train_iters = settings.train_iters or math.ceil(epochs * len(train) / settings.global_batch_size)
        if run.config.optimizer.lr_warmup_iters >= self.train_iters:
            raise ConfigError(
                f"lr_warmup_iters={run.config.optimizer.lr_warmup_iters} must be less than the {self.train_iters} "
                f"iterations that {epochs:g} epochs of {len(train)} samples make"
            )
        log.info("%d samples, %d iterations of %d", len(train), self.train_iters, settings.global_batch_size)

    def micro_batches(self, trainer: Trainer) -> list[list[Group]]:
        """This replica's micro-batches of the next step."""
        settings, parallel = trainer.config.training, trainer.parallel
        shares = replica_share(
            self._order.step(trainer.iteration, settings.global_batch_size),
            micro_batch_size=settings.micro_batch_size,
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp_size,
        )
        return [[group for index in share for group in self._train[index]] for share in shares]

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """Loss and metrics on the validation samples."""
        if not self._valid:
            return {}
        return mean_loss(
            trainer.chunks,
            self._valid,
            self.loss,
            trainer.parallel,
            micro_batch_size=trainer.config.training.micro_batch_size,
            shared_prefix=self.shared_prefix,
            mean_names=self.mean_metrics,
            max_names=self.max_metrics,
        )

    def before_update(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Nothing to check."""

    def after_step(self, trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
        """Nothing to add."""
        return {}

    def state_dict(self) -> dict:
        """The position in the data follows from the iteration; the number of samples guards against other data."""
        return {"num_samples": len(self._train)}

    def load_state_dict(self, state: dict) -> None:
        """Refuse to go on with other data.

        Raises:
            ValueError: the earlier run had another number of samples.
        """
        if state["num_samples"] != len(self._train):
            raise ConfigError(
                f"the run to resume had {state['num_samples']} samples, --train-data now gives {len(self._train)}: "
                "resume with the same data and lengths, or start anew with --finetune"
            )
