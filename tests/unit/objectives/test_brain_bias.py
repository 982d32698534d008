"""The self-normalised objective against the true forward divergence on a categorical world, by enumeration."""

import itertools

import pytest
import torch

from megatron_brain.objectives.brain import brain_loss, posterior_log_weights

OUTCOMES = 6


@pytest.fixture(scope="module")
def world():
    """log p = log q', rewards, and logits of a policy that has drifted, over six responses of one prompt."""
    generator = torch.Generator().manual_seed(0)
    prior, rewards, policy = torch.randn(3, OUTCOMES, generator=generator, dtype=torch.float64)
    return prior.log_softmax(0), 2.0 * rewards, policy


def true_gradient(world):
    """Gradient in the logits of the forward divergence KL(posterior || policy): policy minus posterior."""
    log_prior, rewards, logits = world
    return logits.softmax(0) - (log_prior + rewards).softmax(0)


def group_weights(world, drawn):
    """Gradient in log q_theta of the loss of each drawn group, scattered over outcomes: `[groups, OUTCOMES]`."""
    log_prior, rewards, logits = world
    log_policy, log_proposal = logits.log_softmax(0)[drawn], log_prior[drawn]
    log_alpha = torch.log_softmax(log_prior[drawn] + rewards[drawn] - log_proposal, 1)
    weights = torch.softmax(log_policy - log_proposal, 1) - log_alpha.exp()
    return torch.zeros(len(drawn), OUTCOMES, dtype=torch.float64).scatter_add(1, drawn, weights)


def expected_gradient_by_enumeration(world, n):
    """The objective's expected gradient over all OUTCOMES**n groups, through brain_loss itself."""
    log_prior, rewards, logits = world
    logits = logits.clone().requires_grad_()
    log_policy = logits.log_softmax(0)
    expected = torch.zeros((), dtype=torch.float64)
    for drawn in map(list, itertools.product(range(OUTCOMES), repeat=n)):
        log_alpha = posterior_log_weights(log_prior[drawn], rewards[drawn], log_prior[drawn], reward_temperature=1.0)
        loss = brain_loss(log_policy[drawn], log_prior[drawn], log_alpha)
        expected = expected + log_prior[drawn].sum().exp() * loss
    return torch.autograd.grad(expected, logits)[0]


def expected_gradient_by_sampling(world, n, groups):
    """Mean and standard error over sampled groups; weights sum to zero, so they are gradients in the logits too."""
    generator = torch.Generator().manual_seed(n)
    drawn = torch.multinomial(world[0].exp(), groups * n, replacement=True, generator=generator).view(groups, n)
    weights = group_weights(world, drawn)
    return weights.mean(0), weights.std(0) / groups**0.5


def relative(world, difference):
    return (difference.norm() / true_gradient(world).norm()).item()


def relative_bias(world, gradient):
    return relative(world, gradient - true_gradient(world))


def test_sampled_groups_agree_with_enumeration(world):
    mean, error = expected_gradient_by_sampling(world, 2, groups=200_000)
    assert ((mean - expected_gradient_by_enumeration(world, 2)).abs() < 4 * error).all()


def test_bias_for_the_true_divergence_falls_as_one_over_n(world):
    biases = {2: relative_bias(world, expected_gradient_by_enumeration(world, 2))}
    for n in (8, 32, 128):
        mean, error = expected_gradient_by_sampling(world, n, groups=4_000_000 // n)
        biases[n] = relative_bias(world, mean)
        assert relative(world, error) < 0.2 * biases[n], "too few groups to see the bias"
    assert 0.3 < biases[2] < 1.0, "two samples are far from the true gradient"
    assert biases[8] < 0.6 * biases[2]
    # Four times the samples: a quarter of the bias, within the noise allowed above.
    for n in (32, 128):
        assert 0.15 < biases[n] / biases[n // 4] < 0.35


def test_three_samples_are_less_biased_than_two_by_enumeration(world):
    three = expected_gradient_by_enumeration(world, 3)
    mean, error = expected_gradient_by_sampling(world, 3, groups=200_000)
    assert ((mean - three).abs() < 4 * error).all()
    assert relative_bias(world, three) < relative_bias(world, expected_gradient_by_enumeration(world, 2))


def test_there_is_no_bias_where_the_policy_is_the_posterior(world):
    log_prior, rewards, _ = world
    for n in (2, 3):
        gradient = expected_gradient_by_enumeration((log_prior, rewards, log_prior + rewards), n)
        torch.testing.assert_close(gradient, torch.zeros(OUTCOMES, dtype=torch.float64), rtol=0, atol=1e-15)
