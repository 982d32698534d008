"""Choosing tokens: inverse CDF, top-k, top-p, greedy; against sorted softmax written out."""

import math

import pytest
import torch

from megatron_brain.generation.choose import choose_tokens
from megatron_brain.generation.seeds import draw_uniforms, sample_seed


def _even_uniforms(count):
    """The middles of `count` equal parts of [0, 1): they hit every token in proportion to its probability."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def _frequencies(logits, *, draws=20000, temperature=1.0, top_k=0, top_p=1.0):
    tokens, logprobs = choose_tokens(
        logits.expand(draws, -1).clone(),
        _even_uniforms(draws),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    return torch.bincount(tokens, minlength=logits.numel()) / draws, tokens, logprobs


def test_tokens_come_in_proportion_to_the_tempered_softmax():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 2
    frequencies, tokens, logprobs = _frequencies(logits, temperature=0.7)
    expected = (logits.double() / 0.7).softmax(0)
    assert (frequencies - expected).abs().max() <= 1.01 / 20000
    torch.testing.assert_close(logprobs, expected.log()[tokens], atol=1e-6, rtol=0)


def test_draw_is_the_inverse_cumulative_distribution_in_vocabulary_order():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(5, -1).clone()
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.5999, 0.9999], dtype=torch.float64)
    tokens, _ = choose_tokens(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0)
    assert tokens.tolist() == [0, 0, 1, 2, 3]


def test_impossible_tokens_are_never_drawn_even_at_the_ends():
    logits = torch.full((2, 512), -torch.inf)
    logits[:, 255:258] = 0.0
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = choose_tokens(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0)
    assert tokens.tolist() == [255, 257]
    torch.testing.assert_close(logprobs.exp(), torch.full((2,), 1 / 3, dtype=torch.float64))


def test_top_k_keeps_the_k_likeliest_and_renormalises():
    logits = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]).log()
    frequencies, _, logprobs = _frequencies(logits, top_k=2)
    torch.testing.assert_close(frequencies, torch.tensor([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]), atol=1e-4, rtol=0)
    assert set(logprobs.exp().mul(1e4).round().tolist()) == {6154.0, 3846.0}


def test_top_p_keeps_the_token_that_reaches_the_share_and_no_more():
    logits = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]).log()
    frequencies, _, _ = _frequencies(logits, top_p=0.7)
    torch.testing.assert_close(
        frequencies, torch.tensor([0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]), atol=1e-4, rtol=0
    )


def test_top_p_applies_to_what_top_k_left():
    logits = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]).log()
    # Of the three likeliest the first holds 0.47 and the first two 0.76.
    frequencies, _, _ = _frequencies(logits, top_k=3, top_p=0.6)
    torch.testing.assert_close(frequencies, torch.tensor([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]), atol=1e-4, rtol=0)


def test_top_p_of_a_flat_distribution_looks_beyond_the_first_candidates():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3000, generator=generator) * 0.01
    frequencies, _, _ = _frequencies(logits, top_p=0.9, draws=8000)
    probs, order = logits.double().softmax(0).sort(descending=True)
    kept = order[probs.cumsum(0) - probs < 0.9]
    assert set(frequencies.nonzero().flatten().tolist()) == set(kept.tolist())


def test_greedy_takes_the_likeliest_with_certainty():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 4.0]])
    tokens, logprobs = choose_tokens(logits, torch.zeros(2, dtype=torch.float64), temperature=0.0, top_k=0, top_p=1.0)
    assert tokens.tolist() == [1, 0]
    assert logprobs.tolist() == [0.0, 0.0]


def test_draws_depend_on_seed_key_and_sample_and_continue():
    first = draw_uniforms(sample_seed(1, 2, 3), 5)
    assert (draw_uniforms(sample_seed(1, 2, 3), 9)[:5] == first).all()
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 3, 3)):
        assert (draw_uniforms(sample_seed(*other), 5) != first).all()


@pytest.mark.parametrize("settings", [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 0.9), (1.0, 3, 1.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_get_no_token_and_the_others_theirs(bad, settings):
    temperature, top_k, top_p = settings
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    uniforms = torch.tensor([0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    expected, logprobs = choose_tokens(logits.clone(), uniforms, **options)
    broken = logits.clone()
    broken[1, 7] = bad
    broken[3] = bad
    tokens, found = choose_tokens(broken, uniforms, **options)
    assert tokens.tolist() == [expected[0], -1, expected[2], -1]
    assert torch.equal(found[::2], logprobs[::2])
