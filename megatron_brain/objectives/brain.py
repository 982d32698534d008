"""BRAIn: self-normalised distribution matching of the reward-conditioned posterior (ICML 2024, arXiv 2402.02479).

All functions take one group: tensors `[n]`, one entry per sample of one prompt. Log-probabilities are sums over a
response's tokens, EOS included, in nats, float32 or better.

They give every rung from DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) to BRAIn. DPO is a group of two with
`kind="hard"`, the prior as its proposal and DPO's beta as the strength: on given preference pairs the rewards are
(1, 0); in DPO-sft both are samples of the prior and the rewards a reward model's. Then come `kind="soft"`, more samples
and a proposal refreshed from the policy.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_brain.errors import UserError

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
        UserError: numbers that give no weights: a NaN, an infinite ratio, a prior or rewards that exclude all samples.
    """
    _check_group(rewards)
    if kind == "hard":
        log_alpha = torch.full_like(rewards, -torch.inf).scatter(0, rewards.argmax(0, keepdim=True), 0.0)
        undefined = rewards.isnan()
    else:
        log_alpha = torch.log_softmax(log_prior + rewards / reward_temperature - log_proposal, dim=0)
        undefined = log_alpha.isnan()
    if undefined.any():  # makes the host wait for the device, which a loss must not do
        raise UserError(
            f"no posterior weights follow from log_prior {log_prior.tolist()}, rewards {rewards.tolist()} and "
            f"log_proposal {log_proposal.tolist()}: all must be finite, or -inf in the first two for some samples"
        )
    return log_alpha


def policy_log_weights(log_policy: Tensor, log_proposal: Tensor, *, strength: float = 1.0) -> Tensor:
    """log beta `[n]`: self-normalised importance weights of the policy, `beta ∝ (q_theta / q')^b`.

    Args:
        log_policy: log q_theta(y_i|x).
        log_proposal: log q'(y_i|x).
        strength: b; 1 is BRAIn, DPO calls it beta. Trained to convergence on one proposal, the policy ends at
            `q' (posterior / q')^(1/b)`: a proposal refreshed after long rounds settles for b > 1/2 alone.
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
      - `self-normalized`: alpha_i - beta_i, of KL(alpha || beta), as in the paper;
      - `unnormalized`: alpha_i - (1/n) (q_theta/q')^b, of the generalised KL of unnormalised weights: "w/o self-norm",
        like GDC++ (Korbak et al., arXiv 2206.00761);
      - `none`: alpha_i, of the cross-entropy alone: "w/o baseline", like DPG (Parshakova et al., arXiv 1912.08517).

    Returns:
        A scalar in nats, zero where the policy's weights equal alpha, infinite where the policy excludes a sample that
        alpha does not. NaN follows from a NaN, and for `self-normalized` from a policy that excludes all samples.
    """
    alpha = log_alpha.exp()
    log_weights = _log_weights(log_policy, log_proposal, baseline, strength)
    divergence = _weighted_sum(alpha, log_alpha) - _weighted_sum(alpha, log_weights)
    if baseline == "unnormalized":
        return divergence + log_weights.exp().sum() - 1.0
    return divergence


@torch.no_grad()
def brain_loss_gradient(
    log_policy: Tensor,
    log_proposal: Tensor,
    log_alpha: Tensor,
    *,
    baseline: Baseline = "self-normalized",
    strength: float = 1.0,
) -> Tensor:
    """d loss / d log q_theta(y_i) `[n]` of `brain_loss`, in closed form and without a graph.

    As constants they weight the samples' log-probabilities: `sum_i gradient_i log q_theta(y_i)` has the loss's gradient
    in the parameters. So a first pass without gradients gives them for a whole group, and a second pass may take its
    samples one by one.
    """
    log_weights = _log_weights(log_policy, log_proposal, baseline, strength)
    subtracted = 0.0 if baseline == "none" else log_weights.exp()
    return -strength * (log_alpha.exp() - subtracted)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """`1 / sum w_i^2` of normalised weights: n when they are equal, 1 when one has all."""
    return 1.0 / torch.exp(2.0 * log_weights).sum()


def _log_weights(log_policy: Tensor, log_proposal: Tensor, baseline: Baseline, strength: float) -> Tensor:
    """What the loss compares with log alpha: log beta, or its ratios over n without the normalisation."""
    if baseline == "self-normalized":
        return policy_log_weights(log_policy, log_proposal, strength=strength)
    _check_group(log_policy)
    return strength * (log_policy - log_proposal) - math.log(len(log_policy))


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    # A weight of zero leaves its value out even where that is infinite, but does not hide a NaN.
    return torch.where((weights == 0) & ~values.isnan(), 0.0, weights * values).sum()


def _check_group(values: Tensor) -> None:
    # Of one sample, every weight is 1 and nothing can be learned.
    assert values.dim() == 1 and len(values) >= 2, (
        f"a BRAIn group needs at least two samples in one dimension, got shape {list(values.shape)}"
    )
