"""The distance to the posterior, in a world of four responses where every number is known exactly.

Samples that hold each response exactly as often as the prior says make all expectations exact.
"""

import itertools
import math

import pytest
import torch

from megatron_brain.errors import UserError
from megatron_brain.objectives.importance import effective_sample_size
from megatron_brain.objectives.posterior import DISTANCES, distances, kl_from_policy, log_mean_exp

TAU = 0.5


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


PRIOR, REWARDS = doubles(0.5, 0.25, 0.2, 0.05), doubles(0.1, -0.3, 0.6, 1.0)
POLICY = doubles(0.3, 0.1, 0.4, 0.2)
POSTERIOR = (PRIOR.log() + REWARDS / TAU).softmax(0)
EXACT_SAMPLES = torch.repeat_interleave(torch.arange(4), torch.tensor([10, 5, 4, 1]))
"""20 samples, each response as often as the prior gives it."""


def kl(one, other):
    return (one * (one / other).log()).sum().item()


def exact(policy):
    return {
        "kl_alpha_beta": kl(POSTERIOR, policy),
        "kl_to_policy": kl(POSTERIOR, policy),
        "reward": (POSTERIOR * REWARDS).sum().item(),
        "prior_reward": (PRIOR * REWARDS).sum().item(),
        "kl_to_prior": kl(POSTERIOR, PRIOR),
    }


def measured(policy, drawn=EXACT_SAMPLES, *, rewards=REWARDS, tau=TAU):
    found = distances(PRIOR.log()[drawn], rewards[drawn], policy.log()[drawn], reward_temperature=tau)
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize("policy", [POLICY, PRIOR, POSTERIOR], ids=["policy", "prior", "posterior"])
def test_samples_in_the_priors_proportions_give_the_exact_numbers(policy):
    found = measured(policy)
    assert tuple(found) == DISTANCES
    assert {name: found[name] for name in exact(policy)} == pytest.approx(exact(policy), abs=1e-12)


def test_effective_sample_sizes_by_hand():
    # Two samples, exp(r / tau) = 1 and 3: alpha is 1/4 and 3/4. The ratios q / p are 2 and 1: beta is 2/3 and 1/3.
    prior, policy = doubles(0.1, 0.4), doubles(0.2, 0.4)
    found = distances(prior.log(), doubles(0.0, math.log(3)), policy.log(), reward_temperature=1.0)
    assert found["ess_alpha"].item() == pytest.approx(1 / (1 / 16 + 9 / 16))
    assert found["ess_beta"].item() == pytest.approx(1 / (4 / 9 + 1 / 9))
    assert found["kl_alpha_beta"].item() == pytest.approx(0.25 * math.log(3 / 8) + 0.75 * math.log(9 / 4))
    assert found["kl_to_prior"].item() == pytest.approx(0.75 * math.log(3) - math.log(2))
    assert found["kl_to_policy"].item() == pytest.approx(0.75 * math.log(3) - math.log(2) - 0.25 * math.log(2))


def test_many_drawn_samples_come_to_the_exact_numbers_within_their_standard_error():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(PRIOR, 200 * 4000, replacement=True, generator=generator).view(200, 4000)
    found = [measured(POLICY, group) for group in drawn]
    for name, value in exact(POLICY).items():
        values = doubles(*(each[name] for each in found))
        error = values.std() / math.sqrt(len(values))
        # The bias is of order 1/4000: far below this.
        assert abs(values.mean() - value) < 4 * error + 1e-3, name
        assert error < 0.01


@pytest.mark.parametrize("name", ["kl_to_prior", "kl_to_policy", "kl_alpha_beta", "reward"])
def test_the_bias_falls_with_the_number_of_samples_by_exact_expectation(name):
    """Over every group of n samples that can be drawn: no sampling noise."""
    biases = []
    for n in (2, 4, 8):
        expected = 0.0
        for drawn in itertools.combinations_with_replacement(range(4), n):
            counts = torch.bincount(torch.tensor(drawn), minlength=4)
            log_probability = (
                math.lgamma(n + 1) - torch.lgamma(counts.double() + 1).sum() + (counts * PRIOR.log()).sum()
            )
            expected += log_probability.exp().item() * measured(POLICY, torch.tensor(drawn))[name]
        biases.append(expected - exact(POLICY)[name])
    assert abs(biases[2]) < abs(biases[0]) / 2
    if name == "reward":
        assert biases[0] < biases[1] < biases[2] < 0, "too low, by less and less"


@pytest.mark.parametrize(
    ("high", "n", "expected", "exact_value", "too_high"),
    [(0.9, 2, 0.1175, 0.1009, 1.118), (0.9, 8, 0.1078, 0.1009, 1.001), (0.1, 8, 0.9138, 1.9578, 1.877)]
    + [(0.1, 64, 1.9704, 1.9578, 1.014)],
)
def test_the_posteriors_kl_to_the_prior_may_be_too_low_or_too_high_and_the_share_of_its_gain_is_too_high(
    high, n, expected, exact_value, too_high
):
    """Two rewards that are 5 tau apart: the number of samples with the better one has a binomial distribution."""
    rewards = doubles(0.0, 5.0)
    prior = doubles(1 - high, high)
    posterior = (prior.log() + rewards).softmax(0)
    divergence = gain = 0.0
    for k in range(n + 1):
        probability = math.comb(n, k) * high**k * (1 - high) ** (n - k)
        drawn = torch.tensor([1] * k + [0] * (n - k))
        found = distances(prior.log()[drawn], rewards[drawn], prior.log()[drawn], reward_temperature=1.0)
        divergence += probability * found["kl_to_prior"].item()
        gain += probability * (found["reward"] - found["prior_reward"]).item()
    assert divergence == pytest.approx(expected, abs=1e-4)
    assert kl(posterior, prior) == pytest.approx(exact_value, abs=1e-4)
    assert ((posterior - prior) @ rewards).item() / gain == pytest.approx(too_high, abs=1e-3)


def test_kl_alpha_beta_lacks_the_log_of_the_mean_ratio_which_is_at_most_0_on_average():
    drawn = torch.tensor([0, 2, 2, 3, 1])
    found = measured(POLICY, drawn)
    ratio = log_mean_exp((POLICY / PRIOR).log()[drawn]).item()
    assert found["kl_alpha_beta"] == pytest.approx(found["kl_to_policy"] + ratio)


def test_kl_alpha_beta_is_zero_for_any_samples_where_the_policy_is_the_posterior():
    for drawn in itertools.combinations_with_replacement(range(4), 3):
        assert measured(POSTERIOR, torch.tensor(drawn))["kl_alpha_beta"] == pytest.approx(0, abs=1e-14)


def test_where_the_policy_is_the_prior_its_distance_is_the_posteriors_kl_to_the_prior():
    drawn = torch.tensor([0, 2, 2, 3, 1])
    found = measured(PRIOR, drawn)
    assert found["kl_to_policy"] == found["kl_to_prior"] == pytest.approx(found["kl_alpha_beta"])
    assert found["ess_beta"] == pytest.approx(5)


def test_a_constant_added_to_the_rewards_moves_the_rewards_alone():
    drawn = torch.tensor([0, 2, 2, 3, 1])
    plain, moved = measured(POLICY, drawn), measured(POLICY, drawn, rewards=REWARDS + 7.0)
    for name in ("reward", "prior_reward"):
        assert moved.pop(name) == pytest.approx(plain.pop(name) + 7.0)
    assert moved == pytest.approx(plain, abs=1e-12)


def test_the_posteriors_kl_to_the_prior_is_at_most_log_n():
    assert measured(POLICY, torch.tensor([0, 1, 2, 3]), tau=1e-3)["kl_to_prior"] == pytest.approx(math.log(4))


def test_kl_from_policy_is_exact_with_exact_samples_of_both():
    of_policy = torch.repeat_interleave(torch.arange(4), torch.tensor([3, 1, 4, 2]))
    ratios = (POLICY / PRIOR).log()[of_policy]
    prior_rewards = REWARDS[EXACT_SAMPLES]
    found = kl_from_policy(ratios, REWARDS[of_policy], prior_rewards, reward_temperature=TAU)
    assert found.item() == pytest.approx(kl(POLICY, POSTERIOR))
    moved = kl_from_policy(ratios, REWARDS[of_policy] + 3, prior_rewards + 3, reward_temperature=TAU)
    assert moved.item() == pytest.approx(found.item())


def test_large_rewards_do_not_overflow():
    assert log_mean_exp(doubles(3000.0, 3000.0)).item() == 3000.0
    found = distances(doubles(-1, -2), doubles(1e5, 0), doubles(-1, -1), reward_temperature=1e-2)
    assert all(math.isfinite(value.item()) for value in found.values())
    assert found["ess_alpha"].item() == 1.0 == effective_sample_size(doubles(0.0, -math.inf)).item()


def test_a_reward_that_is_no_number_is_an_error():
    with pytest.raises(UserError, match="no posterior weights"):
        distances(doubles(-1, -2), doubles(1.0, math.nan), doubles(-1, -1), reward_temperature=1.0)
