"""RLOO and GRPO worked by hand, against plain Python, and against TRL where both are the same."""

import math
import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from helpers.random_groups import doubles, random_group
from trl import GRPOTrainer, RLOOTrainer

from megatron_brain.objectives.registry import make_objective


def made(name, *, kl=0.0, clip=0.2):
    return make_objective(name, {"kl_coefficient": kl, "clip_ratio": clip})


def known(objective, log_prior, rewards, log_proposal):
    numbers = {"log_prior": log_prior, "reward": rewards, "log_proposal": log_proposal}
    return numbers | {"advantage": objective.fix(numbers)}


class TestRloo:
    def test_advantages_worked_by_hand(self):
        # Rewards less 0.5 (log q' - log p): 1 - 0.5, 4 - 1, 2 + 0.5 = 0.5, 3, 2.5; the others' means 2.75, 1.5, 1.75.
        numbers = known(made("rloo", kl=0.5), doubles(-3, -4, -2), doubles(1, 4, 2), doubles(-2, -2, -3))
        assert numbers["advantage"].tolist() == pytest.approx([-2.25, 1.5, 0.75])

    def test_loss_and_gradient_worked_by_hand(self):
        objective = made("rloo")
        numbers = known(objective, doubles(0, 0, 0, 0), doubles(3, 3, 0, 0), doubles(-1, -1, -1, -1))
        assert numbers["advantage"].tolist() == pytest.approx([2, 2, -2, -2])
        # Ratios 1.5 and 0.5, of which an advantage above 0 stops at 1.2, one below 0 at 0.8.
        log_policy = -1 + doubles(1.5, 0.5, 1.5, 0.5).log()
        assert objective.loss(log_policy, numbers).item() == pytest.approx(-(2.4 + 1.0 - 3.0 - 1.6) / 4)
        assert objective.gradient(log_policy, numbers).tolist() == pytest.approx([0, -0.25, 0.75, 0])
        assert objective.measure(log_policy, numbers)["clipped_fraction"] == 0.5
        assert objective.measure(log_policy, numbers)["ratio_error_at_refresh"].item() == pytest.approx(0.5)

    @pytest.mark.parametrize("kl", [0.0, 0.3])
    def test_advantages_are_those_of_plain_python(self, kl):
        _, log_proposal, log_prior, rewards = random_group(5)
        rows = zip(rewards.tolist(), log_proposal.tolist(), log_prior.tolist(), strict=True)
        total = [r - kl * (q - p) for r, q, p in rows]
        expected = [r - statistics.mean(total[:i] + total[i + 1 :]) for i, r in enumerate(total)]
        numbers = known(made("rloo", kl=kl), log_prior, rewards, log_proposal)
        assert numbers["advantage"].tolist() == pytest.approx(expected, rel=1e-12)


class TestGrpo:
    def test_advantages_worked_by_hand(self):
        # Mean 2, deviation sqrt((1 + 1) / 1) = 1.4142: +-1 / 1.4143
        numbers = known(made("grpo"), doubles(0, 0), doubles(3, 1), doubles(0, 0))
        assert numbers["advantage"].tolist() == pytest.approx([1 / (math.sqrt(2) + 1e-4), -1 / (math.sqrt(2) + 1e-4)])

    def test_the_divergence_is_a_term_of_the_loss_worked_by_hand(self):
        objective = made("grpo", kl=0.5)
        log_policy = doubles(-1, -2)
        # p/q is 3 and 1/2; equal rewards leave nothing but 0.5 x mean of p/q - log(p/q) - 1.
        numbers = known(objective, log_policy + doubles(3, 0.5).log(), doubles(1, 1), log_policy)
        terms = (3 - math.log(3) - 1, 0.5 + math.log(2) - 1)
        assert objective.loss(log_policy, numbers).item() == pytest.approx(0.5 * sum(terms) / 2)
        # d/d log q = 1 - p/q, over n
        assert objective.gradient(log_policy, numbers).tolist() == pytest.approx([-0.5, 0.125])

    def test_advantages_are_those_of_plain_python(self):
        _, log_proposal, log_prior, rewards = random_group(5)
        values = rewards.tolist()
        expected = [(r - statistics.mean(values)) / (statistics.stdev(values) + 1e-4) for r in values]
        numbers = known(made("grpo"), log_prior, rewards, log_proposal)
        assert numbers["advantage"].tolist() == pytest.approx(expected, rel=1e-12)

    def test_without_a_coefficient_no_divergence_is_computed_that_could_overflow(self):
        objective = made("grpo")
        numbers = known(objective, doubles(1e4, 0), doubles(1, 0), doubles(-1e4, 0))
        log_policy = doubles(-1e4, 0)
        assert objective.loss(log_policy, numbers).isfinite()
        assert objective.gradient(log_policy, numbers).isfinite().all()


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_an_infinite_ratio_is_clipped_and_without_an_advantage_it_counts_nothing(name):
    objective = made(name)
    log_policy = doubles(1e4, 0.0, 0.0)
    for rewards, loss in ((doubles(1, 0, 0), -0.2 / 3), (doubles(1, 1, 1), 0.0)):
        numbers = known(objective, doubles(0, 0, 0), rewards, doubles(0, 0, 0))
        scale = numbers["advantage"][0].item() or 1.0
        assert objective.loss(log_policy, numbers).item() == pytest.approx(loss * scale, abs=1e-12)
        assert objective.gradient(log_policy, numbers)[0].item() == 0.0


# What follows compares with TRL's own loss methods, on tensors. Their ratios and divergences are per token.
TOKENS = 4


def of_trl(trainer, leaf, old, prior, mask, advantages, **settings):
    """Loss and gradient in the tokens' log-probabilities `[n, t]` of a trainer's loss method."""
    gathered = SimpleNamespace(reduce=lambda value, reduction: value, gather=lambda value: value)
    trainer_state = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (leaf, torch.zeros_like(leaf), None),
        model=SimpleNamespace(training=True),
        accelerator=gathered,
        _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        **settings,
    )
    empty = torch.zeros(len(leaf), 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": mask.long(),
        "completion_mask": mask.double(),
        "old_logps": (old * mask).sum(1),
        "old_per_token_logps": old,
        "ref_per_token_logps": prior,
        "advantages": advantages,
    }
    loss = trainer._compute_loss(trainer_state, None, inputs)
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def ours(objective, leaf, numbers, mask):
    loss = objective.loss((leaf * mask).sum(1), numbers)
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def tokens_of(tokens=TOKENS, *, seed=0, n=6):
    """Log-probabilities per token of policy, proposal and prior `[n, t]`, their mask, and rewards."""
    generator = torch.Generator().manual_seed(seed)
    policy = -2 - torch.rand(n, tokens, generator=generator, dtype=torch.float64)
    near = [policy + 0.3 * torch.randn(n, tokens, generator=generator, dtype=torch.float64) for _ in range(2)]
    lengths = torch.randint(1, tokens + 1, (n, 1), generator=generator)
    rewards = torch.randn(n, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), *near, torch.arange(tokens) < lengths, rewards


def assert_same(mine, theirs, scale=1.0):
    assert mine[0] == pytest.approx(scale * theirs[0], rel=1e-10)
    assert mine[1].abs().max() > 1e-3
    torch.testing.assert_close(mine[1], scale * theirs[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_rloo_is_the_loss_of_trl_on_responses_of_any_length(seed):
    leaf, old, prior, mask, rewards = tokens_of(seed=seed)
    objective = made("rloo", kl=0.1)
    numbers = known(objective, (prior * mask).sum(1), rewards, (old * mask).sum(1))
    assert 0 < objective.measure((leaf * mask).sum(1).detach(), numbers)["clipped_fraction"] < 1
    theirs = of_trl(RLOOTrainer, leaf, old, prior, mask, numbers["advantage"])
    assert_same(ours(objective, leaf, numbers, mask), theirs)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("seed", range(3))
def test_grpo_is_the_loss_of_trl_on_responses_of_one_token(level, seed):
    leaf, old, prior, mask, rewards = tokens_of(tokens=1, seed=seed, n=24)
    objective = made("grpo", kl=0.1)
    numbers = known(objective, prior.sum(1), rewards, old.sum(1))
    assert 0 < objective.measure(leaf.sum(1).detach(), numbers)["clipped_fraction"] < 1
    settings = {"loss_type": "grpo", "beta": 0.1, "importance_sampling_level": level}
    theirs = of_trl(GRPOTrainer, leaf, old, prior, mask, numbers["advantage"], **settings)
    assert_same(ours(objective, leaf, numbers, mask), theirs)


def test_grpo_has_the_gradient_of_trls_before_division_by_lengths_where_the_policy_is_the_proposal():
    """There every ratio is 1, and the gradient of a response is its advantage, for each of its tokens."""
    leaf, _, prior, mask, rewards = tokens_of()
    objective, log_policy = made("grpo"), (leaf * mask).sum(1).detach()
    numbers = known(objective, log_policy, rewards, log_policy)
    settings = {"beta": 0.0, "importance_sampling_level": "token", "max_completion_length": TOKENS}
    mine = ours(objective, leaf, numbers, mask)
    # TRL divides a sum over tokens by the longest completion that is allowed, or by the completion's own length.
    for loss_type, divisor in (("dr_grpo", TOKENS), ("grpo", mask.sum(1, keepdim=True))):
        theirs = of_trl(
            GRPOTrainer, leaf, leaf.detach(), prior, mask, numbers["advantage"], loss_type=loss_type, **settings
        )
        torch.testing.assert_close(mine[1], divisor * theirs[1], rtol=1e-10, atol=1e-12)
