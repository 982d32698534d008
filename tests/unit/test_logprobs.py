"""Log-probabilities without whole logits against torch's log_softmax over the whole vocabulary."""

import pytest
import torch

from megatron_brain.logprobs import local_logits, vocab_parallel_logprobs

POSITIONS, WIDTH, PADDED, VOCAB = 13, 8, 20, 17


@pytest.fixture
def inputs():
    """hidden `[N, h]`, weight `[V, h]`, targets `[N]` that reach both ends of the vocabulary, weights of the loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(POSITIONS, WIDTH, generator=generator)
    weight = torch.randn(PADDED, WIDTH, generator=generator)
    targets = torch.randint(VOCAB, (POSITIONS,), generator=generator)
    targets[:2] = torch.tensor([0, VOCAB - 1])
    return hidden, weight, targets, torch.randn(POSITIONS, generator=generator)


def reference(hidden, weight, targets, loss_weights, *, temperature=1.0, vocab_size=VOCAB):
    """Values and gradients of hidden and weight, from whole logits in float64."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    logprobs = torch.log_softmax(hidden @ weight[:vocab_size].t() / temperature, 1).gather(1, targets[:, None])[:, 0]
    (logprobs * loss_weights.double()).sum().backward()
    return logprobs.detach(), hidden.grad, weight.grad


def computed(group, hidden, weight, targets, loss_weights, **options):
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
    logprobs = vocab_parallel_logprobs(hidden, weight, targets, group=group, **{"vocab_size": VOCAB} | options)
    (logprobs * loss_weights).sum().backward()
    return logprobs.detach(), hidden.grad, weight.grad


def expect_close(actual, expected, **tolerances):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **tolerances)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("vocab_size", [VOCAB, PADDED])
def test_values_and_gradients_are_those_of_log_softmax(single, inputs, temperature, vocab_size):
    options = {"temperature": temperature, "vocab_size": vocab_size}
    actual = computed(single.groups.tp, *inputs, **options)
    assert actual[0].dtype == torch.float32
    expect_close(actual, reference(*inputs, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 4, POSITIONS - 1, POSITIONS, 1000])
def test_chunk_size_changes_nothing(single, inputs, chunk_size):
    actual = computed(single.groups.tp, *inputs, chunk_size=chunk_size)
    expect_close(actual, computed(single.groups.tp, *inputs), rtol=1e-5, atol=1e-6)


def test_vocabulary_padding_has_no_probability_and_no_gradient(single, inputs):
    hidden, weight, targets, loss_weights = inputs
    expected = computed(single.groups.tp, *inputs)
    weight = weight.clone()
    weight[VOCAB:] = 1e3
    actual = computed(single.groups.tp, hidden, weight, targets, loss_weights)
    expect_close(actual, expected, rtol=0, atol=0)
    assert not actual[2][VOCAB:].any()
    everything = vocab_parallel_logprobs(
        hidden[:1].expand(VOCAB, -1), weight, torch.arange(VOCAB), group=single.groups.tp, vocab_size=VOCAB
    )
    assert everything.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_logits_of_one_share_are_its_rows_with_padding_at_minus_infinity(inputs):
    hidden, weight, *_ = inputs
    whole = local_logits(hidden, weight, first_id=0, vocab_size=VOCAB, temperature=0.5)
    halves = [
        local_logits(hidden, weight[start : start + 10], first_id=start, vocab_size=VOCAB, temperature=0.5)
        for start in (0, 10)
    ]
    torch.testing.assert_close(torch.cat(halves, 1), whole)
    assert whole[:, :VOCAB].isfinite().all() and (whole[:, VOCAB:] == -torch.inf).all()
    past_the_end = local_logits(hidden, weight, first_id=VOCAB + 3, vocab_size=VOCAB)
    assert (past_the_end == -torch.inf).all()


def test_inputs_are_not_modified(single, inputs):
    before = [tensor.clone() for tensor in inputs]
    hidden, weight, targets, loss_weights = inputs
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs = vocab_parallel_logprobs(
        hidden, weight, targets, group=single.groups.tp, vocab_size=VOCAB, temperature=0.5, chunk_size=4
    )
    (logprobs * loss_weights).sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


def test_backward_may_run_twice(single, inputs):
    hidden, weight, targets, loss_weights = inputs
    hidden.requires_grad_()
    logprobs = vocab_parallel_logprobs(hidden, weight, targets, group=single.groups.tp, vocab_size=VOCAB)
    loss = (logprobs * loss_weights).sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(single, inputs, frozen):
    expected = computed(single.groups.tp, *inputs)[1 + (1 - frozen)]
    tensors = [inputs[0].clone(), inputs[1].clone()]
    tensors[1 - frozen].requires_grad_()
    logprobs = vocab_parallel_logprobs(*tensors, inputs[2], group=single.groups.tp, vocab_size=VOCAB)
    (logprobs * inputs[3]).sum().backward()
    assert tensors[frozen].grad is None
    torch.testing.assert_close(tensors[1 - frozen].grad, expected)


def test_bfloat16_inputs_give_float32_values_and_bfloat16_gradients(single, inputs):
    hidden, weight, targets, loss_weights = inputs
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    actual = computed(single.groups.tp, hidden, weight, targets, loss_weights)
    assert [tensor.dtype for tensor in actual] == [torch.float32, torch.bfloat16, torch.bfloat16]
    expect_close(actual, reference(hidden, weight, targets, loss_weights), rtol=0.03, atol=0.06)


def test_large_logits_do_not_overflow(single):
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    logprobs = vocab_parallel_logprobs(hidden, weight, torch.tensor([0, 0]), group=single.groups.tp, vocab_size=3)
    logprobs.sum().backward()
    assert logprobs.tolist() == [0.0, -2e4]
    assert hidden.grad.isfinite().all()


def test_no_positions_give_no_values_and_zero_gradients(single, inputs):
    hidden, weight, targets, loss_weights = inputs
    logprobs, grad_hidden, grad_weight = computed(single.groups.tp, hidden[:0], weight, targets[:0], loss_weights[:0])
    assert logprobs.shape == (0,) and grad_hidden.shape == (0, WIDTH) and not grad_weight.any()
