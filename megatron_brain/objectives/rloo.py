"""RLOO: REINFORCE with the other responses of the group as the baseline (Ahmadian et al. 2024, arXiv 2402.14740).

The divergence from the prior is a part of the reward. As in TRL, the ratio to the proposal is clipped. In the first
step after a refresh the ratio is 1, and this is REINFORCE.
"""

from torch import Tensor

from megatron_brain.objectives.objective import Numbers
from megatron_brain.objectives.policy_gradient import PolicyGradientObjective


class RLOO(PolicyGradientObjective):
    """With R_i = r_i - kl_coefficient (log q'(y_i|x) - log p(y_i|x)), A_i is R_i minus the mean of the other R_j."""

    def advantages(self, numbers: Numbers) -> Tensor:
        log_ratio = numbers["log_proposal"] - numbers["log_prior"]
        rewards = numbers["reward"] - self.kl_coefficient * log_ratio
        others = (rewards.sum() - rewards) / (len(rewards) - 1)
        return rewards - others
