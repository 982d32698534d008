"""A forward-only pass for the weights, then a weighted negative log-likelihood: the gradient of the loss itself."""

import pytest
import torch

from megatron_brain.objectives.brain import brain_loss, brain_loss_gradient, posterior_log_weights

GROUP_SIZES = (4, 3, 2)
RESPONSES, LENGTH, VOCABULARY = sum(GROUP_SIZES), 6, 7


class TinyPolicy(torch.nn.Module):
    """Log-probabilities of token sequences under a recurrent network."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 5)
        self.recurrence = torch.nn.GRU(5, 6, batch_first=True)
        self.head = torch.nn.Linear(6, VOCABULARY)

    def forward(self, tokens, mask):
        """`[b, s]` tokens and which of them are the response's, to `[b]`."""
        hidden, _ = self.recurrence(self.embedding(tokens[:, :-1]))
        per_token = self.head(hidden).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return per_token.where(mask[:, 1:], 0.0).sum(1)


@pytest.fixture(scope="module")
def world():
    """Policy, responses with their masks, and for each group log q' and log alpha."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = TinyPolicy().double()
        tokens = torch.randint(VOCABULARY, (RESPONSES, LENGTH))
        lengths = torch.randint(2, LENGTH, (RESPONSES, 1))
        mask = (torch.arange(LENGTH) >= 1) & (torch.arange(LENGTH) <= lengths)
        noise, rewards = torch.randn(2, RESPONSES, dtype=torch.float64)
    with torch.no_grad():
        log_prior = policy(tokens, mask) + noise / 2
    log_proposal = log_prior + noise.roll(1) / 2
    parts = zip(*(values.split(GROUP_SIZES) for values in (log_prior, rewards, log_proposal)), strict=True)
    log_alpha = [posterior_log_weights(*part, reward_temperature=0.5) for part in parts]
    return policy, (tokens, mask), log_proposal.split(GROUP_SIZES), log_alpha


def parameter_gradients(policy):
    gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    return gradients


def in_one_pass(world, **options):
    policy, responses, log_proposal, log_alpha = world
    groups = zip(policy(*responses).split(GROUP_SIZES), log_proposal, log_alpha, strict=True)
    torch.stack([brain_loss(*group, **options) for group in groups]).mean().backward()
    return parameter_gradients(policy)


def in_two_passes(world, chunk_sizes, **options):
    """Samples come in chunks that know no groups, as micro-batches may."""
    policy, responses, log_proposal, log_alpha = world
    chunks = list(zip(*(values.split(chunk_sizes) for values in responses), strict=True))
    with torch.no_grad():
        log_policy = torch.cat([policy(*chunk) for chunk in chunks]).split(GROUP_SIZES)
    groups = list(zip(log_policy, log_proposal, log_alpha, strict=True))
    weights = torch.cat([brain_loss_gradient(*group, **options) for group in groups]) / len(groups)
    for chunk, chunk_weights in zip(chunks, weights.split(chunk_sizes), strict=True):
        (chunk_weights * policy(*chunk)).sum().backward()
    return parameter_gradients(policy)


@pytest.mark.parametrize("strength", [1.0, 0.1, 2.5])
@pytest.mark.parametrize("baseline", ["self-normalized", "unnormalized", "none"])
@pytest.mark.parametrize("chunk_sizes", [(RESPONSES,), GROUP_SIZES, (3, 2, 4), (1,) * RESPONSES], ids=str)
def test_both_ways_give_the_same_parameter_gradients(world, chunk_sizes, baseline, strength):
    expected = in_one_pass(world, baseline=baseline, strength=strength)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected)
    got = in_two_passes(world, chunk_sizes, baseline=baseline, strength=strength)
    for one, two in zip(expected, got, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


def test_the_weights_of_the_second_pass_carry_no_graph():
    log_policy = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weights = brain_loss_gradient(log_policy, torch.zeros(4), torch.zeros(4).log_softmax(0))
    assert not weights.requires_grad
