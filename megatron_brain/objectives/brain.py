"""BRAIn: self-normalised distribution matching of the reward-conditioned posterior (ICML 2024, arXiv 2402.02479).

All functions take one group: tensors `[n]`, one entry per sample of one prompt. Log-probabilities are sums over a
response's tokens, EOS included, in nats, float32 or better.

They cover everything from DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) to BRAIn. DPO has groups of two,
`kind="hard"`, the prior as its proposal, and DPO's beta as the strength. On given preference pairs its rewards are
(1, 0). In DPO-sft both responses are samples of the prior, and a reward model gives the rewards. BRAIn has
`kind="soft"`, more samples, and a proposal that is refreshed from the policy.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_brain.errors import UserError
from megatron_brain.objectives.importance import (
    IMPORTANCE_MAXIMA,
    IMPORTANCE_MEANS,
    check_group,
    effective_sample_size,
    importance_metrics,
    policy_log_weights,
)
from megatron_brain.objectives.objective import Numbers, RefreshCheck

Baseline = Literal["self-normalized", "unnormalized", "none"]
AlphaKind = Literal["soft", "hard"]


class Brain:
    """BRAIn with its settings. Alpha is fixed for a round; beta changes with the policy.

    Args:
        baseline, policy_strength: as `brain_loss` takes them.
        alpha, reward_temperature: as `posterior_log_weights` takes them.
    """

    needs: tuple[str, ...] = ("log_prior", "reward", "log_proposal")
    fixes = "alpha"
    group_multiple = 1
    mean_metrics: tuple[str, ...] = ("ess_alpha", *IMPORTANCE_MEANS)
    max_metrics: tuple[str, ...] = (*IMPORTANCE_MAXIMA, "beta_error_at_refresh")
    refresh_check: RefreshCheck | None = RefreshCheck("beta_error_at_refresh", "every beta is 1/n")

    def __init__(
        self, *, baseline: Baseline, alpha: AlphaKind, policy_strength: float, reward_temperature: float
    ) -> None:
        self._kind: AlphaKind = alpha
        self._baseline: Baseline = baseline
        self._strength, self._reward_temperature = policy_strength, reward_temperature

    def fix(self, numbers: Numbers) -> Tensor:
        """alpha `[n]`."""
        return posterior_log_weights(
            numbers["log_prior"],
            numbers["reward"],
            numbers["log_proposal"],
            reward_temperature=self._reward_temperature,
            kind=self._kind,
        ).exp()

    def loss(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """`brain_loss`."""
        return brain_loss(
            log_policy,
            numbers["log_proposal"],
            _log_alpha(numbers),
            baseline=self._baseline,
            strength=self._strength,
        )

    def gradient(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """`brain_loss_gradient`."""
        return brain_loss_gradient(
            log_policy,
            numbers["log_proposal"],
            _log_alpha(numbers),
            baseline=self._baseline,
            strength=self._strength,
        )

    def measure(self, log_policy: Tensor, numbers: Numbers) -> dict[str, Tensor]:
        """Effective sample sizes of alpha and beta, estimates for the policy, and the largest |beta - 1/n|."""
        beta = policy_log_weights(log_policy, numbers["log_proposal"]).exp()
        return {
            "ess_alpha": effective_sample_size(_log_alpha(numbers)),
            **importance_metrics(log_policy, numbers),
            "beta_error_at_refresh": (beta - 1.0 / len(beta)).abs().max(),
        }


def posterior_log_weights(
    log_prior: Tensor, rewards: Tensor, log_proposal: Tensor, *, reward_temperature: float, kind: AlphaKind = "soft"
) -> Tensor:
    """log alpha `[n]`: self-normalised importance weights of the posterior `p(y|x) exp(r(x,y) / tau)`.

    Args:
        log_prior: log p(y_i|x).
        rewards: r(x, y_i). A constant that is added to all of them cancels.
        log_proposal: log q'(y_i|x) of the distribution the samples were drawn from.
        reward_temperature: tau > 0.
        kind: "hard" gives the largest reward all weight, as in DPO. Of equal rewards the first gets it.

    Raises:
        UserError: no weights follow: a number is NaN, a ratio is infinite, or prior or rewards exclude all samples.
    """
    check_group(rewards)
    if kind == "hard":
        log_alpha = torch.full_like(rewards, -torch.inf).scatter(0, rewards.argmax(0, keepdim=True), 0.0)
        undefined = rewards.isnan()
    else:
        log_alpha = torch.log_softmax(log_prior + rewards / reward_temperature - log_proposal, dim=0)
        undefined = log_alpha.isnan()
    if undefined.any():  # The host waits for the device here. A loss must not do that.
        raise UserError(
            f"no posterior weights follow from log_prior {log_prior.tolist()}, rewards {rewards.tolist()} and "
            f"log_proposal {log_proposal.tolist()}: all must be finite, or -inf in the first two for some samples"
        )
    return log_alpha


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
        A scalar in nats. It is zero if the policy's weights equal alpha, infinite if the policy excludes a sample that
        alpha does not exclude, and NaN if a number is NaN or a policy excludes all samples (`self-normalized` only).
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

    With these numbers as constants, `sum_i gradient_i log q_theta(y_i)` has the gradient of the loss in the parameters.
    So a first pass without gradients computes them for a whole group, and a second pass may take the samples one by
    one.
    """
    log_weights = _log_weights(log_policy, log_proposal, baseline, strength)
    subtracted = 0.0 if baseline == "none" else log_weights.exp()
    return -strength * (log_alpha.exp() - subtracted)


def _log_alpha(numbers: Numbers) -> Tensor:
    alpha = numbers["alpha"]
    # There is one rounding to float32, which is the same on every device.
    return alpha.double().log().to(alpha.dtype)


def _log_weights(log_policy: Tensor, log_proposal: Tensor, baseline: Baseline, strength: float) -> Tensor:
    """What the loss compares with log alpha: log beta, or without normalisation the log of the ratios over n."""
    if baseline == "self-normalized":
        return policy_log_weights(log_policy, log_proposal, strength=strength)
    check_group(log_policy)
    return strength * (log_policy - log_proposal) - math.log(len(log_policy))


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    # A weight of zero leaves out its value, even an infinite one, but does not hide a NaN.
    return torch.where((weights == 0) & ~values.isnan(), 0.0, weights * values).sum()
