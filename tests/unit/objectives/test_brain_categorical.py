"""The objective on a world of few responses, where every group that can be drawn is enumerated: no sampling noise.

Groups are sets with multiplicities, for the loss of a group does not depend on its order: C(n + 2, 2) of them for n
samples of three responses, 8385 for n = 128.
"""

import functools
import itertools
import math

import pytest
import torch

from megatron_brain.objectives.brain import brain_loss, posterior_log_weights


def probabilities(*values):
    return torch.tensor(values, dtype=torch.float64)


PRIOR, REWARDS = probabilities(0.6, 0.3, 0.1), probabilities(0.0, 1.0, 2.0)
POSTERIOR = (PRIOR.log() + REWARDS).softmax(0)


@functools.cache
def multisets(n, outcomes):
    """All groups `[G, n]` and the log of the number of orders each comes in `[G]`."""
    drawn = torch.tensor(list(itertools.combinations_with_replacement(range(outcomes), n)))
    counts = torch.nn.functional.one_hot(drawn, outcomes).sum(1)
    return drawn, math.lgamma(n + 1) - torch.lgamma(counts.double() + 1).sum(1)


class Groups:
    """Every group of n samples of a proposal, with its probability and log alpha; reward temperature 1."""

    def __init__(self, n, proposal, *, prior=PRIOR, rewards=REWARDS, kind="soft"):
        self.drawn, log_orders = multisets(n, len(prior))
        self.log_proposal = proposal.log()[self.drawn]
        self.probability = (log_orders + self.log_proposal.sum(1)).exp()
        parts = zip(prior.log()[self.drawn], rewards[self.drawn], self.log_proposal, strict=True)
        self.log_alpha = torch.stack(
            [posterior_log_weights(*part, reward_temperature=1.0, kind=kind) for part in parts]
        )

    def losses(self, log_policy, **options):
        """Of each group, for log q_theta of every response: `[G]`."""
        loss = functools.partial(brain_loss, **options)
        return torch.vmap(loss)(log_policy[self.drawn], self.log_proposal, self.log_alpha)

    def expected_gradient(self, policy, **options):
        """In the logits of the policy."""
        logits = policy.log().requires_grad_()
        return torch.autograd.grad(self.probability @ self.losses(logits.log_softmax(0), **options), logits)[0]

    def mean_alpha(self):
        """How much weight alpha gives each response, on average."""
        shares = torch.zeros(len(self.drawn), self.drawn.max() + 1, dtype=torch.float64)
        return self.probability @ shares.scatter_add(1, self.drawn, self.log_alpha.exp())


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("baseline", ["self-normalized", "unnormalized", "none"])
def test_the_enumeration_is_the_sum_over_ordered_groups(baseline, n):
    policy, proposal = probabilities(0.2, 0.2, 0.6), probabilities(0.5, 0.1, 0.4)
    logits = policy.log().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for drawn in map(list, itertools.product(range(3), repeat=n)):
        log_proposal = proposal.log()[drawn]
        log_alpha = posterior_log_weights(PRIOR.log()[drawn], REWARDS[drawn], log_proposal, reward_temperature=1.0)
        loss = brain_loss(logits.log_softmax(0)[drawn], log_proposal, log_alpha, baseline=baseline)
        expected = expected + proposal[drawn].prod() * loss
    gradient = torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(Groups(n, proposal).expected_gradient(policy, baseline=baseline), gradient)


@pytest.mark.parametrize(
    ("policy", "proposal"),
    [
        pytest.param(probabilities(0.2, 0.2, 0.6), PRIOR, id="proposal is the prior"),
        pytest.param(probabilities(0.9, 0.05, 0.05), PRIOR, id="policy drifted the other way"),
        pytest.param(probabilities(0.3, 0.5, 0.2), probabilities(0.4, 0.4, 0.2), id="refreshed proposal"),
    ],
)
class TestBias:
    """Of the expected gradient, as one of the forward divergence KL(posterior || policy)."""

    def biases(self, policy, proposal):
        true_gradient = policy - POSTERIOR
        return {n: Groups(n, proposal).expected_gradient(policy) - true_gradient for n in (2, 8, 32, 128)}

    def test_falls_as_one_over_n(self, policy, proposal):
        sizes = {n: bias.norm() / (policy - POSTERIOR).norm() for n, bias in self.biases(policy, proposal).items()}
        assert sizes[2] > sizes[8] > sizes[32] > sizes[128]
        assert 3.3 < sizes[32] / sizes[128] < 4.7, "four times the samples, a quarter of the bias"
        assert sizes[128] < 0.05 < sizes[2]

    def test_is_that_of_self_normalised_importance_sampling(self, policy, proposal):
        # A self-normalised mean of f is off by -E_q'[w^2 (f - mean)] / n + O(1/n^2) for ratios w = target / proposal
        # (delta method). Here f is the indicator of a response, and beta's mean minus alpha's is the gradient.
        def leading_term(target):
            squares = target**2 / proposal
            return target * squares.sum() - squares

        limit = leading_term(policy) - leading_term(POSTERIOR)
        errors = {n: (n * bias - limit).norm() / limit.norm() for n, bias in self.biases(policy, proposal).items()}
        assert errors[128] < 0.15
        assert 3 < errors[32] / errors[128] < 6, "the next term is one of 1/n^2"


@pytest.mark.parametrize("n", [2, 3, 8])
def test_unnormalised_ratios_change_no_expected_gradient_as_a_baseline_should_not(n):
    policy, proposal = probabilities(0.2, 0.2, 0.6), probabilities(0.5, 0.1, 0.4)
    groups = Groups(n, proposal)
    plain, unnormalized, self_normalized = (
        groups.expected_gradient(policy, baseline=baseline) for baseline in ("none", "unnormalized", "self-normalized")
    )
    torch.testing.assert_close(plain, policy - groups.mean_alpha())
    torch.testing.assert_close(unnormalized, plain)
    assert (self_normalized - plain).norm() > 0.01


class TestThePolicyIsThePosterior:
    """Of sequences of two tokens of three, by a policy of one table of logits for each token: nine responses."""

    @pytest.fixture
    def world(self):
        generator = torch.Generator().manual_seed(0)
        prior, proposal, rewards = torch.randn(3, 9, dtype=torch.float64, generator=generator)
        joint = (prior.log_softmax(0) + rewards).softmax(0).view(3, 3)
        parameters = joint.sum(1).log(), (joint / joint.sum(1, keepdim=True)).log()
        return parameters, {"proposal": proposal.softmax(0), "prior": prior.softmax(0), "rewards": rewards}

    def gradients_of_each_group(self, world, n, **options):
        parameters, rest = world
        groups = Groups(n, **rest)

        def losses(first, second):
            return groups.losses((first.log_softmax(0)[:, None] + second.log_softmax(1)).flatten(), **options)

        return torch.func.jacrev(losses, argnums=(0, 1))(*parameters)

    @pytest.mark.parametrize("n", [2, 3, 4])
    def test_every_group_has_zero_gradient_in_every_parameter(self, world, n):
        for gradient in self.gradients_of_each_group(world, n):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)

    @pytest.mark.parametrize("baseline", ["unnormalized", "none"])
    def test_without_self_normalisation_groups_still_pull(self, world, baseline):
        assert all(gradient.abs().max() > 0.1 for gradient in self.gradients_of_each_group(world, 3, baseline=baseline))


def divergence_from_posterior(policy):
    return (POSTERIOR * (POSTERIOR / policy).log()).sum().item()


def train(n, *, proposal=PRIOR, refresh_interval=None, steps=400, kind="soft", **options):
    """Policies after each step of gradient descent on the expected loss, from the first proposal."""
    policies = [proposal]
    groups = Groups(n, proposal, kind=kind)
    for step in range(steps):
        if refresh_interval and step and step % refresh_interval == 0:
            groups = Groups(n, policies[-1], kind=kind)
        policies.append((policies[-1].log() - groups.expected_gradient(policies[-1], **options)).softmax(0))
    return policies


class TestTraining:
    @pytest.mark.parametrize("refresh_interval", [None, 10, 1])
    @pytest.mark.parametrize("n", [2, 8])
    def test_ends_at_the_posterior_with_a_static_and_with_a_refreshed_proposal(self, n, refresh_interval):
        # At any n: the bias of the gradient vanishes at the posterior, where each group's loss has its minimum.
        torch.testing.assert_close(train(n, refresh_interval=refresh_interval)[-1], POSTERIOR, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("baseline", ["unnormalized", "none"])
    def test_without_self_normalisation_a_static_proposal_leaves_a_bias_of_order_one_over_n(self, baseline):
        errors = {}
        for n in (4, 8, 16):
            policy = train(n, baseline=baseline, steps=200)[-1]
            torch.testing.assert_close(policy, Groups(n, PRIOR).mean_alpha(), rtol=0, atol=1e-6)
            errors[n] = (policy - POSTERIOR).norm().item()
        assert 1.7 < errors[4] / errors[8] < 2.3 and 1.7 < errors[8] / errors[16] < 2.3

    @pytest.mark.parametrize("baseline", ["unnormalized", "none"])
    def test_without_self_normalisation_a_refreshed_proposal_reaches_the_posterior(self, baseline):
        policy = train(8, baseline=baseline, refresh_interval=10, steps=200)[-1]
        torch.testing.assert_close(policy, POSTERIOR, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("strength", [0.5, 2.0])
    def test_strength_on_samples_of_the_prior_multiplies_the_reward_temperature(self, strength):
        target = (PRIOR.log() + REWARDS / strength).softmax(0)
        torch.testing.assert_close(train(8, strength=strength)[-1], target, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("strength", [0.5, 0.7, 2.0])
    def test_a_round_to_convergence_leaves_one_minus_one_over_strength_of_the_log_ratio_to_the_posterior(
        self, strength
    ):
        # beta = alpha where (q/q')^b is proportional to posterior/q'. So refreshes settle for b > 1/2 alone, if rounds
        # are long.
        proposal = probabilities(0.4, 0.4, 0.2)
        policy = train(8, proposal=proposal, strength=strength)[-1]
        left = (1 - 1 / strength) * (proposal / POSTERIOR).log()
        torch.testing.assert_close(policy, (POSTERIOR.log() + left).softmax(0), rtol=0, atol=1e-6)

    def test_hard_alpha_goes_past_the_posterior_to_the_best_response(self):
        policies = train(2, kind="hard")
        best = [policy[2].item() for policy in policies]
        assert all(later > earlier for earlier, later in itertools.pairwise(best)), "its minimum is at infinity"
        assert best[-1] > 0.85 > 2 * POSTERIOR[2]
        distances = [divergence_from_posterior(policy) for policy in policies]
        assert min(distances) < distances[0] / 2 < distances[0] < distances[-1], "nearer first, then further off"

    def test_each_rung_from_dpo_to_brain_is_nearer_to_the_posterior_after_as_many_steps(self):
        # Holds in this world at this step; the end points above are what holds in all.
        rungs = {
            "DPO-sft": {"n": 2, "kind": "hard"},
            "soft alpha": {"n": 2},
            "more samples": {"n": 8},
            "refreshed proposal": {"n": 8, "refresh_interval": 10},
        }
        distances = [divergence_from_posterior(train(steps=20, **rung)[-1]) for rung in rungs.values()]
        assert all(nearer < further / 2 for further, nearer in itertools.pairwise(distances))
