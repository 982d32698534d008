"""GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3 and 4) on whole responses.

The paper computes a ratio and a divergence per token and takes their mean over the tokens of a response. Here a
response is one action: the ratio is the product of the tokens' ratios, and the divergence is estimated from the sum of
their log-ratios. docs/stages.md says where both are equal.
"""

import torch
from torch import Tensor

from megatron_brain.objectives.objective import Numbers
from megatron_brain.objectives.policy_gradient import PolicyGradientObjective

_LEAST_DEVIATION = 1e-4
"""This is added to the deviation, as in TRL, so that equal rewards give advantages of 0."""


class GRPO(PolicyGradientObjective):
    """A_i = (r_i - mean r) / (std r + 1e-4), std with n - 1. The loss also has kl_coefficient times the mean over
    responses of p/q_theta - log(p/q_theta) - 1. For responses of the policy this is an unbiased estimate of
    KL(q_theta || p) that is never negative (k3 of Schulman, http://joschu.net/blog/kl-approx.html)."""

    def advantages(self, numbers: Numbers) -> Tensor:
        rewards = numbers["reward"]
        return (rewards - rewards.mean()) / (rewards.std() + _LEAST_DEVIATION)

    def loss(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """The clipped loss plus the weighted divergence."""
        clipped = super().loss(log_policy, numbers)
        if not self.kl_coefficient:  # The estimate may overflow, and 0 x inf is NaN.
            return clipped
        log_ratio = numbers["log_prior"] - log_policy
        return clipped + self.kl_coefficient * (torch.expm1(log_ratio) - log_ratio).mean()

    @torch.no_grad()
    def gradient(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """The gradient of the clipped loss plus kl_coefficient (1 - p/q_theta) / n."""
        clipped = super().gradient(log_policy, numbers)
        if not self.kl_coefficient:
            return clipped
        return clipped - self.kl_coefficient * torch.expm1(numbers["log_prior"] - log_policy) / len(log_policy)
