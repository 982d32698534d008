"""Reward model: a scalar head on the trunk, Bradley-Terry loss on preference pairs."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_brain.config.stage_spec import TRAIN_DATA, VALID_DATA
from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.data.on_demand import OnDemand
from megatron_brain.data.records import PreferencePair
from megatron_brain.objectives.bradley_terry import bradley_terry_losses
from megatron_brain.stages.dataset_stage import DatasetStage
from megatron_brain.training.best import Direction
from megatron_brain.training.report import LossOutput
from megatron_brain.training.run import Run


class RewardStage(DatasetStage):
    """Samples are pairs; the loss is the mean over pairs of the global batch."""

    mean_metrics = ("accuracy", "reward_margin", "reward_chosen", "reward_rejected")
    directions: Mapping[str, Direction] = {"loss": "lowest", "accuracy": "highest", "reward_margin": "highest"}
    shown_metrics = ("loss", "accuracy", "reward_margin", "tokens_per_second")

    def __init__(self, run: Run) -> None:
        self._centering = run.config.reward.centering_coefficient
        super().__init__(run, _samples(run.read(TRAIN_DATA)), _samples(run.read(VALID_DATA)))

    def loss(self, output: Tensor, batch: PackedBatch) -> LossOutput:
        """Loss from `output`, the rewards `[R]`, in which chosen and rejected alternate."""
        chosen, rejected = output[0::2], output[1::2]
        losses = bradley_terry_losses(chosen, rejected, batch.values("margin"), centering_coefficient=self._centering)
        pairs = len(losses)
        with torch.no_grad():
            # A tie counts one half, like a coin. The rewards of equal responses may differ by rounding.
            equal = [group.responses[0] == group.responses[1] for group in batch.groups]
            tie = (chosen == rejected) | torch.tensor(equal, dtype=torch.bool, device=chosen.device)
            right = torch.where(tie, 0.5, (chosen > rejected).float())
            means = {
                "accuracy": right,
                "reward_margin": chosen - rejected,
                "reward_chosen": chosen,
                "reward_rejected": rejected,
            }
        return LossOutput(
            loss_sum=losses.sum(), count=pairs, means={name: (v.detach().sum(), pairs) for name, v in means.items()}
        )


def _samples(pairs: Sequence[PreferencePair]) -> Sequence[Sequence[Group]]:
    return OnDemand(len(pairs), lambda index: [_with_margin(pairs[index])])


def _with_margin(pair: PreferencePair) -> Group:
    return dataclasses.replace(pair.group, values={"margin": (pair.margin,)})
