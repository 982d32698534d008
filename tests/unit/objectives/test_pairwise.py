"""DPO, IPO and RSO's losses worked by hand; which responses are a pair, and what a tie is."""

import math

import pytest
import torch
from helpers.random_groups import doubles, random_group

from megatron_brain.objectives.brain import Brain
from megatron_brain.objectives.registry import make_objective

PAIRWISE = ("dpo", "ipo", "rso-hinge", "rso-sigmoid")


def pairs(name, strength=0.5):
    return make_objective(name, {"policy_strength": strength})


def known(made, log_prior, rewards):
    numbers = {"log_prior": log_prior, "reward": rewards}
    return numbers | {"preference": made.fix(numbers)}


# Pairs (0, 1) and (2, 3); the second of the first pair and the first of the second win.
REWARDS = doubles(1, 2, 0.5, -1)
LOG_PRIOR = doubles(-10, -12, -8, -9)
# Log-ratios 1, 2, 0 and 3: delta is 2 - 1 = 1 and 0 - 3 = -3.
LOG_POLICY = doubles(-9, -10, -8, -6)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        # -log sigmoid(x) = log(1 + exp(-x)) at x = 0.5 delta
        ("dpo", math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1.5))),
        ("rso-sigmoid", math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1.5))),
        # (delta - 1 / (2 x 0.5))^2
        ("ipo", 0.0, 16.0),
        # max(0, 1 - 0.5 delta)
        ("rso-hinge", 0.5, 2.5),
    ],
)
def test_the_loss_is_the_mean_over_neighbouring_pairs_worked_by_hand(name, first, second):
    made = pairs(name)
    numbers = known(made, LOG_PRIOR, REWARDS)
    assert numbers["preference"].tolist() == [-1, 1, 1, -1]
    assert made.loss(LOG_POLICY, numbers).item() == pytest.approx((first + second) / 2, abs=1e-14)


@pytest.mark.parametrize(
    ("name", "slopes"),
    [
        # -0.5 sigmoid(-0.5 delta)
        ("dpo", (-0.5 / (1 + math.exp(0.5)), -0.5 / (1 + math.exp(-1.5)))),
        ("ipo", (0.0, -8.0)),
        ("rso-hinge", (-0.5, -0.5)),
    ],
)
def test_the_gradient_pushes_winner_and_loser_apart_worked_by_hand(name, slopes):
    made = pairs(name)
    first, second = (slope / 2 for slope in slopes)
    gradient = made.gradient(LOG_POLICY, known(made, LOG_PRIOR, REWARDS))
    assert gradient.tolist() == pytest.approx([-first, first, second, -second], abs=1e-14)


def test_the_hinge_lets_go_of_a_pair_that_is_far_enough_apart():
    made = pairs("rso-hinge")
    numbers = known(made, doubles(0, 0), doubles(1, 0))
    for delta, loss, slope in ((1.9, 0.05, -0.5), (2.0, 0.0, 0.0), (2.1, 0.0, 0.0)):
        log_policy = doubles(delta, 0).requires_grad_()
        value = made.loss(log_policy, numbers)
        assert value.item() == pytest.approx(loss, abs=1e-15)
        assert torch.autograd.grad(value, log_policy)[0].tolist() == [slope, -slope]
        assert made.gradient(log_policy, numbers).tolist() == [slope, -slope]


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_tie_teaches_nothing_and_still_counts_as_a_pair(name):
    made = pairs(name)
    ranked = known(made, LOG_PRIOR[:2], REWARDS[:2])
    tied = known(made, LOG_PRIOR, doubles(1, 2, 0.5, 0.5))
    assert tied["preference"].tolist() == [-1, 1, 0, 0]
    log_policy = LOG_POLICY.clone().requires_grad_()
    loss = made.loss(log_policy, tied)
    assert loss.item() == pytest.approx(made.loss(LOG_POLICY[:2], ranked).item() / 2)
    gradient = torch.autograd.grad(loss, log_policy)[0]
    assert gradient[2:].tolist() == [0, 0] and gradient.tolist() == pytest.approx(made.gradient(LOG_POLICY, tied))
    measured = made.measure(LOG_POLICY, tied)
    # The winner has gained 2, the loser 1; the tie is half right and has no part in the log-ratios.
    assert {key: value.item() for key, value in measured.items()} == {
        "pair_accuracy": 0.75,
        "log_ratio_winner": 2.0,
        "log_ratio_loser": 1.0,
        "tied_fraction": 0.5,
    }


def test_a_group_of_ties_has_no_loss_and_no_log_ratios():
    made = pairs("ipo")
    numbers = known(made, LOG_PRIOR, doubles(1, 1, 2, 2))
    assert made.loss(LOG_POLICY, numbers).item() == 0.0 and made.gradient(LOG_POLICY, numbers).tolist() == [0.0] * 4
    measured = made.measure(LOG_POLICY, numbers)
    assert measured["tied_fraction"] == 1 and measured["log_ratio_winner"] == measured["log_ratio_loser"] == 0


def test_log_ratios_are_means_over_the_pairs_that_are_ranked():
    measured = pairs("dpo").measure(LOG_POLICY, known(pairs("dpo"), LOG_PRIOR, REWARDS))
    # Winners have log-ratios 2 and 0, losers 1 and 3: one of two winners has gained on its loser.
    assert [measured[name].item() for name in ("log_ratio_winner", "log_ratio_loser", "pair_accuracy")] == [1, 2, 0.5]


@pytest.mark.parametrize("name", PAIRWISE)
def test_the_order_inside_of_a_pair_and_the_order_of_pairs_change_nothing(name):
    made = pairs(name)
    log_policy, _, log_prior, rewards = random_group(6)
    order = [3, 2, 4, 5, 0, 1]
    expected = made.loss(log_policy, known(made, log_prior, rewards))
    numbers = known(made, log_prior[order], rewards[order])
    torch.testing.assert_close(made.loss(log_policy[order], numbers), expected, rtol=1e-12, atol=0)
    gradient = made.gradient(log_policy, known(made, log_prior, rewards))
    torch.testing.assert_close(made.gradient(log_policy[order], numbers), gradient[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("strength", [0.1, 1.0, 3.0])
def test_dpo_on_one_pair_is_brain_with_hard_alpha(strength):
    log_policy, _, log_prior, rewards = random_group(2)
    brain = Brain(baseline="self-normalized", alpha="hard", policy_strength=strength, reward_temperature=1.0)
    numbers = {"log_prior": log_prior, "reward": rewards, "log_proposal": log_prior}
    numbers["alpha"] = brain.fix(numbers)
    dpo = pairs("dpo", strength)
    ours = known(dpo, log_prior, rewards)
    torch.testing.assert_close(dpo.loss(log_policy, ours), brain.loss(log_policy, numbers), rtol=1e-12, atol=0)
    torch.testing.assert_close(dpo.gradient(log_policy, ours), brain.gradient(log_policy, numbers), rtol=1e-12, atol=0)


def test_an_odd_number_of_responses_is_refused():
    with pytest.raises(AssertionError, match=r"even number of responses in one dimension, got \[3\]"):
        pairs("dpo").fix({"reward": doubles(1, 2, 3), "log_prior": doubles(0, 0, 0)})


def test_log_ratios_of_ten_thousand_do_not_overflow():
    made = pairs("dpo", 1.0)
    numbers = known(made, doubles(0, 0).float(), doubles(1, 0).float())
    assert made.loss(torch.tensor([-1e4, 1e4]), numbers).item() == pytest.approx(2e4)
    assert made.loss(torch.tensor([1e4, -1e4]), numbers).item() == 0.0
