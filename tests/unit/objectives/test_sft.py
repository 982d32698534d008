"""The supervised loss by hand."""

import math

import torch

from megatron_brain.objectives.sft import negative_log_likelihood


def test_loss_sums_the_counted_tokens_alone():
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    assert negative_log_likelihood(logprobs, torch.tensor([True, False, True])).item() == 5.0


def test_gradient_is_minus_one_at_counted_tokens_and_zero_elsewhere_even_at_infinity():
    logprobs = torch.tensor([-1.0, -math.inf, -4.0], requires_grad=True)
    loss = negative_log_likelihood(logprobs, torch.tensor([True, False, True]))
    loss.backward()
    assert loss.item() == 5.0
    assert logprobs.grad.tolist() == [-1.0, 0.0, -1.0]


def test_no_counted_tokens_give_zero():
    assert negative_log_likelihood(torch.tensor([-1.0]), torch.tensor([False])).item() == 0.0
