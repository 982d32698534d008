"""Reward model: a scalar head on the trunk, Bradley-Terry loss on preference pairs."""

import dataclasses
import logging

import torch
from torch import Tensor

from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.data.records import preference_groups
from megatron_brain.data.sources import load_records
from megatron_brain.objectives.bradley_terry import bradley_terry_losses
from megatron_brain.stages.samples import SampledStage
from megatron_brain.training.report import LossOutput
from megatron_brain.training.run import Run
from megatron_brain.training.trainer import Trainer

log = logging.getLogger(__name__)


class RewardStage(SampledStage):
    """Samples are pairs; the loss is the mean over pairs of the global batch."""

    head = "reward"
    mean_metrics = ("accuracy", "reward_margin", "reward_chosen", "reward_rejected")

    def __init__(self, run: Run) -> None:
        data = run.config.data
        self._centering = run.config.reward.centering_coefficient
        train = self._read(run, data.train_data, data.train_split, data.max_train_records)
        valid = self._read(run, data.valid_data, data.valid_split, data.max_valid_records) if data.valid_data else []
        super().__init__(run, train, valid)

    def _read(self, run: Run, source: str, split: str, limit: int | None) -> list[list[Group]]:
        pairs, report = preference_groups(load_records(source, split, limit), run.tokenizer, run.config.data)
        log.info("%s: %s", source, report)
        return [[dataclasses.replace(pair.group, values={"margin": (pair.margin,)})] for pair in pairs]

    def loss(self, output: Tensor, batch: PackedBatch) -> LossOutput:
        """Output: rewards `[R]`, chosen and rejected in turn."""
        chosen, rejected = output[0::2], output[1::2]
        losses = bradley_terry_losses(chosen, rejected, batch.values("margin"), centering_coefficient=self._centering)
        pairs = len(losses)
        with torch.no_grad():
            # A tie is half right, as a coin would be.
            right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
            means = {
                "accuracy": right,
                "reward_margin": chosen - rejected,
                "reward_chosen": chosen,
                "reward_rejected": rejected,
            }
        return LossOutput(
            loss_sum=losses.sum(), count=pairs, means={name: (v.detach().sum(), pairs) for name, v in means.items()}
        )


def main(run: Run) -> None:
    """Train."""
    Trainer(run, RewardStage(run)).train()
