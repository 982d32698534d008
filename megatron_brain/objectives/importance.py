"""Importance weights of the policy relative to the proposal, and metrics that follow from them.

All functions take one group: tensors `[n]`, one entry per response.
"""

import torch
from torch import Tensor

from megatron_brain.objectives.objective import Numbers

IMPORTANCE_MEANS = ("ess_beta", "kl_to_prior", "reward_under_policy")
IMPORTANCE_MAXIMA = ("max_ratio",)


def policy_log_weights(log_policy: Tensor, log_proposal: Tensor, *, strength: float = 1.0) -> Tensor:
    """log beta `[n]`: self-normalised importance weights of the policy, `beta ∝ (q_theta / q')^b`.

    Args:
        log_policy: log q_theta(y_i|x).
        log_proposal: log q'(y_i|x).
        strength: b. BRAIn has 1; DPO calls it beta. A policy that converges on one proposal ends at
            `q' (posterior / q')^(1/b)`. So a proposal that is refreshed after long rounds settles only for b > 1/2.
    """
    check_group(log_policy)
    return torch.log_softmax(strength * (log_policy - log_proposal), dim=0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """`1 / sum w_i^2` of normalised weights: n if all are equal, 1 if one response has all weight."""
    return 1.0 / torch.exp(2.0 * log_weights).sum()


def importance_metrics(log_policy: Tensor, numbers: Numbers) -> dict[str, Tensor]:
    """`IMPORTANCE_MEANS` and `IMPORTANCE_MAXIMA` of a group: the distance of the policy from proposal and prior, and
    estimates for the policy from the proposal's samples."""
    log_beta = policy_log_weights(log_policy, numbers["log_proposal"])
    beta = log_beta.exp()
    return {
        "ess_beta": effective_sample_size(log_beta),
        "kl_to_prior": (beta * (log_policy - numbers["log_prior"])).sum(),
        "reward_under_policy": (beta * numbers["reward"]).sum(),
        "max_ratio": (log_policy - numbers["log_proposal"]).max().exp(),
    }


def check_group(values: Tensor) -> None:
    """Fail if a group is not a vector of at least two responses. With one response the weight is always 1."""
    assert values.dim() == 1 and len(values) >= 2, (
        f"a group needs at least two samples in one dimension, got shape {list(values.shape)}"
    )
