"""The Bradley-Terry loss by hand."""

import math

import pytest
import torch

from megatron_brain.objectives.bradley_terry import bradley_terry_losses


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_losses_are_negative_log_sigmoid_of_the_difference():
    # Differences ln 3, 0 and -ln 3: sigmoid 3/4, 1/2, 1/4.
    losses = bradley_terry_losses(doubles(math.log(3), 5, 0), doubles(0, 5, math.log(3)))
    assert losses.tolist() == pytest.approx([math.log(4 / 3), math.log(2), math.log(4)])


def test_a_margin_must_be_made_up_before_a_pair_counts_as_won():
    losses = bradley_terry_losses(doubles(2, 2), doubles(0, 0), doubles(0, 2))
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-2)), math.log(2)])


def test_centering_adds_the_squared_sum_of_both_rewards():
    chosen, rejected = doubles(1.5, -1), doubles(0.5, 1)
    plain = bradley_terry_losses(chosen, rejected)
    centered = bradley_terry_losses(chosen, rejected, centering_coefficient=0.25)
    assert (centered - plain).tolist() == pytest.approx([0.25 * 4, 0.0])


def test_adding_a_constant_to_both_rewards_changes_nothing_without_centering():
    chosen, rejected = doubles(0.3, -2), doubles(1, 0.5)
    torch.testing.assert_close(bradley_terry_losses(chosen + 7, rejected + 7), bradley_terry_losses(chosen, rejected))


def test_gradient_is_the_probability_of_the_wrong_order():
    chosen, rejected = doubles(math.log(3)).requires_grad_(), doubles(0).requires_grad_()
    bradley_terry_losses(chosen, rejected).sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.25, 0.25))


def test_gradient_passes_gradcheck_with_margin_and_centering():
    chosen, rejected, margin = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry_losses(c, r, margin, centering_coefficient=0.1),
        (chosen.requires_grad_(), rejected.requires_grad_()),
    )


def test_differences_of_ten_thousand_do_not_overflow():
    chosen, rejected = torch.tensor([1e4, -1e4], requires_grad=True), torch.tensor([-1e4, 1e4])
    losses = bradley_terry_losses(chosen, rejected)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 2e4]
    assert chosen.grad.tolist() == [0.0, -1.0]
