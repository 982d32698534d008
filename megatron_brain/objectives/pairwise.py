"""The common part of the objectives on pairs: which responses are a pair, which one wins, and the loss of a group.

The n responses of a group make n/2 pairs of neighbours: (0, 1), (2, 3), ... Independent draws in any order are random
pairs ("first-round ranking", Liu et al. 2023, arXiv 2309.06657). The response with the larger reward wins. With

    delta = (log q_theta - log p)(winner) - (log q_theta - log p)(loser)

the loss of a group is the mean of a function of delta over its n/2 pairs. A pair whose rewards are equal is a tie.
Its loss is 0, but it counts in the mean, so that all other pairs have the same weight in all groups.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from megatron_brain.errors import UserError
from megatron_brain.objectives.objective import Numbers, RefreshCheck


class PairwiseObjective(ABC):
    """A loss of `delta`. It does not use log q', so responses may come from any distribution.

    Args:
        policy_strength: factor of the log-ratios, > 0.
    """

    needs: tuple[str, ...] = ("log_prior", "reward")
    fixes = "preference"
    group_multiple = 2
    mean_metrics: tuple[str, ...] = ("pair_accuracy", "log_ratio_winner", "log_ratio_loser", "tied_fraction")
    max_metrics: tuple[str, ...] = ()
    refresh_check: RefreshCheck | None = None

    def __init__(self, *, policy_strength: float) -> None:
        self.strength = policy_strength

    @abstractmethod
    def pair_losses(self, delta: Tensor) -> Tensor:
        """Loss of every pair `[n/2]`, as if none were a tie."""

    @abstractmethod
    def pair_slopes(self, delta: Tensor) -> Tensor:
        """Derivative of `pair_losses` in delta `[n/2]`."""

    def fix(self, numbers: Numbers) -> Tensor:
        """The preference `[n]`: 1 for the winner of a pair, -1 for the loser, 0 for both responses of a tie.

        Raises:
            UserError: a reward is NaN.
        """
        rewards = numbers["reward"]
        assert rewards.dim() == 1 and len(rewards) >= 2 and len(rewards) % 2 == 0, (
            f"pairs need an even number of responses in one dimension, got {list(rewards.shape)}"
        )
        if rewards.isnan().any():
            raise UserError(f"no pair can be ranked by the rewards {rewards.tolist()}")
        first, second = rewards[0::2], rewards[1::2]
        sign = (first > second).to(rewards.dtype) - (first < second).to(rewards.dtype)
        return torch.stack([sign, -sign], dim=1).flatten()

    def loss(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """Mean over pairs; the loss of a tie is 0."""
        return torch.where(_is_tie(numbers), 0.0, self.pair_losses(_deltas(log_policy, numbers))).mean()

    @torch.no_grad()
    def gradient(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """The slope of the response's pair over n/2, times its preference."""
        slopes = self.pair_slopes(_deltas(log_policy, numbers)) / (len(log_policy) // 2)
        return numbers["preference"] * slopes.repeat_interleave(2)

    def measure(self, log_policy: Tensor, numbers: Numbers) -> dict[str, Tensor]:
        """Share of pairs whose delta is positive (a delta of 0 and a tie count one half), the mean log-ratios
        log q_theta - log p of winners and of losers over the pairs that are not ties, and the share of ties.

        If all pairs are ties, the log-ratios are 0.
        """
        tied, delta = _is_tie(numbers), _deltas(log_policy, numbers)
        log_ratio, preference = log_policy - numbers["log_prior"], numbers["preference"]
        ranked = (~tied).sum().clamp(min=1)
        return {
            "pair_accuracy": (0.5 + 0.5 * delta.sign()).mean(),
            "log_ratio_winner": torch.where(preference > 0, log_ratio, 0.0).sum() / ranked,
            "log_ratio_loser": torch.where(preference < 0, log_ratio, 0.0).sum() / ranked,
            "tied_fraction": tied.to(delta.dtype).mean(),
        }


def _deltas(log_policy: Tensor, numbers: Numbers) -> Tensor:
    """delta `[n/2]`, 0 for ties."""
    signed = numbers["preference"] * (log_policy - numbers["log_prior"])
    return signed[0::2] + signed[1::2]


def _is_tie(numbers: Numbers) -> Tensor:
    return numbers["preference"][0::2] == 0
