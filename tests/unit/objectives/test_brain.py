"""The BRAIn objective against hand-worked numbers, its constant-weight form and finite differences."""

import itertools
import math

import pytest
import torch
from helpers.random_groups import doubles, random_group
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_brain.errors import UserError
from megatron_brain.objectives.brain import brain_loss, brain_loss_gradient, posterior_log_weights
from megatron_brain.objectives.importance import effective_sample_size, policy_log_weights

BASELINES = ("self-normalized", "unnormalized", "none")
STRENGTHS = (1.0, 0.1, 2.5)


def log_alpha_of(log_prior, rewards, log_proposal, tau=0.7, **options):
    return posterior_log_weights(log_prior, rewards, log_proposal, reward_temperature=tau, **options)


def loss_and_gradient(log_policy, log_proposal, log_alpha, **options):
    log_policy = log_policy.clone().requires_grad_()
    loss = brain_loss(log_policy, log_proposal, log_alpha, **options)
    return loss.detach(), torch.autograd.grad(loss, log_policy)[0]


def constant_weights(log_policy, log_proposal, log_alpha, baseline, strength):
    """The weight of each grad log q_theta(y_i), from its definition with plain floats."""
    ratios = [math.exp(strength * (q - p)) for q, p in zip(log_policy.tolist(), log_proposal.tolist(), strict=True)]
    subtracted = {
        "self-normalized": [ratio / sum(ratios) for ratio in ratios],
        "unnormalized": [ratio / len(ratios) for ratio in ratios],
        "none": [0.0] * len(ratios),
    }[baseline]
    return doubles(*(math.exp(a) - s for a, s in zip(log_alpha.tolist(), subtracted, strict=True)))


@pytest.mark.parametrize(("baseline", "strength"), list(itertools.product(BASELINES, STRENGTHS)))
class TestGradientIsTheConstantWeightForm:
    def test_by_autograd_in_the_log_probabilities(self, baseline, strength):
        log_policy, log_proposal, log_prior, rewards = random_group(5)
        log_alpha = log_alpha_of(log_prior, rewards, log_proposal)
        _, gradient = loss_and_gradient(log_policy, log_proposal, log_alpha, baseline=baseline, strength=strength)
        weights = constant_weights(log_policy, log_proposal, log_alpha, baseline, strength)
        torch.testing.assert_close(gradient, -strength * weights, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("kind", ["soft", "hard"])
    def test_in_closed_form(self, kind, baseline, strength):
        log_policy, log_proposal, log_prior, rewards = random_group(5, seed=4)
        group = log_policy, log_proposal, log_alpha_of(log_prior, rewards, log_proposal, kind=kind)
        closed = brain_loss_gradient(*group, baseline=baseline, strength=strength)
        weights = constant_weights(*group, baseline, strength)
        torch.testing.assert_close(closed, -strength * weights, rtol=1e-12, atol=1e-14)
        _, gradient = loss_and_gradient(*group, baseline=baseline, strength=strength)
        torch.testing.assert_close(closed, gradient, rtol=1e-12, atol=1e-14)

    def test_by_finite_differences_in_shared_parameters(self, baseline, strength):
        # Six outcomes with logits theta; the group holds one of them twice, so log q_theta(y_i) depend on each other.
        theta = random_group(6, seed=1)[0]
        drawn = torch.tensor([0, 3, 3, 5])
        _, log_proposal, log_prior, rewards = random_group(4, seed=2)
        log_proposal = log_proposal / 10 - 1
        log_alpha = log_alpha_of(log_prior, rewards, log_proposal)

        def log_policy(logits):
            return torch.log_softmax(logits, 0)[drawn]

        def loss(logits):
            return brain_loss(log_policy(logits), log_proposal, log_alpha, baseline=baseline, strength=strength)

        weights = constant_weights(log_policy(theta), log_proposal, log_alpha, baseline, strength)
        jacobian = torch.autograd.functional.jacobian(log_policy, theta)
        analytic = -strength * weights @ jacobian
        steps = 1e-5 * torch.eye(6, dtype=torch.float64)
        numeric = torch.stack([(loss(theta + step) - loss(theta - step)) / 2e-5 for step in steps])
        torch.testing.assert_close(numeric, analytic, rtol=1e-9, atol=1e-9)

    def test_by_gradcheck(self, baseline, strength):
        log_policy, log_proposal, log_prior, rewards = random_group(4, seed=3)
        log_alpha = log_alpha_of(log_prior, rewards, log_proposal)
        assert torch.autograd.gradcheck(
            lambda q: brain_loss(q, log_proposal, log_alpha, baseline=baseline, strength=strength),
            log_policy.requires_grad_(),
        )


def test_value_is_the_divergence_worked_by_hand():
    # alpha = (3/4, 1/4); beta = (1/5, 4/5): KL = 3/4 ln(15/4) + 1/4 ln(5/16)
    log_alpha = doubles(0.75, 0.25).log()
    log_policy, log_proposal = doubles(0.1, 0.2).log(), doubles(0.5, 0.25).log()
    expected = 0.75 * math.log(15 / 4) + 0.25 * math.log(5 / 16)
    assert brain_loss(log_policy, log_proposal, log_alpha).item() == pytest.approx(expected, abs=1e-15)
    # Mean ratios are (0.1, 0.4): cross-entropy 3/4 ln(7.5) + 1/4 ln(0.625); unnormalised adds 0.5 - 1.
    cross_entropy = 0.75 * math.log(7.5) + 0.25 * math.log(0.625)
    values = [brain_loss(log_policy, log_proposal, log_alpha, baseline=b).item() for b in ("none", "unnormalized")]
    assert values == pytest.approx([cross_entropy, cross_entropy - 0.5], abs=1e-15)


def test_alpha_is_the_self_normalised_weight_worked_by_hand():
    # p = (0.2, 0.1), q' = (0.4, 0.1), r/tau = (ln 2, ln 3): p exp(r/tau) / q' = (1, 3)
    log_alpha = posterior_log_weights(
        doubles(0.2, 0.1).log(), 0.5 * doubles(2, 3).log(), doubles(0.4, 0.1).log(), reward_temperature=0.5
    )
    torch.testing.assert_close(log_alpha.exp(), doubles(0.25, 0.75))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_gradient_is_zero_when_the_policy_is_the_posterior(strength):
    _, log_proposal, log_prior, rewards = random_group(6)
    log_alpha = log_alpha_of(log_prior, rewards, log_proposal)
    normaliser = 1.7  # log of the evidence: any constant, as the policy is normalised over all responses
    posterior = log_proposal + (log_prior + rewards / 0.7 - log_proposal) / strength - normaliser
    loss, gradient = loss_and_gradient(posterior, log_proposal, log_alpha, strength=strength)
    torch.testing.assert_close(gradient, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-15)
    assert loss.item() == pytest.approx(0.0, abs=1e-15)


def test_divergence_is_never_negative_and_zero_only_at_equal_weights():
    for seed in range(20):
        log_policy, log_proposal, log_prior, rewards = random_group(4, seed)
        assert brain_loss(log_policy, log_proposal, log_alpha_of(log_prior, rewards, log_proposal)) > 0


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 2), ()])
def test_a_group_of_fewer_than_two_samples_is_refused(shape):
    wrong = torch.zeros(shape)
    with pytest.raises(AssertionError, match="at least two samples"):
        log_alpha_of(wrong, wrong, wrong)
    with pytest.raises(AssertionError, match="at least two samples"):
        policy_log_weights(wrong, wrong)
    for baseline, function in itertools.product(BASELINES, (brain_loss, brain_loss_gradient)):
        with pytest.raises(AssertionError, match="at least two samples"):
            function(wrong, wrong, wrong, baseline=baseline)


@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000), n=st.integers(2, 9))
@settings(max_examples=30, deadline=None)
def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing(shift, seed, n):
    _, log_proposal, log_prior, rewards = random_group(n, seed)
    for kind in ("soft", "hard"):
        before = log_alpha_of(log_prior, rewards, log_proposal, kind=kind)
        after = log_alpha_of(log_prior, rewards + shift, log_proposal, kind=kind)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@given(order=st.permutations(range(6)), seed=st.integers(0, 1000), kind=st.sampled_from(["soft", "hard"]))
@settings(max_examples=30, deadline=None)
def test_permuting_a_group_permutes_its_weights_and_keeps_its_loss(order, seed, kind):
    group = random_group(6, seed)
    log_policy, log_proposal, log_prior, rewards = group
    moved_policy, moved_proposal, moved_prior, moved_rewards = (values[list(order)] for values in group)
    log_alpha = log_alpha_of(log_prior, rewards, log_proposal, kind=kind)
    moved_alpha = log_alpha_of(moved_prior, moved_rewards, moved_proposal, kind=kind)
    torch.testing.assert_close(moved_alpha, log_alpha[list(order)])
    for baseline in BASELINES:
        loss, gradient = loss_and_gradient(log_policy, log_proposal, log_alpha, baseline=baseline)
        moved_loss, moved_gradient = loss_and_gradient(moved_policy, moved_proposal, moved_alpha, baseline=baseline)
        torch.testing.assert_close(moved_loss, loss)
        torch.testing.assert_close(moved_gradient, gradient[list(order)])


def test_the_self_normalized_loss_alone_ignores_a_constant_added_to_log_probabilities_of_a_group():
    log_policy, log_proposal, log_prior, rewards = random_group(4)
    log_alpha = log_alpha_of(log_prior, rewards, log_proposal)
    torch.testing.assert_close(log_alpha_of(log_prior + 3, rewards, log_proposal - 3), log_alpha)
    before, after = (
        {b: loss_and_gradient(values, log_proposal, log_alpha, baseline=b) for b in BASELINES}
        for values in (log_policy, log_policy + 3)
    )
    torch.testing.assert_close(after["self-normalized"], before["self-normalized"])
    torch.testing.assert_close(after["none"], (before["none"][0] - 3, before["none"][1]))
    alpha = log_alpha.exp()
    torch.testing.assert_close(after["unnormalized"][1] + alpha, math.exp(3) * (before["unnormalized"][1] + alpha))


class TestJustAfterARefresh:
    """The proposal is the policy."""

    @pytest.mark.parametrize("strength", STRENGTHS)
    def test_beta_is_one_over_n_exactly(self, strength):
        for n in range(2, 33):
            log_policy = 100 * random_group(n)[0].float()
            beta = policy_log_weights(log_policy, log_policy, strength=strength).exp()
            assert (beta == beta[0]).all()
            assert beta[0].item() == pytest.approx(1 / n, rel=2e-7)  # of float32

    def test_alpha_is_the_softmax_of_the_rewards_where_the_proposal_is_the_prior(self):
        _, _, log_prior, rewards = random_group(5)
        log_alpha = log_alpha_of(log_prior, rewards, log_prior, tau=0.3)
        torch.testing.assert_close(log_alpha.exp(), torch.softmax(rewards / 0.3, 0))

    def test_unnormalized_is_self_normalized(self):
        log_policy, _, log_prior, rewards = random_group(5)
        log_alpha = log_alpha_of(log_prior, rewards, log_policy)
        results = [loss_and_gradient(log_policy, log_policy, log_alpha, baseline=b) for b in BASELINES[:2]]
        torch.testing.assert_close(results[0], results[1])

    def test_the_update_is_the_advantage_of_alpha_over_one_over_n(self):
        log_policy, _, log_prior, rewards = random_group(5)
        log_alpha = log_alpha_of(log_prior, rewards, log_policy)
        _, gradient = loss_and_gradient(log_policy, log_policy, log_alpha)
        torch.testing.assert_close(gradient, 0.2 - log_alpha.exp())


class TestPairs:
    """Two samples from the prior."""

    @pytest.mark.parametrize("strength", STRENGTHS)
    @pytest.mark.parametrize("preferred", [0, 1])
    def test_hard_alpha_is_dpo(self, strength, preferred):
        log_policy, log_prior, _, rewards = random_group(2, seed=5)
        rewards[preferred] = rewards.max() + 1
        log_alpha = log_alpha_of(log_prior, rewards, log_prior, kind="hard")
        loss, gradient = loss_and_gradient(log_policy, log_prior, log_alpha, strength=strength)
        policy = log_policy.clone().requires_grad_()
        ratio = policy - log_prior
        dpo = -torch.nn.functional.logsigmoid(strength * (ratio[preferred] - ratio[1 - preferred]))
        torch.testing.assert_close(loss, dpo.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(dpo, policy)[0])

    def test_dpo_by_hand(self):
        # delta = ln 3: -log sigmoid(ln 3) = ln(4/3), gradient -(1 - 3/4) for the winner.
        log_alpha = posterior_log_weights(
            torch.zeros(2), torch.tensor([0.2, -0.1]), torch.zeros(2), reward_temperature=1.0, kind="hard"
        )
        assert log_alpha.tolist() == [0.0, -math.inf]
        loss, gradient = loss_and_gradient(doubles(0.3, 0.1).log(), doubles(0.5, 0.5).log(), log_alpha.double())
        assert loss.item() == pytest.approx(math.log(4 / 3))
        assert gradient.tolist() == pytest.approx([-0.25, 0.25])

    @pytest.mark.parametrize("strength", STRENGTHS)
    def test_soft_alpha_is_the_divergence_of_two_bernoulli_distributions(self, strength):
        log_policy, log_prior, _, rewards = random_group(2, seed=6)
        loss = brain_loss(log_policy, log_prior, log_alpha_of(log_prior, rewards, log_prior), strength=strength)
        ratio = strength * (log_policy - log_prior)
        target, predicted = torch.sigmoid((rewards[0] - rewards[1]) / 0.7), torch.sigmoid(ratio[0] - ratio[1])
        bernoulli = torch.distributions.Bernoulli
        expected = torch.distributions.kl_divergence(bernoulli(probs=target), bernoulli(probs=predicted))
        torch.testing.assert_close(loss, expected)


EXCLUDED = -math.inf


class TestExtremeValues:
    """No NaN in a value or a gradient whatever the numbers of some samples; no number where there is no answer."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("strength", STRENGTHS)
    @pytest.mark.parametrize("baseline", BASELINES)
    @pytest.mark.parametrize(
        "log_policy",
        [(1e4, 0, -1e4), (-1e4, -1e4, -1e4), (EXCLUDED, -5, -6), (-20, EXCLUDED, 0), (EXCLUDED, EXCLUDED, -1e4)],
    )
    @pytest.mark.parametrize("log_alpha", [(0, EXCLUDED, EXCLUDED), (-1e4, 0, -2e4), (-math.log(3),) * 3])
    def test_loss_and_gradient_have_no_nan(self, log_alpha, log_policy, baseline, strength, dtype):
        group = [torch.tensor(values, dtype=dtype) for values in (log_policy, (-4.0, -5.0, -6.0), log_alpha)]
        loss, gradient = loss_and_gradient(*group, baseline=baseline, strength=strength)
        assert not loss.isnan() and not gradient.isnan().any()
        if baseline != "unnormalized":  # whose ratios are not bounded
            assert gradient.isfinite().all() and gradient.abs().max() <= strength
        closed = brain_loss_gradient(*group, baseline=baseline, strength=strength)
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(closed, gradient, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize(
        ("log_policy", "log_alpha"),
        [((EXCLUDED, -5, -6), (-1.0, -1.0, -1.5)), ((-5, EXCLUDED, EXCLUDED), (EXCLUDED, 0, EXCLUDED))],
    )
    @pytest.mark.parametrize("baseline", BASELINES)
    def test_a_policy_that_excludes_a_sample_with_weight_is_infinitely_far(self, log_policy, log_alpha, baseline):
        assert brain_loss(doubles(*log_policy), doubles(-4, -5, -6), doubles(*log_alpha), baseline=baseline) == math.inf

    def test_a_policy_that_excludes_all_samples_has_no_self_normalised_weights(self):
        group = doubles(EXCLUDED, EXCLUDED), doubles(-4, -5), doubles(0.5, 0.5).log()
        assert brain_loss(*group).isnan() and brain_loss_gradient(*group).isnan().all()
        for baseline in BASELINES[1:]:
            loss, gradient = loss_and_gradient(*group, baseline=baseline)
            assert loss == math.inf and gradient.tolist() == pytest.approx([-0.5, -0.5])

    @pytest.mark.parametrize("alpha", [(1.0, 0.0, 0.0), (0.5, 0.25, 0.25)])
    @pytest.mark.parametrize("place", [0, 1])
    @pytest.mark.parametrize("argument", range(3))
    @pytest.mark.parametrize("baseline", BASELINES)
    def test_a_nan_in_any_argument_makes_the_loss_nan(self, baseline, argument, place, alpha):
        group = [doubles(-1, -2, -3), doubles(-3, -2, -1), doubles(*alpha).log()]
        group[argument][place] = math.nan
        assert brain_loss(*group, baseline=baseline).isnan()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", ["soft", "hard"])
    @pytest.mark.parametrize("rewards", [(1e4, -1e4, 0), (EXCLUDED, 0, 1), (2, 2, 2)])
    @pytest.mark.parametrize("log_prior", [(-1e4, -2, -3), (1e4, -2, -1e4), (EXCLUDED, -2, -3)])
    def test_weights_sum_to_one(self, log_prior, rewards, kind, dtype):
        arguments = (torch.tensor(values, dtype=dtype) for values in (log_prior, rewards, (-1.0, -2.0, -3.0)))
        alpha = log_alpha_of(*arguments, kind=kind).exp()
        assert alpha.dtype == dtype and alpha.sum().item() == pytest.approx(1.0)

    @pytest.mark.parametrize(
        ("log_prior", "rewards", "log_proposal"),
        [
            pytest.param((EXCLUDED, EXCLUDED), (1, 2), (-1, -2), id="prior excludes all"),
            pytest.param((-1, -2), (EXCLUDED, EXCLUDED), (-1, -2), id="rewards exclude all"),
            pytest.param((-1, EXCLUDED), (EXCLUDED, 0), (-1, -2), id="together they exclude all"),
            pytest.param((-1, -2), (1, 2), (-1, EXCLUDED), id="proposal excludes a sample drawn from it"),
            pytest.param((-1, EXCLUDED), (1, 2), (-1, EXCLUDED), id="prior and proposal exclude a sample"),
            pytest.param((-1, -2), (1, math.inf), (-1, -2), id="infinite reward"),
            pytest.param((math.nan, -2), (1, 2), (-1, -2), id="nan prior"),
            pytest.param((-1, -2), (math.nan, 2), (-1, -2), id="nan reward"),
            pytest.param((-1, -2), (1, 2), (math.nan, -2), id="nan proposal"),
        ],
    )
    def test_numbers_that_give_no_weights_are_refused(self, log_prior, rewards, log_proposal):
        with pytest.raises(UserError, match="no posterior weights follow from log_prior"):
            log_alpha_of(doubles(*log_prior), doubles(*rewards), doubles(*log_proposal))

    def test_hard_weights_refuse_a_nan_reward(self):
        zeros = torch.zeros(2)
        with pytest.raises(UserError, match=r"no posterior weights follow .* rewards \[1.0, nan\]"):
            log_alpha_of(zeros, torch.tensor([1.0, math.nan]), zeros, kind="hard")

    def test_a_response_the_prior_excludes_gets_no_weight(self):
        log_prior = doubles(-3, -math.inf, -2)
        log_alpha = log_alpha_of(log_prior, doubles(0, 1e4, 0), doubles(-3, -3, -2))
        torch.testing.assert_close(log_alpha.exp(), doubles(0.5, 0, 0.5))
        loss, gradient = loss_and_gradient(doubles(-3, -3, -2), doubles(-3, -3, -2), log_alpha)
        assert loss.item() == pytest.approx(math.log(1.5))
        torch.testing.assert_close(gradient, doubles(1 / 3 - 0.5, 1 / 3, 1 / 3 - 0.5))

    def test_log_ratios_of_ten_thousand_saturate(self):
        log_alpha = doubles(0.5, 0.5).log()
        loss, gradient = loss_and_gradient(doubles(1e4, -1e4), doubles(0, 0), log_alpha)
        assert loss.item() == pytest.approx(1e4 - math.log(2))
        assert gradient.tolist() == pytest.approx([0.5, -0.5])

    def test_equal_rewards_of_prior_samples_pull_the_policy_to_the_prior(self):
        log_policy, log_prior, _, _ = random_group(4)
        log_alpha = log_alpha_of(log_prior, torch.full_like(log_prior, 3.0), log_prior)
        assert log_alpha.exp().tolist() == pytest.approx([0.25] * 4)
        _, gradient = loss_and_gradient(log_policy, log_prior, log_alpha)
        torch.testing.assert_close(gradient, torch.softmax(log_policy - log_prior, 0) - 0.25)

    def test_a_tie_of_hard_weights_goes_to_the_first(self):
        zeros = torch.zeros(3)
        assert log_alpha_of(zeros, zeros + 2.0, zeros, kind="hard").exp().tolist() == [1, 0, 0]


@pytest.mark.parametrize("function", [brain_loss, brain_loss_gradient])
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_host_never_waits_for_values_on_the_device(function, baseline):
    # Meta tensors have no values: a look at one would raise.
    assert function(*torch.zeros(3, 4, device="meta"), baseline=baseline).is_meta


def test_gradient_reaches_the_policy_alone():
    tensors = [values.requires_grad_() for values in random_group(4)]
    log_policy, log_proposal, log_prior, rewards = tensors
    with torch.no_grad():
        log_alpha = log_alpha_of(log_prior, rewards, log_proposal)
    brain_loss(log_policy, log_proposal.detach(), log_alpha).backward()
    assert [values.grad is not None for values in tensors] == [True, False, False, False]


@pytest.mark.parametrize(
    ("weights", "expected"), [((0.25,) * 4, 4.0), ((1.0, 0.0), 1.0), ((0.5, 0.25, 0.25), 1 / 0.375)]
)
def test_effective_sample_size_by_hand(weights, expected):
    assert effective_sample_size(torch.tensor(weights).log()).item() == pytest.approx(expected)
