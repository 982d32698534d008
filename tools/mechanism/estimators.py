"""Bias and variance of the gradients that the three baselines make of a group, from a pool of samples of one prompt.

The gradient of a group is a weighted sum of the samples' gradients `g_i = d log q_theta(y_i|x) / d theta`:

    self-normalized   sum_i (alpha_i - beta_i) g_i
    unnormalized      sum_i (alpha_i - (1/n) q_theta(y_i)/q'(y_i)) g_i
    none              sum_i alpha_i g_i

All three aim at `E_posterior[g]`, minus the gradient of KL(posterior || policy). What is subtracted aims at
`E_policy[g] = 0`. So in expectation

- `none` is off by the bias of the self-normalised alpha, which is of order 1/n and does not depend on the drift;
- `unnormalized` is off by exactly the same, because `E_proposal[(q_theta/q') g] = 0` at every n;
- `self-normalized` is off by that less the bias of beta, of order 1/n too. At the posterior both are equal and cancel.

A pool is many samples of the proposal. Groups are drawn from it without replacement, so that groups of one partition of
the pool are independent. Everything that is measured is a square or a product of weighted sums of gradients, so the
gradients themselves are not needed: the Gram matrix of their inner products is enough.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from megatron_brain.objectives.brain import Baseline, brain_loss_gradient, posterior_log_weights
from megatron_brain.objectives.importance import effective_sample_size, policy_log_weights

BASELINES: tuple[Baseline, ...] = get_args(Baseline)

MOMENTS = ("squared", "variance", "bias_squared", "along_reference", "reference_squared")
"""What `measure` estimates of one prompt, in squared units of the gradient:

- squared: E |G|^2 of a group's gradient G.
- variance: E |G - E G|^2, the sum over all parameters.
- bias_squared: |E G - E_posterior[g]|^2.
- along_reference: <E G, E_posterior[g]>.
- reference_squared: |E_posterior[g]|^2.

The estimates have no bias of their own, apart from that of the reference, so that the second, third and last may come
out negative where they are small against their noise.
"""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Samples of the proposal to one prompt: each field is `[N]` float64, log-probabilities in nats."""

    log_prior: Tensor
    reward: Tensor
    log_proposal: Tensor

    def log_alpha(self, drawn: Tensor, temperature: float) -> Tensor:
        """log alpha of groups, from the places `[..., n]` of their samples; the same shape."""
        groups = drawn.reshape(-1, drawn.size(-1))
        numbers = (self.log_prior[groups], self.reward[groups], self.log_proposal[groups])
        rows = [posterior_log_weights(*group, reward_temperature=temperature) for group in zip(*numbers, strict=True)]
        return torch.stack(rows).view(drawn.shape)


def measure(
    pool: Pool,
    log_policy: Tensor,
    gram: Tensor,
    *,
    sizes: Sequence[int],
    reward_temperature: float,
    splits: int,
    permutations: int,
    seed: int,
) -> dict[tuple[Baseline, int], dict[str, float]]:
    """MOMENTS for every baseline and group size.

    The pool is split into halves. Each gives its own estimates of E G and of the reference, and products are always
    taken between one half and the other: their errors are independent, so they add nothing on average. The bias is the
    product of the differences (E G - reference) of the halves; in a difference the errors mostly cancel.

    The reference is alpha of a whole half, as of one large group. To lower the noise, a multiple of the same with beta,
    which estimates E_policy[g] = 0, is subtracted from every estimate (`_less_zero`). Both are corrected by the
    jackknife (`large_group`).

    Args:
        pool: N samples.
        log_policy: log q_theta `[N]` float64.
        gram: inner products `[N, N]` float64 of the samples' gradients.
        sizes: the group sizes n, each at most N/4.
        reward_temperature: tau.
        splits: how many times the pool is split into halves.
        permutations: how many times each half is cut into groups.
        seed: of splits and groups.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = {(baseline, n): dict.fromkeys(MOMENTS, 0.0) for n in sizes for baseline in BASELINES}
    for _ in range(splits):
        halves = _halves(len(gram), generator)
        references = [large_group(pool.log_alpha(half, reward_temperature), half, len(gram)) for half in halves]
        zeros = [
            large_group(policy_log_weights(log_policy[half], pool.log_proposal[half]), half, len(gram))
            for half in halves
        ]
        for n in sizes:
            drawn = [_partitions(half, n, permutations, generator) for half in halves]
            log_alpha = [pool.log_alpha(groups, reward_temperature) for groups in drawn]
            for baseline in BASELINES:
                weights = [
                    group_weights(log_policy[groups], pool.log_proposal[groups], known, baseline=baseline)
                    for groups, known in zip(drawn, log_alpha, strict=True)
                ]
                for name, value in _moments(gram, drawn, weights, references, zeros).items():
                    totals[baseline, n][name] += value / splits
    return totals


def group_weights(log_policy: Tensor, log_proposal: Tensor, log_alpha: Tensor, *, baseline: Baseline) -> Tensor:
    """The weights of the samples' gradients in the ascent direction of groups `[..., n]`: those that training uses."""
    shape, n = log_policy.shape, log_policy.size(-1)

    def of_one(*group: Tensor) -> Tensor:
        return -brain_loss_gradient(*group, baseline=baseline)

    groups = (each.reshape(-1, n) for each in (log_policy, log_proposal, log_alpha))
    weights: Tensor = torch.vmap(of_one)(*groups)
    return weights.view(shape)


def large_group(log_weights: Tensor, places: Tensor, count: int) -> Tensor:
    """Weights `[count]` of the samples at `places` in an estimate of an expected value of g, zero for the others.

    They are normalised weights of all these samples, as of one large group, whose bias of order 1/N is removed by the
    jackknife: N times the estimate, less N - 1 times the mean of those that leave out one sample (Quenouille 1956).

    Args:
        log_weights: log alpha, for E_posterior[g], or log beta, for E_policy[g], of the samples `[N]`.
    """
    size = len(places)
    without_one = log_weights.expand(size, size).masked_fill(torch.eye(size, dtype=torch.bool), -torch.inf)
    weights = size * log_weights.softmax(0) - (size - 1) * without_one.softmax(1).mean(0)
    return weights.new_zeros(count).index_copy(0, places, weights)


def drift(log_policy: Tensor, log_proposal: Tensor) -> dict[str, float]:
    """How far a policy has moved from the proposal on one prompt, from `[N]` samples of the proposal.

    Returns:
        kl_from_proposal: KL(proposal || policy), a plain mean over the samples. kl_to_proposal: KL(policy || proposal)
        by self-normalised importance sampling; it cannot exceed log N and is too small where few samples have all the
        weight. max_ratio: the largest q_theta/q'. ess_beta: effective sample size of beta, as a share of N.
    """
    log_ratio = log_policy - log_proposal
    log_beta = policy_log_weights(log_policy, log_proposal)
    log_mean = torch.logsumexp(log_ratio, dim=0) - math.log(len(log_ratio))
    return {
        "kl_from_proposal": -log_ratio.mean().item(),
        "kl_to_proposal": ((log_beta.exp() * log_ratio).sum() - log_mean).item(),
        "max_ratio": log_ratio.max().exp().item(),
        "ess_beta": effective_sample_size(log_beta).item() / len(log_ratio),
    }


def _halves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(count, generator=generator)
    return order[: count // 2], order[count // 2 : count // 2 * 2]


def _partitions(half: Tensor, n: int, permutations: int, generator: torch.Generator) -> Tensor:
    """Places `[permutations, groups, n]` of the samples of disjoint groups."""
    used = len(half) // n * n
    orders = [half[torch.randperm(len(half), generator=generator)[:used]].view(-1, n) for _ in range(permutations)]
    return torch.stack(orders)


def _moments(
    gram: Tensor,
    drawn: Sequence[Tensor],
    weights: Sequence[Tensor],
    references: Sequence[Tensor],
    zeros: Sequence[Tensor],
) -> dict[str, float]:
    """MOMENTS of one baseline and group size, from places and weights `[permutations, groups, n]` of both halves, and
    weights `[N]` of reference and zero."""
    squared, variance, means = [], [], []
    for groups, each in zip(drawn, weights, strict=True):
        permutations, count, _ = groups.shape
        squares = torch.einsum("pbi,pbij,pbj->pb", each, gram[groups[..., :, None], groups[..., None, :]], each)
        partitions = torch.zeros(permutations, len(gram), dtype=gram.dtype)
        partitions.scatter_add_(1, groups.reshape(permutations, -1), each.reshape(permutations, -1) / count)
        of_means = ((partitions @ gram) * partitions).sum(1)
        squared.append(squares.mean())
        # Groups of one partition are independent, so this is their unbiased sample variance.
        variance.append(((squares.sum(1) - count * of_means) / (count - 1)).mean())
        means.append(partitions.mean(0))
    off = [mean - reference for mean, reference in zip(means, references, strict=True)]
    mean, reference, off = (_less_zero(pair, zeros, gram.diagonal()) for pair in (means, references, off))
    return {
        "squared": torch.stack(squared).mean().item(),
        "variance": torch.stack(variance).mean().item(),
        "bias_squared": (off[0] @ gram @ off[1]).item(),
        "along_reference": ((mean[0] @ gram @ reference[1] + mean[1] @ gram @ reference[0]) / 2).item(),
        "reference_squared": (reference[0] @ gram @ reference[1]).item(),
    }


def _less_zero(pair: Sequence[Tensor], zeros: Sequence[Tensor], squares: Tensor) -> list[Tensor]:
    """The estimates of both halves, as weights `[N]`, less a multiple of what estimates zero on the same half.

    The multiple is the one that leaves the least noise if the gradients, of squared lengths `squares`, are not
    correlated. It comes from the other half, so that it is independent of the estimate of zero.
    """
    multiples = [
        (squares * each * zero).sum() / (squares * zero * zero).sum() for each, zero in zip(pair, zeros, strict=True)
    ]
    return [each - multiple * zero for each, multiple, zero in zip(pair, multiples[::-1], zeros, strict=True)]
