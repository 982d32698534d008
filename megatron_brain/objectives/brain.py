"""BRAIn: self-normalised distribution matching of the reward-conditioned posterior (ICML 2024, arXiv 2402.02479).

All functions take one group: tensors `[n]`, one entry per sample of one prompt. Log-probabilities are sums over a
response's tokens, EOS included, in nats, float32 or better.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["self-normalized", "unnormalized", "none"]
AlphaKind = Literal["soft", "hard"]


def posterior_log_weights(
    log_prior: Tensor, rewards: Tensor, log_proposal: Tensor, *, reward_temperature: float, kind: AlphaKind = "soft"
) -> Tensor:
    """log alpha `[n]`: self-normalised importance weights of the posterior `p(y|x) exp(r(x,y) / tau)`.

    Args:
        log_prior: log p(y_i|x).
        rewards: r(x, y_i). Any constant added to all of them cancels.
        log_proposal: log q'(y_i|x) of the distribution the samples were drawn from.
        reward_temperature: tau > 0.
        kind: "hard" puts all weight on the largest reward, as in DPO; ties go to the first.

    Raises:
        ValueError: fewer than two samples, for which every weight is 1 and nothing can be learned.
    """
    _check_group(rewards)
    if kind == "hard":
        log_alpha = torch.full_like(rewards, -torch.inf)
        log_alpha[rewards.argmax()] = 0.0
        return log_alpha
    return torch.log_softmax(log_prior + rewards / reward_temperature - log_proposal, dim=0)


def policy_log_weights(log_policy: Tensor, log_proposal: Tensor, *, strength: float = 1.0) -> Tensor:
    """log beta `[n]`: self-normalised importance weights of the policy, `beta ∝ (q_theta / q')^b`.

    Args:
        log_policy: log q_theta(y_i|x).
        log_proposal: log q'(y_i|x).
        strength: b; 1 is BRAIn, DPO calls it beta.
    """
    _check_group(log_policy)
    return torch.log_softmax(strength * (log_policy - log_proposal), dim=0)


def brain_loss(
    log_policy: Tensor,
    log_proposal: Tensor,
    log_alpha: Tensor,
    *,
    baseline: Baseline = "self-normalized",
    strength: float = 1.0,
) -> Tensor:
    """Loss of one group; differentiable in `log_policy` alone.

    Its gradient in log q_theta(y_i) is minus the strength times
      - `self-normalized`: alpha_i - beta_i, of KL(alpha || beta);
      - `unnormalized`: alpha_i - (1/n) (q_theta/q')^b, of the generalised KL of unnormalised weights;
      - `none`: alpha_i, of the cross-entropy alone.
    The value is zero where the policy's weights equal alpha.

    Raises:
        ValueError: fewer than two samples.
    """
    _check_group(log_policy)
    log_ratio = strength * (log_policy - log_proposal)
    alpha = log_alpha.exp()
    entropy_term = torch.where(alpha > 0, alpha * log_alpha, 0.0).sum()
    if baseline == "self-normalized":
        return entropy_term - _weighted_sum(alpha, policy_log_weights(log_policy, log_proposal, strength=strength))
    log_mean_ratio = log_ratio - math.log(len(log_ratio))
    cross_entropy = entropy_term - _weighted_sum(alpha, log_mean_ratio)
    if baseline == "none":
        return cross_entropy
    return cross_entropy + log_mean_ratio.exp().sum() - 1.0


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """`1 / sum w_i^2` of normalised weights: n when they are equal, 1 when one has all."""
    return 1.0 / torch.exp(2.0 * log_weights).sum()


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    # A weight of zero leaves its value out even where that is infinite.
    return torch.where(weights > 0, weights * values, 0.0).sum()


def _check_group(values: Tensor) -> None:
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"a BRAIn group needs at least two samples in one dimension, got shape {list(values.shape)}")
