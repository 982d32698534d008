"""The common part of policy-gradient objectives: advantages fixed for a round, and clipped ratios to the proposal.

A response is one action: the ratio is that of whole sequences, rho = q_theta(y|x) / q'(y|x). With advantage A
the loss of a response (Schulman et al. 2017, arXiv 1707.06347, eq. 7) is

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)

and the loss of a group is the mean over its n responses. The gradient of a response is 0 once its ratio is beyond the
bound in the direction in which its advantage pushes it.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from megatron_brain.errors import UserError
from megatron_brain.objectives.importance import IMPORTANCE_MAXIMA, IMPORTANCE_MEANS, check_group, importance_metrics
from megatron_brain.objectives.objective import Numbers, RefreshCheck


class PolicyGradientObjective(ABC):
    """The clipped loss. A subclass defines the advantages.

    Args:
        kl_coefficient: weight of the divergence from the prior, >= 0.
        clip_ratio: epsilon > 0.
    """

    needs: tuple[str, ...] = ("log_prior", "reward", "log_proposal")
    fixes = "advantage"
    group_multiple = 1
    mean_metrics: tuple[str, ...] = (*IMPORTANCE_MEANS, "clipped_fraction")
    max_metrics: tuple[str, ...] = (*IMPORTANCE_MAXIMA, "ratio_error_at_refresh")
    refresh_check: RefreshCheck | None = RefreshCheck(
        "ratio_error_at_refresh", "every ratio of policy and proposal is 1"
    )

    def __init__(self, *, kl_coefficient: float, clip_ratio: float) -> None:
        self.kl_coefficient = kl_coefficient
        self._low, self._high = 1.0 - clip_ratio, 1.0 + clip_ratio

    @abstractmethod
    def advantages(self, numbers: Numbers) -> Tensor:
        """The advantages A `[n]`."""

    def fix(self, numbers: Numbers) -> Tensor:
        """The advantages `[n]`.

        Raises:
            UserError: an advantage is not finite.
        """
        check_group(numbers["reward"])
        advantages = self.advantages(numbers)
        if not advantages.isfinite().all():
            known = {name: numbers[name].tolist() for name in self.needs}
            raise UserError(f"no advantages follow from {known}: all must be finite")
        return advantages

    def loss(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """Mean over responses. It is negative where the policy improves."""
        ratio, advantage = _ratios(log_policy, numbers), numbers["advantage"]
        # This equals min(rho A, clip(rho) A), but an infinite ratio gives no 0 x inf.
        clipped = torch.where(advantage < 0, ratio.clamp(min=self._low), ratio.clamp(max=self._high))
        return -(clipped * advantage).mean()

    @torch.no_grad()
    def gradient(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """-rho A / n, and 0 where the ratio is clipped."""
        ratio = _ratios(log_policy, numbers)
        moving = torch.where(self._is_clipped(ratio, numbers["advantage"]), 0.0, ratio)
        return -moving * numbers["advantage"] / len(log_policy)

    def measure(self, log_policy: Tensor, numbers: Numbers) -> dict[str, Tensor]:
        """Distances of the policy from proposal and prior, estimates for the policy, the share of responses without a
        gradient, and the largest |ratio - 1|."""
        ratio = _ratios(log_policy, numbers)
        return {
            **importance_metrics(log_policy, numbers),
            "clipped_fraction": self._is_clipped(ratio, numbers["advantage"]).to(ratio.dtype).mean(),
            "ratio_error_at_refresh": (ratio - 1.0).abs().max(),
        }

    def _is_clipped(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return torch.where(advantage < 0, ratio < self._low, ratio > self._high)


def _ratios(log_policy: Tensor, numbers: Numbers) -> Tensor:
    return torch.exp(log_policy - numbers["log_proposal"])
