"""The distance of a policy to the reward-conditioned posterior `p(y|x) exp(r(x,y) / tau)`, estimated with samples.

The posterior is what BRAIn trains towards (arXiv 2402.02479). All functions take one prompt: float64 tensors `[N]`, one
entry for each sample. Log-probabilities are sums over a response's tokens, EOS included, and results are in nats.

Z stands for `E_p exp(r / tau)`, by which the posterior is divided. The mean over N samples of the prior estimates it.
"""

import math

import torch
from torch import Tensor

from megatron_brain.objectives.brain import brain_loss, posterior_log_weights
from megatron_brain.objectives.importance import check_group, effective_sample_size, policy_log_weights

DISTANCES = ("kl_alpha_beta", "kl_to_policy", "reward", "prior_reward", "kl_to_prior", "ess_alpha", "ess_beta")
"""What `distances` returns."""


def distances(
    log_prior: Tensor, rewards: Tensor, log_policy: Tensor, *, reward_temperature: float
) -> dict[str, Tensor]:
    """What N samples of the prior, the same for all policies, say of a policy and of the posterior.

    With alpha the self-normalised weights of the posterior and beta those of the policy, both relative to the prior:

    - `kl_alpha_beta`: KL(alpha || beta), BRAIn's loss for these samples with the prior as the proposal. It is 0 for any
      samples where the policy is the posterior.
    - `kl_to_policy`: KL(posterior || policy), `sum_i alpha_i (r_i / tau + log p_i - log q_i) - log Z`. It is
      `kl_alpha_beta - log mean_i(q_i / p_i)`: what the policy gives to responses that are not among the samples counts.
    - `reward`, `prior_reward`: expected rewards of the posterior, `sum_i alpha_i r_i`, and of the prior, their mean.
    - `kl_to_prior`: KL(posterior || prior), `sum_i alpha_i r_i / tau - log Z`. It is at most log N.
    - `ess_alpha`, `ess_beta`: effective sample sizes of the weights, 1 to N.

    Args:
        log_prior, rewards, log_policy: log p, r and log q `[N]` of the samples, N >= 2.
        reward_temperature: tau > 0.

    Raises:
        UserError: no weights follow from log p and the rewards, as in `posterior_log_weights`.
    """
    log_alpha = posterior_log_weights(log_prior, rewards, log_prior, reward_temperature=reward_temperature)
    alpha, scaled = log_alpha.exp(), rewards / reward_temperature
    log_z = log_mean_exp(scaled)
    # Without rounding where all rewards are equal: the posterior then gains exactly nothing.
    differences = rewards - rewards[0]
    return {
        "kl_alpha_beta": brain_loss(log_policy, log_prior, log_alpha),
        "kl_to_policy": (alpha * (scaled + log_prior - log_policy)).sum() - log_z,
        "reward": rewards[0] + (alpha * differences).sum(),
        "prior_reward": rewards[0] + differences.mean(),
        "kl_to_prior": (alpha * scaled).sum() - log_z,
        "ess_alpha": effective_sample_size(log_alpha),
        "ess_beta": effective_sample_size(policy_log_weights(log_policy, log_prior)),
    }


def kl_from_policy(log_ratios: Tensor, rewards: Tensor, prior_rewards: Tensor, *, reward_temperature: float) -> Tensor:
    """KL(policy || posterior), `E_q (log q - log p - r / tau) + log Z`, a scalar.

    The mean over the policy's own samples has no bias. log Z is too low on average, because the logarithm is concave.

    Args:
        log_ratios: log q - log p `[n]` of samples of the policy, n >= 1.
        rewards: r `[n]` of the same samples.
        prior_rewards: r `[N]` of samples of the prior.
        reward_temperature: tau > 0.
    """
    return (log_ratios - rewards / reward_temperature).mean() + log_mean_exp(prior_rewards / reward_temperature)


def log_mean_exp(values: Tensor) -> Tensor:
    """`log(mean(exp(values)))` of a group `[N]`."""
    check_group(values)
    return torch.logsumexp(values, dim=0) - math.log(len(values))
