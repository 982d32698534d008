"""Loss and metrics of micro-batches of whole groups, for any objective."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_brain.data.groups import KnownLoss, PackedBatch
from megatron_brain.objectives.objective import Numbers, Objective
from megatron_brain.training.report import LossOutput


class GroupLoss:
    """The objective's loss and metrics, and the metrics that the stage has with every objective."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.mean_metrics = (*objective.mean_metrics, "reward_mean", "reward_std", "unfinished_fraction")
        self.max_metrics = objective.max_metrics
        self.names = (*objective.needs, objective.fixes, "finished")
        """The numbers of each response that must be known besides log q_theta."""

    def of_batch(self, output: Tensor, batch: PackedBatch) -> LossOutput:
        """Report of a packed micro-batch of whole groups, from the log-probabilities `[N]` of its response tokens."""
        sizes = [len(group.responses) for group in batch.groups]
        columns = [values.split(sizes) for values in (batch.sum_per_response(output), *map(batch.values, self.names))]
        groups = [(values, dict(zip(self.names, known, strict=True))) for values, *known in zip(*columns, strict=True)]
        report = self.of_groups(groups)
        # The backward pass of the pipeline needs a loss with a graph, even without groups.
        return report if groups else dataclasses.replace(report, loss_sum=output.sum())

    def of_groups(self, groups: Sequence[tuple[Tensor, Numbers]]) -> LossOutput:
        """Report of any number of groups, from log q_theta `[n]` and the numbers `names` of each."""
        losses = [self.objective.loss(log_policy, numbers) for log_policy, numbers in groups]
        measured = [self._measure(log_policy.detach(), numbers) for log_policy, numbers in groups]
        nothing, least, count = torch.zeros(()), torch.tensor(-torch.inf), len(groups)
        sums = {name: sum((each[name] for each in measured), nothing) for name in self.mean_metrics}
        peaks = {name: [each[name] for each in measured] for name in self.max_metrics}
        return LossOutput(
            loss_sum=torch.stack(losses).sum() if losses else nothing,
            count=count,
            means={name: (total, count) for name, total in sums.items()},
            maxima={name: torch.stack(values).max() if values else least for name, values in peaks.items()},
        )

    def _measure(self, log_policy: Tensor, numbers: Numbers) -> dict[str, Tensor]:
        rewards = numbers["reward"]
        return {
            **self.objective.measure(log_policy, numbers),
            "reward_mean": rewards.mean(),
            "reward_std": rewards.std(),
            "unfinished_fraction": 1.0 - numbers["finished"].mean(),
        }


def as_known(report: LossOutput) -> KnownLoss:
    """The report as plain numbers, for a later pass over the same groups."""
    return KnownLoss(
        loss_sum=report.loss_sum.item(),
        count=report.count,
        mean_sums={name: float(total) for name, (total, _) in report.means.items()},
        maxima={name: value.item() for name, value in report.maxima.items()},
    )


def of_known(output: Tensor, batch: PackedBatch) -> LossOutput:
    """Report of a micro-batch whose loss and gradient an earlier pass has computed.

    Its value is the known loss. Its gradient is that of the log-probabilities `[N]` weighted by constants.
    """
    known = batch.known_loss
    moving = (batch.known_gradient * (output - output.detach())).sum()
    return LossOutput(
        loss_sum=known.loss_sum + moving,
        count=known.count,
        means={name: (torch.tensor(value), known.count) for name, value in known.mean_sums.items()},
        maxima={name: torch.tensor(value) for name, value in known.maxima.items()},
    )
